"""One tenant in memory: its parts, grouped by the input that modules share, and its own tensors by module."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError
from compress.runtime.linear import StoredWeight
from compress.runtime.tenants.coded import Codes, coded, joined
from compress.runtime.tenants.difference import Difference
from compress.runtime.tenants.layout import Layout
from compress.runtime.tenants.part import Part, placed
from compress.runtime.tenants.parts import LARGER, resident
from compress.runtime.tenants.rows import Batch, Rows
from compress.runtime.tenants.slots import Need, Slot, Stacks, terms_of

Group = tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Shared:
    """The differences of the modules that share one input.

    `parts` has one entry per module, None where there is no difference. If all parts can be stacked, `codes` holds them
    as one and all entries of `parts` are None.
    """

    parts: tuple[Part | None, ...]
    codes: Codes | None

    @staticmethod
    def of(parts: Sequence[Part | None]) -> Shared:
        """These parts, stacked into one if possible."""
        codes = joined(parts)
        return Shared(tuple(parts) if codes is None else (None,) * len(parts), codes)

    def held(self) -> list[Part]:
        """The parts that exist."""
        return [self.codes] if self.codes is not None else [part for part in self.parts if part is not None]

    @cached_property
    def kind(self) -> Hashable:
        """A key that tenants must share to be computed together."""
        return self.codes.kind if self.codes is not None else tuple(part and part.kind for part in self.parts)

    @staticmethod
    def together(each: Sequence[Shared], x_NI: Tensor, counts: Sequence[int]) -> Sequence[Tensor | None]:
        """For each module, what is added to its output for the tokens of tenants of one kind, [N, O], or None."""
        codes = [shared.codes for shared in each if shared.codes is not None]
        if codes:
            return coded(codes, x_NI, counts)
        sites = zip(*(shared.parts for shared in each), strict=True)
        return [None if parts[0] is None else parts[0].together(parts, x_NI, counts) for parts in sites]


@dataclass(frozen=True, eq=False)
class Resident:
    """What one tenant keeps in memory.

    `shared` holds the differences of linear layers, by group of modules that share an input; `looked_up` those of
    embeddings, by module; `own` the tensors that replace the base's, by module and parameter; `slots` its places in
    stacks, by module, whose memory is counted with the stacks.
    """

    shared: Mapping[Group, Shared]
    looked_up: Mapping[str, Part]
    own: Mapping[str, Mapping[str, Tensor]]
    slots: Mapping[str, tuple[Slot, ...]] = field(default_factory=dict)

    def nbytes(self) -> int:
        """Bytes that stay in memory, without slots; a tensor that two modules share counts once."""
        parts = [part for shared in self.shared.values() for part in shared.held()] + list(self.looked_up.values())
        held = [tensor for part in parts for tensor in part.tensors()]
        held += [tensor for tensors in self.own.values() for tensor in tensors.values()]
        return sum({id(tensor): int(tensor.nbytes) for tensor in held}.values())


def modules_of(site: str, shape: tuple[int, int], layout: Layout, model: nn.Module) -> list[str]:
    """The modules that compute with the matrix of a site.

    Raises ArtifactError if a difference of this shape does not fit it, and UnsupportedWeight as `Layout.of_site`.
    """
    names = layout.of_site(site, model)
    known, module = layout.holders.get(f"{site}.weight"), model.get_submodule(names[0])
    if isinstance(module, StoredWeight):
        fits = (module.out_features, module.in_features) == shape
    else:
        fits = not known or sorted(getattr(module, known[0][1]).shape) == sorted(shape)
    if not fits:
        raise ArtifactError(f"{site}: the tenant's difference of shape {shape} does not fit the base's matrix")
    return names


def most_bytes(difference: Difference) -> int:
    """The most bytes that a difference takes in memory: integers under a mask may stay without it."""
    forms = [difference.form(site) for site in difference.sites]
    return difference.nbytes + sum(ceil((LARGER - 1) * stored) for tree, stored in forms if masks_codes(tree))


def masks_codes(tree: Mapping[str, Any]) -> bool:
    """Whether a specification has integers under a mask."""
    parts = [*tree.get("terms", ()), *(tree[name] for name in ("left", "right", "values") if name in tree)]
    return (tree["kind"] == "masked" and tree["values"]["kind"] == "quantized") or any(map(masks_codes, parts))


def check_fits(difference: Difference, layout: Layout, model: nn.Module) -> None:
    """Raise ArtifactError or UnsupportedWeight if a difference does not fit the base; reads no tensor."""
    for site in difference.sites:
        rows, columns = difference.form(site)[0]["shape"]
        modules_of(site, (int(rows), int(columns)), layout, model)
    for name in difference.names:
        layout.of_tensor(name, difference.shape(name), model)


def need_of(difference: Difference, layout: Layout, model: nn.Module, stacks: Stacks) -> Need:
    """The memory that a tenant needs on a GPU, from specifications alone; differences of embeddings are not stacked.

    Raises ArtifactError or UnsupportedWeight if the difference does not fit the base.
    """
    seats, rest = {}, difference.nbytes
    for site in difference.sites:
        tree, stored = difference.form(site)
        shape = (int(tree["shape"][0]), int(tree["shape"][1]))
        names = modules_of(site, shape, layout, model)
        looked_up = any(isinstance(model.get_submodule(name), nn.Embedding) for name in names)
        if not looked_up and (found := stacks.seats(site, shape, tree)):
            seats[site] = found
            rest -= stored
    return Need(seats, rest)


def make_resident(difference: Difference, layout: Layout, model: nn.Module, need: Need | None = None) -> Resident:
    """A tenant's difference in the form in which it stays in memory, made one tensor at a time.

    The sites listed in `need` go into free slots of their stacks, which are freed again on failure. Raises
    ArtifactError or UnsupportedWeight if the difference does not fit the base.
    """
    device = next(model.parameters()).device
    parts: dict[str, Part] = {}
    slots: dict[str, tuple[Slot, ...]] = {}
    taken: list[Slot] = []
    try:
        for site in difference.sites:
            weight = difference.weight(site)
            names = modules_of(site, weight.shape, layout, model)
            if need is not None and site in need.seats:
                before = len(taken)
                for term, (stack, rank) in zip(terms_of(weight), need.seats[site], strict=True):
                    taken.append(stack.put(term, rank))
                slots |= dict.fromkeys(names, tuple(taken[before:]))
            else:
                part = resident(weight)
                parts |= dict.fromkeys(names, part if device.type == "cpu" else placed(part, device))
        own = owned(difference, layout, model, device)
    except BaseException:
        release(taken)
        raise
    looked_up = {name: part for name, part in parts.items() if isinstance(model.get_submodule(name), nn.Embedding)}
    groups = {layout.groups[name] for name in parts if name not in looked_up}
    shared = {group: Shared.of([parts.get(name) for name in group]) for group in sorted(groups)}
    return Resident(shared, looked_up, own, slots)


def release(slots: Iterable[Slot]) -> None:
    """Free these slots, each once, since tied modules share theirs."""
    for slot in dict.fromkeys(slots):
        slot.stack.free(slot)


def owned(
    difference: Difference, layout: Layout, model: nn.Module, device: torch.device
) -> dict[str, dict[str, Tensor]]:
    """The tensors with which a tenant replaces the base's, by module and parameter."""
    own: dict[str, dict[str, Tensor]] = {}
    for name in difference.names:
        tensor = difference.tensor(name).detach()
        holders = layout.of_tensor(name, tuple(tensor.shape), model)
        dtype = model.get_submodule(holders[0][0]).get_parameter(holders[0][1]).dtype  # an adapter may keep float32
        tensor = tensor.to(device, dtype, copy=True)
        for module, parameter in holders:
            own.setdefault(module, {})[parameter] = tensor
    return {module: dict(sorted(tensors.items())) for module, tensors in own.items()}


Added = tuple[Rows, Tensor]  # rows, and what is added to them, float32 [n, S, O]


@dataclass(frozen=True, eq=False)
class Alike:
    """Tenants whose differences, for modules that share one input, are of one kind, with their rows."""

    rows: Rows
    numbers: tuple[tuple[int, ...], ...]
    each: tuple[Shared, ...]

    def added(self, x_BSI: Tensor) -> list[Added | None]:
        """For each module, what is added to its output, or None."""
        x_nSI = self.rows.take(x_BSI)
        rows, tokens, _ = x_nSI.shape
        products = Shared.together(self.each, x_nSI.reshape(rows * tokens, -1), [len(n) * tokens for n in self.numbers])
        return [None if y_NO is None else (self.rows, y_NO.unflatten(0, (rows, tokens))) for y_NO in products]


def alike(batch: Batch[Resident], group: Group, device: torch.device) -> list[Alike]:
    """The tenants of a batch that differ in the modules of a group, collected by kind."""
    kinds: dict[Hashable, dict[Shared, Sequence[int]]] = {}
    for owner, numbers in zip(batch.owners, batch.numbers, strict=True):
        shared = owner.shared.get(group)
        if shared is not None:
            kinds.setdefault(shared.kind, {})[shared] = numbers
    found = [Batch.of(kind, device) for kind in kinds.values()]
    return [Alike(some.rows, some.numbers, some.owners) for some in found]
