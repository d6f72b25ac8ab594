"""A block in memory: its sites in dataflow order, and the tokens that pass through it.

A site's input depends only on the sites before it. Statistics are therefore collected per distinct input, by
re-running the block up to that input with the weights rewritten so far: none is stale, and none is collected twice.
The experts of one layer do not depend on each other, so they are measured together, as many as fit a memory budget.
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

TOGETHER = 1 << 30  # bytes of statistics of independent experts held at once; a single expert may take more
WIDEST = 2  # an input wider than this many times the hidden size is recomputed rather than cached
Group = list[Site]
Heard = Callable[[str, Tensor], None]
Around = Callable[[], AbstractContextManager[None]]
Inputs = dict[str, list[Tensor]]  # the inputs of one batch by key, each occurrence in order


class Stop(Exception):
    """Ends a forward pass once the last wanted input has been seen."""


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The single input of a linear map, passed by position or by keyword."""
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
        """`dense` is a copy of the probe that stays in the dense model; the constructor moves it through this block.

        `twins` are such copies of the batches, for statistics and passes that compare the two models. A `live` block
        belongs to a model that stays in memory and keeps its rewritten weights. `base` maps sites to the matrices of
        the model that this one was fine-tuned from; then only the differences are rewritten. In a `team`, every process
        has the block, but its own batches and twins.
        """
        self.twins, self.live, self.team = twins, live, team
        self.name, self.index, self.module, self.last = name, index, module, last
        self.batches, self.probe, self.dense = batches, probe, dense
        self.drift = 0.0
        self.overwritten = False  # whether the block modifies its sites' inputs in place
        inside = {f"{name}.{path}".rstrip("."): part for path, part in module.named_modules()}
        self.sites = {
            p.site: Site(p.site, inside[p.module], p)
            if base is None
            else DeltaSite(p.site, inside[p.module], p, base[p.site])
            for p in places
        }
        self.stacks = {p.peers: getattr(inside[p.module], p.parameter).data for p in places if p.expert is not None}
        self.turned = {p.peers: p.transposed for p in places if p.expert is not None}
        self.keyed: dict[str, Group] = {}  # sites by the key of their input: a module, or an expert of a stack
        for site in self.sites.values():
            self.keyed.setdefault(key_of(site), []).append(site)
        self.heard: dict[str, int] = {}  # how often each input occurred in the forward pass of the probe
        self.unseen = set(self.stacks)  # stacks of experts with which no product was observed
        self.memo = Memo(module)
        held = {child: f"{name}.{child}." for child, _ in module.named_children()}
        self.inner = {
            child: {site.name for site in self.sites.values() if site.place.module.startswith(prefix)}
            for child, prefix in held.items()
        }
        self.groups = self._groups()

    # -- who reads what ----------------------------------------------------------------------------

    def _groups(self) -> list[Group]:
        """Groups of sites that read the same tensor, in the order of the forward pass; idle sites are left out.

        Runs the probe's dense copy through the block.
        """
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
        }  # not hooked modules: their recorded input has already been through the hook, which would run again
        with self._listening(self.keyed, heard), self.memo.watched(matrices):
            self.dense.hidden_BTD = self.dense.through(self.module, self.index)
        groups = [group for _, group in seen]
        groups += [self.keyed[key] for key in self.keyed if key not in placed]  # unvisited experts, unused modules
        by_peers: dict[str, list[Group]] = {}
        for group in groups:  # an expert's second matrix comes after the first matrices of all experts
            by_peers.setdefault(peers_of(group), []).append(group)
        ordered = [group for together in by_peers.values() for group in sorted(together, key=expert_of)]
        busy = ([site for site in group if not site.idle] for group in ordered)
        return [group for group in busy if group]

    @contextmanager
    def _listening(self, keys: Iterable[str], heard: Heard) -> Iterator[None]:
        """Inside, call `heard(key, x)` for every input of the sites under `keys` when the block runs."""
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
        """The groups in order; groups of independent experts share a stage while their `size`s sum to TOGETHER."""
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

        Raises CalibrationError if there are no tokens, or an input never occurs or is not finite; UnsupportedWeight if
        the inputs of experts cannot be observed.
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
            del dense, found  # otherwise they stay in memory during the next forward pass
        if not given:
            first = groups[0][0].name
            raise CalibrationError(f"{first}: {kinds[0].__name__} needs calibration data, but none was given")
        self._check_heard(leaders, collectors)
        for group in groups:
            site, collector = group[0], collectors[key_of(group[0])]
            stats = collector.finish(site.name) if collector.tokens else Statistics({}, 0)
            for each in group:
                each.stats = stats

    def _inputs_of_all(self, leaders: dict[str, Site], paired: bool) -> Iterator[tuple[Inputs, Inputs]]:
        """The inputs that all processes record, in the order of the batches, which are dealt round-robin.

        See `_inputs_of_own`.
        """
        own = self._inputs_of_own(leaders, paired)
        given = True
        while given:
            given = False
            for counts, tensors in self.team.share(lambda: counted(next(own, None))):
                if counts is not None:
                    yield recounted(counts, tensors)
                    given = True

    def _inputs_of_own(self, leaders: dict[str, Site], paired: bool) -> Iterator[tuple[Inputs, Inputs]]:
        """The inputs that this process's batches give in the dense block and in this block as it now is.

        Those of the dense block are recorded only if `paired`, and never those of experts.
        """
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
        """The inputs of `keys` that these windows reach, recorded in a forward pass that runs inside `around`.

        The forward pass ends at the input `last`.
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
            self.overwritten = True  # record again, with copies of the inputs from now on
            return self.inputs(travellers, keys, last, around)
        return {key: [x for x, _ in inputs] for key, inputs in found.items()}

    def group_of(self, site: Site) -> Group:
        """The sites that read the same input as this one."""
        return next(group for group in self.groups if site in group)

    def remembered(self, i: int, part: Travellers, first: int) -> AbstractContextManager[None]:
        """Inside, windows of batch `i` run without recomputing children that no group from `first` on can change."""
        pending = [site for group in self.groups[first:] for site in group]
        done = [
            child for child, inside in self.inner.items() if inside and not any(site.name in inside for site in pending)
        ]
        return self.memo.used(place_of(i, part), done, self._pending(first))

    def _pending(self, first: int) -> list[nn.Parameter]:
        """The parameters that passes may still change: those of the groups from `first` on."""
        return [getattr(site.module, site.place.parameter) for group in self.groups[first:] for site in group]

    def targets(self) -> list[Tensor]:
        """The output of the dense block on each batch's twin, [B, T, D]; costs a copy of the hidden states."""
        with self.as_original():
            return [lasting(twin.through(self.module, self.index)) for twin in self.twins]

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Inside, the block computes with its original weights."""
        with ExitStack() as stack:
            for site in self.sites.values():
                stack.enter_context(site.as_original())
            yield

    def _last(self, leaders: dict[str, Site]) -> str | None:
        """The key of the input at which a forward pass may stop, or None if it must run to its end.

        This is the last one in order, if each input occurs only once; experts that are modules of their own may be
        called in any order.
        """
        apart = any(site.place.routed and site.place.expert is None for site in leaders.values())
        again = any(self.heard.get(key, 0) > 1 for key in leaders)
        return None if apart or again else list(leaders)[-1]

    def _check_heard(self, leaders: dict[str, Site], collectors: dict[str, Collector]) -> None:
        """Raise if an input never occurred, unless it is that of an expert that the router did not choose.

        CalibrationError if no token reached a site, UnsupportedWeight if products with experts cannot be observed.
        """
        for key, site in leaders.items():
            if site.place.peers in self.unseen:
                raise UnsupportedWeight(
                    f"{site.name}: the inputs of these experts cannot be observed; use only passes that need no "
                    "calibration data"
                )
            if not collectors[key].tokens and not site.place.routed:
                raise CalibrationError(f"{site.name}: no calibration token reaches it")

    def move(self, batches: Iterable[Travellers]) -> None:
        """Move batches through the block as it now is; after the last block only the probe, as nothing reads the rest.

        Raises CalibrationError if the output is not finite, naming the first site whose input is not.
        """
        for travellers in batches:
            if self.last and travellers is not self.probe:
                continue
            moved = self._moved(travellers)
            if not finite(moved):
                raise CalibrationError(f"{self.name}: its output is not finite{self._culprit(travellers)}")
            travellers.hidden_BTD = moved

    def _moved(self, travellers: Travellers) -> Tensor:
        """The hidden states after the block; uses what is cached of the batch, then frees it."""
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

        Twins are moved through the original block. Raises CalibrationError like `move`.
        """
        if self.twins and not self.last:
            with self.as_original():
                self.move(self.twins)
        self.move((*(self.batches if batches is None else batches), self.probe))
        dense = self.dense.hidden_BTD.float()
        self.drift = float((self.probe.hidden_BTD.float() - dense).norm() / dense.norm())

    def close(self) -> None:
        """Release weights and windows, so that a remaining reference to this block does not keep them in memory."""
        self.memo.forget()
        self.batches, self.twins = (), ()
        for site in self.sites.values() if not self.live else ():
            site.release()
        self.sites, self.keyed, self.groups, self.stacks = {}, {}, [], {}

    def _culprit(self, travellers: Travellers) -> str:
        """The end of an error message that names the first site whose input is not finite; empty if there is none."""
        first: list[str] = []

        def heard(key: str, x: Tensor) -> None:
            if not finite(x):
                first.append(self.keyed[key][0].name)
                raise Stop

        with self._listening(self.keyed, heard), suppress(Stop):
            travellers.through(self.module, self.index)
        return f"; the first input that is not finite is that of {first[0]}" if first else ""


def place_of(batch: int, part: Travellers) -> Key:
    """The cache key of a part: the batch, and the first and last of its windows."""
    return batch, part.windows.start, part.windows.stop


def version_of(x: Tensor) -> int:
    """How often a tensor was written to; 0 in inference mode, where torch does not count."""
    return 0 if x.is_inference() else x._version


def feed(collectors: Mapping[str, Collector], found: Inputs, dense: Inputs) -> None:
    """Add inputs to their collectors, paired with those of the dense model where there are any."""
    for key, inputs in found.items():
        for x, dense_x in zip(inputs, chain(dense.get(key, ()), repeat(None)), strict=False):
            collectors[key].update(x, dense_x)


def counted(measured: tuple[Inputs, Inputs] | None) -> Parcel:
    """Inputs as a parcel: how many there are of each key, and all tensors in one list; empty for None."""
    if measured is None:
        return None, []
    counts = [[(key, len(xs)) for key, xs in inputs.items()] for inputs in measured]
    return counts, [x for inputs in measured for xs in inputs.values() for x in xs]


def recounted(counts: Sequence[Sequence[tuple[str, int]]], tensors: list[Tensor]) -> tuple[Inputs, Inputs]:
    """The inverse of `counted`; the tensors are removed from `tensors`."""
    tensors.reverse()
    dense, found = ({key: [tensors.pop() for _ in range(count)] for key, count in each} for each in counts)
    return dense, found


def key_of(site: Site) -> str:
    """The key of a site's input: its name, or stack and number of its expert."""
    place = site.place
    return site.name if place.expert is None else f"{place.peers}[{place.expert}]"


def peers_of(group: Group) -> str:
    """The key shared by groups that can be measured together: experts of one layer; any other group is alone."""
    return group[0].place.peers if group[0].place.routed else key_of(group[0])


def expert_of(group: Group) -> int:
    """The number of the stacked expert that a group belongs to; 0 if it belongs to none."""
    return group[0].place.expert or 0


def reporter(key: str, heard: Heard) -> Any:
    """A forward pre-hook that passes a module's input to `heard`."""

    def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        heard(key, input_of(args, kwargs))

    return hook
