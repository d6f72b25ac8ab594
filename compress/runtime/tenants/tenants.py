"""Many fine-tunes of one base in one process: the base is computed once per batch, then each tenant's difference.

Deltas are loaded when they are first needed and stay packed; the least recently used ones are unloaded when they exceed
the budget. A tenant's own tensors are applied before its differences, because they replace what the base computed. On a
GPU, the signs and low-rank factors of all tenants are stacked (slots.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from threading import RLock
from typing import Any

import torch
from torch import Tensor

from compress.errors import PlanError, RecipeError, nearest
from compress.runtime.tenants.difference import Difference
from compress.runtime.tenants.layout import layout
from compress.runtime.tenants.own import OwnOf, way_of
from compress.runtime.tenants.resident import Resident, check_fits, make_resident, most_bytes, need_of, release
from compress.runtime.tenants.rows import Batch
from compress.runtime.tenants.slots import Need, Stacks, on_gpu
from compress.runtime.tenants.step import Step, linear_hook, lookup_hook, own_hook


@dataclass
class Entry:
    """A registered tenant, the most bytes it can take, and its resident form if it is in memory."""

    difference: Difference
    most: int
    need: Need | None = None  # set on a GPU only
    resident: Resident | None = None
    used: int = 0

    def nbytes(self) -> int:
        """The bytes it takes in memory; before it is there, the most that it can take."""
        return self.most if self.resident is None else self.resident.nbytes()


class Tenants:
    """The fine-tunes of a model, by name; in a batch, None stands for the model itself.

    `budget` limits the bytes that deltas in memory take together; None means no limit. `read` reads a delta folder. A
    lock lets only one forward pass run at a time.
    """

    def __init__(
        self,
        model: Any,
        deltas: Mapping[str, Difference | str | Path],
        budget: int | None = None,
        read: Callable[[str | Path], Difference] | None = None,
    ) -> None:
        self.model, self.budget, self.read = model, budget, read
        self.layout = layout(model)
        first = next(model.parameters())
        self.stacks = Stacks(first.dtype, first.device) if on_gpu(first) else None
        self.entries: dict[str, Entry] = {}
        self.lock = RLock()
        self.clock = 0
        self.step: Step | None = None
        self.last: tuple[tuple[Resident | None, ...], Step] | None = None  # the previous batch, reused if it recurs
        self.hooked: set[tuple[str, str]] = set()
        self.ways: dict[OwnOf, str] = {}
        for name, delta in deltas.items():
            self.add(name, delta)

    # -- registered tenants ---------------------------------------------------------------------------

    def names(self) -> list[str]:
        """The tenants, sorted."""
        return sorted(self.entries)

    def add(self, name: str, delta: Difference | str | Path) -> None:
        """Register a tenant, given its delta folder or its difference.

        Raises RecipeError if the name is taken, or for a folder if the base was not loaded from one; PlanError if the
        tenant alone exceeds the budget; ArtifactError or UnsupportedWeight if it is not a delta of this base or does
        not fit it.
        """
        if isinstance(delta, Difference):
            difference = delta
        elif self.read is not None:
            difference = self.read(delta)
        else:
            raise RecipeError(
                f"tenant {name!r}: this base was not loaded from a folder, so no delta folder can belong to it"
            )
        with self.lock:
            if name in self.entries:
                raise RecipeError(f"tenant {name!r} already exists; drop it first")
            check_fits(difference, self.layout, self.model)
            need = None if self.stacks is None else need_of(difference, self.layout, self.model, self.stacks)
            entry = Entry(difference, most_bytes(difference), need)
            if self.budget is not None and self.cost([entry]) > self.budget:
                raise PlanError(f"tenant {name!r} takes {self.cost([entry])} bytes, the budget is {self.budget}")
            self.entries[name] = entry

    def drop(self, name: str) -> None:
        """Remove a tenant once the running step is over; raises RecipeError if there is none of this name."""
        with self.lock:
            self.unload(self.entry(name))
            del self.entries[name]

    def entry(self, name: str) -> Entry:
        """The tenant of this name; raises RecipeError if there is none."""
        if name not in self.entries:
            raise RecipeError(f"no tenant {name!r}{nearest(name, self.entries)}")
        return self.entries[name]

    def loaded(self) -> list[str]:
        """The tenants in memory, the least recently used first."""
        found = [name for name, entry in self.entries.items() if entry.resident is not None]
        return sorted(found, key=lambda name: self.entries[name].used)

    def delta_bytes(self) -> int:
        """Bytes of the deltas in memory, including free slots."""
        stacked = 0 if self.stacks is None else self.stacks.nbytes()
        return stacked + sum(e.resident.nbytes() for e in self.entries.values() if e.resident is not None)

    def nbytes(self) -> int:
        """Bytes of the base and of the deltas in memory."""
        held = {id(t): int(t.nbytes) for t in (*self.model.parameters(), *self.model.buffers())}
        return sum(held.values()) + self.delta_bytes()

    def fits(self, names: Sequence[str]) -> bool:
        """Whether these tenants fit the budget together."""
        entries = [self.entry(name) for name in set(names)]
        if self.budget is None or (self.stacks is not None and all(entry.resident is not None for entry in entries)):
            return True
        return self.cost(entries) <= self.budget

    def cost(self, entries: Sequence[Entry]) -> int:
        """Bytes of these tenants together; on a GPU, as in stacks made for them alone, plus the rest."""
        if self.stacks is None:
            return sum(entry.nbytes() for entry in entries)
        needs = [entry.need for entry in entries if entry.need is not None]
        held = [entry.resident.nbytes() for entry in entries if entry.resident is not None]
        rest = [entry.need.rest for entry in entries if entry.need is not None and entry.resident is None]
        return self.stacks.bytes_for(needs) + sum(held) + sum(rest)

    def explain(self) -> dict[str, dict[str, str]]:
        """For every tenant in memory: module -> how the tenant's difference is computed there."""
        return {name: self.explained(self.entries[name].resident) for name in self.loaded()}

    def explained(self, resident: Resident | None) -> dict[str, str]:
        """Module -> how a tenant's difference is computed there; empty for a tenant that is not in memory."""
        if resident is None:
            return {}
        said: dict[str, str] = {}
        for group, shared in resident.shared.items():
            for module, part in zip(group, shared.parts, strict=True):
                if shared.codes is not None or part is not None:
                    said[module] = (shared.codes or part).describe()  # type: ignore[union-attr]
        said |= {module: " + ".join(slot.describe() for slot in slots) for module, slots in resident.slots.items()}
        said |= {module: f"looked up in {part.describe()}" for module, part in resident.looked_up.items()}
        for which, own in own_of(resident).items():
            ways = f"own {' and '.join(own)}, {self.ways[which]}"
            said[which[0]] = ", ".join(filter(None, (ways, said.get(which[0]))))
        return said

    # -- in and out of memory --------------------------------------------------------------------------

    def load(self, names: Sequence[str]) -> dict[str, Resident]:
        """Load these tenants into memory and return them; others are unloaded if the budget requires it.

        Raises PlanError if they do not fit the budget together.
        """
        if not self.fits(names):
            total = self.cost([self.entry(name) for name in set(names)])
            raise PlanError(
                f"the {len(set(names))} tenants of this batch take {total} bytes, the budget is {self.budget}"
            )
        self.clock += 1
        for name in names:
            self.entry(name).used = self.clock
        if self.stacks is not None:
            self.make_slots(self.stacks, names)
        found: dict[str, Resident] = {}
        for name in names:
            entry = self.entries[name]
            if entry.resident is None:
                if self.stacks is None:
                    self.make_room(entry.most, names)
                entry.resident = make_resident(entry.difference, self.layout, self.model, entry.need)
                self.hook(entry.resident)
            found[name] = entry.resident
        return found

    def make_room(self, nbytes: int, keep: Sequence[str]) -> None:
        """Unload the least recently used tenants, except those in `keep`, until `nbytes` more fit the budget."""
        if self.budget is None:
            return
        for name in self.loaded():
            if self.delta_bytes() + nbytes <= self.budget:
                return
            if name not in keep:
                self.unload(self.entries[name])

    def make_slots(self, stacks: Stacks, names: Sequence[str]) -> None:
        """Unload the least recently used tenants until these fit, and make slots for those not in memory."""
        missing = [self.entries[name].need for name in names if self.entries[name].resident is None]
        if not missing:
            return
        for name in self.loaded():
            together = self.cost([self.entries[each] for each in {*self.loaded(), *names}])
            if self.budget is None or together <= self.budget:
                break
            if name not in names:
                self.unload(self.entries[name])
        stacks.fit([need for need in missing if need is not None], exact=self.budget is not None)
        self.last = None  # slot numbers may have changed

    def unload(self, entry: Entry) -> None:
        """Remove a tenant from memory; it stays registered."""
        if entry.resident is not None:
            release(slot for slots in entry.resident.slots.values() for slot in slots)
        entry.resident = self.last = None

    def hook(self, resident: Resident) -> None:
        """Hook the modules in which a tenant differs, so that they ask the running step what to add."""
        for group in resident.shared:
            for name in group:
                self.hook_module(name, "linear", linear_hook(self.current, self.layout, name))
        for name in resident.slots:
            self.hook_module(name, "linear", linear_hook(self.current, self.layout, name))
        for name in resident.looked_up:
            self.hook_module(name, "lookup", lookup_hook(self.current, name))
        for which, own in own_of(resident).items():
            name = which[0]
            if which not in self.ways:
                self.ways[which] = way_of(self.model.get_submodule(name), list(own), self.layout.given[name])
            if self.ways[which] != "rowwise":
                self.hook_module(name, "own", own_hook(self.current, name, self.ways))

    def hook_module(self, name: str, kind: str, hook: Any) -> None:
        """Register a hook once; hooks that replace an output run before those that add to it."""
        if (name, kind) not in self.hooked:
            self.hooked.add((name, kind))
            self.model.get_submodule(name).register_forward_hook(hook, prepend=kind == "own")

    def current(self) -> Step | None:
        """The step of the running forward pass, or None."""
        return self.step

    # -- computing -----------------------------------------------------------------------------------------

    def __call__(
        self,
        input_ids: Tensor,
        tenants: Sequence[str | None],
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        **options: Any,
    ) -> Any:
        """The model's output for `input_ids` [B, S], where each row is computed as by its tenant.

        Positions are derived from the mask [B, past + S] unless they are given. Raises RecipeError for unknown tenants
        and for a wrong number of names, PlanError if the tenants do not fit the budget together.
        """
        if len(tenants) != len(input_ids):
            raise RecipeError(f"tenants: {len(tenants)} names for {len(input_ids)} rows")
        if attention_mask is not None and position_ids is None:
            position_ids = positions(attention_mask)[:, -input_ids.shape[1] :]
        with self.lock, torch.inference_mode(), self.stepping(tenants):
            return self.model(input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options)

    @contextmanager
    def stepping(self, tenants: Sequence[str | None]) -> Iterator[None]:
        """A context in which the model computes each row as its tenant."""
        found = self.load([name for name in dict.fromkeys(tenants) if name is not None])
        owners = tuple(None if name is None else found[name] for name in tenants)
        if self.last is None or self.last[0] != owners:
            self.last = (owners, self.planned(owners))
        self.step = self.last[1]
        try:
            with self.step.running():
                yield
        finally:
            self.step = None

    def planned(self, owners: Sequence[Resident | None]) -> Step:
        """The step for a batch with one owner per row; None stands for the base."""
        numbers: dict[Resident, list[int]] = {}
        for row, owner in enumerate(owners):
            if owner is not None:
                numbers.setdefault(owner, []).append(row)
        device = next(self.model.parameters()).device
        step = Step(Batch.of(numbers, device) if numbers else None, len(owners), device)
        own = {which for owner in numbers for which in own_of(owner)}
        for name in sorted({which[0] for which in own if self.ways[which] == "rowwise"}):
            step.stack(name, self.model.get_submodule(name), len(self.layout.given[name].shape))
        return step

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        tenants: Sequence[str | None],
        max_new_tokens: int,
        stop: int | None = None,
    ) -> list[list[int]]:
        """Generate greedily for every prompt with its tenant, up to `max_new_tokens` and without the token `stop`.

        Rows are sorted by tenant, so that in every step the rows of a tenant are consecutive.
        """
        order = sorted(range(len(prompts)), key=lambda row: (tenants[row] is not None, tenants[row] or ""))
        names = [tenants[row] for row in order]
        ids, mask = left_padded([list(prompts[row]) for row in order], next(self.model.parameters()).device)
        cache, found = None, []
        for _ in range(max_new_tokens):
            out = self(ids, names, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1)
            cache = out.past_key_values
            ids = out.logits[:, -1].argmax(-1, keepdim=True)
            found.append(ids)
            mask = torch.cat((mask, mask.new_ones(len(mask), 1)), 1)
            if stop is not None and bool((torch.cat(found, 1) == stop).any(1).all()):
                break
        made = torch.cat(found, 1).tolist() if found else [[] for _ in prompts]
        by_row = dict(zip(order, made, strict=True))
        return [until(by_row[row], stop) for row in range(len(prompts))]


def own_of(resident: Resident) -> dict[OwnOf, Mapping[str, Tensor]]:
    """The tensors with which a tenant replaces the base's, keyed by module and parameter names."""
    return {(name, *own): own for name, own in resident.own.items()}


def until(tokens: list[int], stop: int | None) -> list[int]:
    """The tokens before the first `stop`."""
    return tokens[: tokens.index(stop)] if stop in tokens else tokens


def positions(mask_BT: Tensor) -> Tensor:
    """The position of every token, [B, T], counted from the first token that is not padding."""
    return (mask_BT.long().cumsum(1) - 1).clamp(min=0)


def left_padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """The rows padded on the left with token 0 to one length, and a mask that is 1 where there is no padding."""
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + list(row) for row in rows], device=device)
    mask = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=device)
    return ids, mask
