"""A block in memory: its sites in dataflow order, and the tokens that walk through it.

A site's input depends only on the sites before it, so statistics are gathered per distinct input, by
re-running the block up to that input with the weights rewritten so far: none is stale, none is taken twice.
The experts of one layer do not depend on each other, so they are measured together, as many as fit a budget.
Shape suffixes: B batch, T tokens, D hidden, I inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CalibrationError, UnsupportedWeight
from compress.model.anatomy import Place
from compress.model.experts import Products
from compress.model.memo import Key, Memo
from compress.model.memory import lasting, passing
from compress.model.site import DeltaSite, Site
from compress.model.travellers import Travellers
from compress.stats import Collector, Statistic, Statistics, finite
from compress.team import ALONE, Parcel, Team
from compress.weights import External

TOGETHER = 1 << 30  # bytes of statistics of independent experts held at once; one may be larger
WIDEST = 2  # times the hidden state: what is wider is computed again rather than kept
Group = list[Site]
Heard = Callable[[str, Tensor], None]
Around = Callable[[], AbstractContextManager[None]]
Inputs = dict[str, list[Tensor]]  # by key, of one batch, each occurrence in order


class Stop(Exception):
    """Ends a forward once what was wanted has been seen."""


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The one input of a linear map, however it was passed."""
    return torch.as_tensor(args[0] if args else next(iter(kwargs.values())))


class Block:
    """One block with its sites; `drift` is the probe's relative distance from the dense model after `advance`."""

    def __init__(
        self,
        name: str,
        index: int,
        module: nn.Module,
        places: Sequence[Place],
        batches: Sequence[Travellers],
        probe: Travellers,
        dense: Travellers,
        last: bool = False,
        twins: Sequence[Travellers] = (),
        live: bool = False,
        base: Mapping[str, External] | None = None,
        team: Team = ALONE,
    ) -> None:
        """`dense` is the probe on its way through the dense model; it is moved through this block at once.

        `twins` are the batches once more, on their way through the dense model, for what compares the two.
        A `live` block is of a model that stays in memory and goes on computing as it was made to. `base` holds, by
        site, the matrices of the model that this one was fine-tuned from: then only the differences are rewritten.
        Of a `team`, each process has the block, and batches and twins of its own.
        """
        self.twins, self.live, self.team = twins, live, team
        self.name, self.index, self.module, self.last = name, index, module, last
        self.batches, self.probe, self.dense = batches, probe, dense
        self.drift = 0.0
        self.overwritten = False  # whether the block writes over what its sites have read
        inside = {f"{name}.{path}".rstrip("."): part for path, part in module.named_modules()}
        self.sites = {
            p.site: Site(p.site, inside[p.module], p)
            if base is None
            else DeltaSite(p.site, inside[p.module], p, base[p.site])
            for p in places
        }
        self.stacks = {p.peers: getattr(inside[p.module], p.parameter).data for p in places if p.expert is not None}
        self.turned = {p.peers: p.transposed for p in places if p.expert is not None}
        self.keyed: dict[str, Group] = {}  # by what tells an input from others: a module, or an expert of a stack
        for site in self.sites.values():
            self.keyed.setdefault(key_of(site), []).append(site)
        self.heard: dict[str, int] = {}  # how often each input occurred while the probe passed
        self.unseen = set(self.stacks)  # stacks of experts of which no product was seen
        self.memo = Memo(module)
        held = {child: f"{name}.{child}." for child, _ in module.named_children()}
        self.inner = {
            child: {site.name for site in self.sites.values() if site.place.module.startswith(prefix)}
            for child, prefix in held.items()
        }
        self.groups = self._groups()

    # -- who reads what ----------------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        """Sites that read the very same tensor, in the order the forward reaches them; without those that are idle."""
        seen: list[tuple[Tensor, Group]] = []
        placed: set[str] = set()

        def heard(key: str, x: Tensor) -> None:
            self.unseen.discard(self.keyed[key][0].place.peers)
            self.heard[key] = self.heard.get(key, 0) + 1
            if key in placed:
                return
            placed.add(key)
            group = next((group for read, group in seen if read is x), None)
            if group is None:
                seen.append((x, list(self.keyed[key])))
            else:
                group += self.keyed[key]

        held = {child: [self.sites[name] for name in names] for child, names in self.inner.items()}
        matrices = {
            child: [site.module for site in sites if site.whole and not site.module._forward_pre_hooks]
            for child, sites in held.items()
        }  # what is heard of a hooked input has been through its hook, which would be called once more
        with self._listening(self.keyed, heard), self.memo.watched(matrices):
            self.dense.hidden_BTD = self.dense.through(self.module, self.index)
        groups = [group for _, group in seen]
        groups += [self.keyed[key] for key in self.keyed if key not in placed]  # experts not visited, unused modules
        by_peers: dict[str, list[Group]] = {}
        for group in groups:  # what the first expert does second comes after what the last does first
            by_peers.setdefault(peers_of(group), []).append(group)
        ordered = [group for together in by_peers.values() for group in sorted(together, key=expert_of)]
        busy = ([site for site in group if not site.idle] for group in ordered)
        return [group for group in busy if group]

    @contextmanager
    def _listening(self, keys: Iterable[str], heard: Heard) -> Iterator[None]:
        """Call `heard(key, x)` for every input of the sites under `keys` while the block runs."""
        with ExitStack() as stack:
            wanted: set[str] = set()
            for key in keys:
                site = self.keyed[key][0]
                if not site.whole:
                    wanted.add(key)
                    continue
                hook = site.module.register_forward_pre_hook(reporter(key, heard), with_kwargs=True)
                stack.callback(hook.remove)
            if wanted:

                def seen(name: str, expert: int, x_TI: Tensor) -> None:
                    if f"{name}[{expert}]" in wanted:
                        heard(f"{name}[{expert}]", x_TI)

                stack.enter_context(Products(self.stacks, self.turned, seen))
            yield

    # -- measuring ---------------------------------------------------------------------------------

    def stages(self, groups: Sequence[Group], size: Callable[[Group], int]) -> list[list[Group]]:
        """The groups in order; those of independent experts together while `size`, in bytes, sums to TOGETHER."""
        by_peers: dict[str, list[Group]] = {}
        for group in groups:
            by_peers.setdefault(peers_of(group), []).append(group)
        stages: list[list[Group]] = []
        for together in by_peers.values():
            held = 0
            for group in together:
                held += size(group)
                if group is together[0] or held > TOGETHER:
                    stages.append([])
                    held = size(group)
                stages[-1].append(group)
        return stages

    def collect(self, groups: Sequence[Group], kinds: Iterable[type[Statistic]]) -> None:
        """Measure the inputs of `groups` in one pass over the calibration tokens.

        Raises CalibrationError if tokens are missing, or an input never occurs or is not finite.
        """
        kinds = tuple(kinds)
        leaders = {key_of(group[0]): group[0] for group in groups}
        collectors = {
            key: Collector(kinds, site.shape[1], site.original.data.device, self.team, turn)
            for turn, (key, site) in enumerate(leaders.items())
        }
        given = False
        for dense, found in self._inputs_of_all(leaders, any(kind.paired for kind in kinds)):
            with passing(watch=False):
                feed(collectors, found, dense)
            given = True
            del dense, found  # else they live on while the next forward runs
        if not given:
            first = groups[0][0].name
            raise CalibrationError(f"{first}: {kinds[0].__name__} needs calibration data, none was given")
        self._check_heard(leaders, collectors)
        for group in groups:
            site, collector = group[0], collectors[key_of(group[0])]
            stats = collector.finish(site.name) if collector.tokens else Statistics({}, 0)
            for each in group:
                each.stats = stats

    def _inputs_of_all(self, leaders: dict[str, Site], paired: bool) -> Iterator[tuple[Inputs, Inputs]]:
        """What every process measures, in the order of the batches, which are dealt round; see `_inputs_of_own`."""
        own = self._inputs_of_own(leaders, paired)
        given = True
        while given:
            given = False
            for counts, tensors in self.team.share(lambda: counted(next(own, None))):
                if counts is not None:
                    yield recounted(counts, tensors)
                    given = True

    def _inputs_of_own(self, leaders: dict[str, Site], paired: bool) -> Iterator[tuple[Inputs, Inputs]]:
        """What the batches of this process bring to the dense block, if asked and to no expert, and to this block."""
        last = self._last(leaders)
        unrouted = [key for key, site in leaders.items() if not site.place.routed]
        first = min(self.groups.index(self.group_of(site)) for site in leaders.values())
        ends = [] if last is None else [t for t in self.memo.tails.values() if t.module is leaders[last].module]
        tail = None if self.last and first == len(self.groups) - 1 else next(iter(ends), None)

        def run(i: int, batch: Travellers, part: Travellers) -> tuple[Inputs, Inputs]:
            dense: Inputs = {}
            if paired:
                with self.as_original():
                    dense = self.inputs(self.twins[i].part(part.windows), unrouted, last)
            if part.shape != batch.shape:
                self.memo.part(place_of(i, part))
            found = self.inputs(part, leaders, last, lambda: self.remembered(i, part, first))
            for x in found.get(str(last), ()):
                if tail is not None and x.shape[-1] <= WIDEST * part.shape[-1]:
                    self.memo.keep_read(place_of(i, part), tail, x, self._pending(first))
            return dense, found

        for i, batch in enumerate(self.batches):
            yield from batch.in_parts(partial(run, i, batch))

    def inputs(
        self, travellers: Travellers, keys: Iterable[str], last: str | None, around: Around = nullcontext
    ) -> Inputs:
        """What these windows bring to each input of `keys` that they reach, by a forward inside `around`.

        It ends with the input `last`.
        """
        found: dict[str, list[tuple[Tensor, int]]] = {}

        def heard(key: str, x: Tensor) -> None:
            x = x.clone() if self.overwritten or x.is_inference() else x
            found.setdefault(key, []).append((x, version_of(x)))
            if key == last:
                raise Stop

        with around(), self._listening(keys, heard), suppress(Stop):
            travellers.through(self.module, self.index)
        if any(version_of(x) != version for inputs in found.values() for x, version in inputs):
            self.overwritten = True  # so copies are taken, now and from now on
            return self.inputs(travellers, keys, last, around)
        return {key: [x for x, _ in inputs] for key, inputs in found.items()}

    def group_of(self, site: Site) -> Group:
        """The sites that read the same input as this one."""
        return next(group for group in self.groups if site in group)

    def remembered(self, i: int, part: Travellers, first: int) -> AbstractContextManager[None]:
        """Run windows of batch `i` without computing again what no site of the groups from `first` on can change."""
        pending = [site for group in self.groups[first:] for site in group]
        done = [
            child for child, inside in self.inner.items() if inside and not any(site.name in inside for site in pending)
        ]
        return self.memo.used(place_of(i, part), done, self._pending(first))

    def _pending(self, first: int) -> list[nn.Parameter]:
        """What the groups from `first` on may still change."""
        return [getattr(site.module, site.place.parameter) for group in self.groups[first:] for site in group]

    def targets(self) -> list[Tensor]:
        """What the dense block makes of each batch's twin, [B, T, D]; costs a copy of the hidden states."""
        with self.as_original():
            return [lasting(twin.through(self.module, self.index)) for twin in self.twins]

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """The block computes with its original weights for a while."""
        with ExitStack() as stack:
            for site in self.sites.values():
                stack.enter_context(site.as_original())
            yield

    def _last(self, leaders: dict[str, Site]) -> str | None:
        """The input after which nothing more is to be heard, or None where a forward must run to its end.

        That is the last in order, if each occurs once; modules of experts are called in an order nobody knows.
        """
        apart = any(site.place.routed and site.place.expert is None for site in leaders.values())
        again = any(self.heard.get(key, 0) > 1 for key in leaders)
        return None if apart or again else list(leaders)[-1]

    def _check_heard(self, leaders: dict[str, Site], collectors: dict[str, Collector]) -> None:
        """Raise if an input never occurred, unless it is an expert's that the router did not choose."""
        for key, site in leaders.items():
            if site.place.peers in self.unseen:
                raise UnsupportedWeight(
                    f"{site.name}: what these experts are given cannot be seen; only data-free passes"
                )
            if not collectors[key].tokens and not site.place.routed:
                raise CalibrationError(f"{site.name}: no calibration token reaches it")

    def move(self, batches: Iterable[Travellers]) -> None:
        """Move batches through the block as it now is, unless nothing will read them.

        Raises CalibrationError if the output is not finite, naming the first site that read or gave what is not.
        """
        for travellers in batches:
            if self.last and travellers is not self.probe:
                continue
            moved = self._moved(travellers)
            if not finite(moved):
                raise CalibrationError(f"{self.name}: its output is not finite{self._culprit(travellers)}")
            travellers.hidden_BTD = moved

    def _moved(self, travellers: Travellers) -> Tensor:
        """The hidden states behind the block; what was kept of the batch is used, and let go."""
        i = next((i for i, batch in enumerate(self.batches) if batch is travellers), None)
        if i is None or not self.memo.kept:
            return travellers.through(self.module, self.index)

        def run(part: Travellers) -> Tensor:
            with self.memo.used(place_of(i, part), (), ()):
                return part.through(self.module, self.index)

        outs = list(travellers.in_parts(run))
        self.memo.forget(i)
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def advance(self, batches: Sequence[Travellers] | None = None) -> None:
        """Move `batches`, by default all, and the probe through the block as it now is; sets `drift`.

        Raises CalibrationError like `move`.
        """
        if self.twins and not self.last:
            with self.as_original():
                self.move(self.twins)
        self.move((*(self.batches if batches is None else batches), self.probe))
        dense = self.dense.hidden_BTD.float()
        self.drift = float((self.probe.hidden_BTD.float() - dense).norm() / dense.norm())

    def close(self) -> None:
        """Let go of weights and windows, so that whoever still holds this block does not hold their memory."""
        self.memo.forget()
        self.batches, self.twins = (), ()
        for site in self.sites.values() if not self.live else ():
            site.release()
        self.sites, self.keyed, self.groups, self.stacks = {}, {}, [], {}

    def _culprit(self, travellers: Travellers) -> str:
        """`; first at SITE` for the first site whose input is not finite, or nothing."""
        first: list[str] = []

        def heard(key: str, x: Tensor) -> None:
            if not finite(x):
                first.append(self.keyed[key][0].name)
                raise Stop

        with self._listening(self.keyed, heard), suppress(Stop):
            travellers.through(self.module, self.index)
        return f"; the first input that is not is that of {first[0]}" if first else ""


def place_of(batch: int, part: Travellers) -> Key:
    """Which windows of which batch."""
    return batch, part.windows.start, part.windows.stop


def version_of(x: Tensor) -> int:
    """How often a tensor was written to; nobody counts in inference mode."""
    return 0 if x.is_inference() else x._version


def feed(collectors: Mapping[str, Collector], found: Inputs, dense: Inputs) -> None:
    """Add inputs to what is known of them, with the same of the dense model where there are any."""
    for key, inputs in found.items():
        for x, dense_x in zip(inputs, chain(dense.get(key, ()), repeat(None)), strict=False):
            collectors[key].update(x, dense_x)


def counted(measured: tuple[Inputs, Inputs] | None) -> Parcel:
    """Inputs as how many there are of each, and all of them in a row; nothing of nothing."""
    if measured is None:
        return None, []
    counts = [[(key, len(xs)) for key, xs in inputs.items()] for inputs in measured]
    return counts, [x for inputs in measured for xs in inputs.values() for x in xs]


def recounted(counts: Sequence[Sequence[tuple[str, int]]], tensors: list[Tensor]) -> tuple[Inputs, Inputs]:
    """The inputs that were counted; they are taken out of `tensors`."""
    tensors.reverse()
    dense, found = ({key: [tensors.pop() for _ in range(count)] for key, count in each} for each in counts)
    return dense, found


def key_of(site: Site) -> str:
    """What tells the input of a site from others."""
    place = site.place
    return site.name if place.expert is None else f"{place.peers}[{place.expert}]"


def peers_of(group: Group) -> str:
    """What groups share that can be measured together: experts do, everything else is alone."""
    return group[0].place.peers if group[0].place.routed else key_of(group[0])


def expert_of(group: Group) -> int:
    """The expert of a stack that a group belongs to; 0 if it is none."""
    return group[0].place.expert or 0


def reporter(key: str, heard: Heard) -> Any:
    """A forward pre-hook that hands on the input of a module."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard(key, input_of(args, kwargs))

    return hook
