"""The pass manager: applies a list of passes to a model block by block and measures the statistics that they need."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from itertools import groupby, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import CalibrationError, CompressError, RecipeError
from compress.events import BatchHalved, Event, Fallback, Starved, StatisticsCollected, WeightRewritten
from compress.model.block import Block
from compress.model.experts import one_by_one
from compress.model.globs import matches
from compress.model.memory import peak_bytes
from compress.model.site import Site
from compress.model.travellers import batched, tokens_at_once, unpadded
from compress.model.walk import LiveWalk
from compress.model.whole import Whole
from compress.passes.base import (
    BlockPass,
    Budget,
    Pass,
    Reshape,
    SitePass,
    Sparsity,
    WeightPass,
    needs_twins,
    windows_at_once,
)
from compress.passes.budget import allocations
from compress.passes.masks import mask_statistics
from compress.stats import Statistic, finite
from compress.team import ALONE, Parcel, Team
from compress.weights import Weight

SITE_EVENTS = {kind.__name__: kind for kind in (Fallback, Starved, WeightRewritten)}
Work = tuple[list[Site], list[Site]]  # a group of sites, and those of them that one process rewrites together


def ignore(event: Event) -> None:
    """An event sink that drops every event."""
    del event


class PassManager:
    """Applies `passes` in order to every site of every block.

    A `BlockPass` takes the whole block, so the passes before it first finish on all sites of the block, and those after
    it start then. `ordering` is `site` (the statistics of each distinct input are measured after everything before it
    was rewritten, so each site sees the compressed prefix exactly), `block` (all statistics of a block come from one
    forward pass with its dense weights, as in published code) or `dense` (like `block`, and the blocks before it are
    dense too, so errors do not propagate into the statistics).
    """

    def __init__(
        self,
        passes: Sequence[Pass],
        emit: Callable[[Event], None] = ignore,
        ordering: str = "site",
        budgets: Mapping[int, Mapping[str, Sparsity]] | None = None,
        team: Team = ALONE,
    ) -> None:
        """`budgets` is what `allocations` returned for these passes; with it, the budgets among them are not run again.

        Each process of a `team` rewrites its share of the sites and sends the results to the others.
        """
        if ordering not in ("site", "block", "dense"):
            raise RecipeError(f"ordering {ordering!r} is unknown; allowed: site, block, dense")
        self.all_passes = tuple(passes)
        self.passes = tuple(step for step in passes if isinstance(step, SitePass))
        self.parts = parts(self.passes)
        self.part = range(0)
        self.emit, self.ordering, self.given, self.team = emit, ordering, budgets, team
        self.said: list[Event] = []  # events of the sites that this process is rewriting, to be sent to the others
        self.budgets: Mapping[int, Mapping[str, Sparsity]] = budgets or {}
        self.chosen: dict[str, dict[int, SitePass]] = {}

    @torch.no_grad()  # not inference_mode: tensors made here may end up in a user's model, which may be trained
    def run(self, blocks: Iterable[Block]) -> Iterator[Block]:
        """Rewrite the blocks and yield each; the caller stores a block before asking for the next.

        Raises RecipeError if there is a budget among the passes but no `budgets` were given.
        """
        if self.given is None and not self.budgets and any(isinstance(step, Budget) for step in self.all_passes):
            raise RecipeError(
                "budgets: pass the result of `allocations` to the PassManager before `run`; `apply` computes it itself"
            )
        for block in blocks:
            for part in self.parts:
                self.part = part
                self.rewrite_block(block)
            if self.ordering == "dense":
                with block.as_original():
                    block.move(block.batches)
                block.advance(())
            else:
                block.advance()
            yield block

    @torch.no_grad()
    def apply(self, model: Any, ids_NT: Tensor, mask_NT: Tensor | None = None) -> dict[str, Weight]:
        """Rewrite a transformers model in memory, in place, calibrated on token windows; return the new expressions.

        `mask_NT` is 0 where a window is padded; the padding is cut off before the model sees the window. The first
        window also serves to find which sites share an input. Raises CompressError children, and the model is then
        partly rewritten; use `compress.run` to get a file that is either complete or absent.
        """
        shaping = next((step for step in self.all_passes if isinstance(step, Reshape)), None)
        if shaping is not None:
            raise RecipeError(
                f"{shaping.name} changes the shape of the model and writes a folder; use compress.run for it"
            )
        if not isinstance(ids_NT, Tensor) or ids_NT.ndim != 2 or ids_NT.is_floating_point() or not ids_NT.numel():
            raise CalibrationError("apply needs token ids as an integer tensor [windows, length], not empty")
        windows = unpadded(ids_NT, mask_NT)
        check_tokens(windows, model.get_input_embeddings().num_embeddings)
        found: dict[str, Weight] = {}
        with one_by_one(model), evaluating(model):
            walk = LiveWalk(model)
            walk.fit.tell = lambda windows: self.emit(BatchHalved(windows=windows))
            for step in self.passes:
                for place in walk.anatomy.places.values():
                    if matches(place.site, step.sites):
                        step.check(place.site, place.shape)
            if self.given is None:
                self.budgets = allocations(self.all_passes, Whole(walk, windows, windows[0][:1]))
            self.chosen = {}
            size = tokens_at_once(walk.device), windows_at_once(self.passes)
            batches = [walk.enter(ids_BT) for ids_BT in batched(windows, *size)]
            twins = [walk.enter(ids_BT) for ids_BT in batched(windows if needs_twins(self.passes) else (), *size)]
            for block in self.run(walk.visit(batches, walk.enter(windows[0][:1]), twins=twins)):
                found |= {site.name: site.weight for site in block.sites.values() if site.weight is not site.original}
        return found

    def rewrite_block(self, block: Block) -> None:
        """Apply the current part of the passes to a block: to its sites stage by stage, or to all of them at once."""
        groups = self.selected(block)
        whole = next(
            (step for step in self.passes[self.part.start : self.part.stop] if isinstance(step, BlockPass)), None
        )
        apart = self.ordering == "site" and whole is None
        block.memo.active = (
            apart and len(self.parts) == 1 and all(batch.divisible and batch.store is None for batch in block.batches)
        )
        stages = block.stages(groups, self.nbytes) if apart else [groups] if groups else []
        for stage in stages:
            with nullcontext() if self.ordering == "site" else block.as_original():
                self.measure(block, stage)
            if whole is None:
                self.rewrite_groups(stage)
            else:
                self.rewrite_together(whole, block, [site for group in stage for site in group if self.steps(site)])

    def selected(self, block: Block) -> list[list[Site]]:
        """The groups of a block in which at least one site is selected by a pass of the current part."""
        return [group for group in block.groups if any(self.steps(site) for site in group)]

    def measure(self, block: Block, groups: list[list[Site]]) -> None:
        """Measure the inputs of `groups` in one pass over the calibration tokens."""
        wanted = [g for g in groups if self.statistics(g)]
        if wanted:
            kinds = tuple(dict.fromkeys(kind for group in wanted for kind in self.statistics(group)))
            block.collect(wanted, kinds)
            for group in wanted:
                names = tuple(site.name for site in group)
                tokens = group[0].stats.tokens
                kind_names = tuple(kind.__name__ for kind in kinds)
                self.emit(StatisticsCollected(sites=names, statistics=kind_names, tokens=tokens))

    def rewrite_groups(self, groups: list[list[Site]]) -> None:
        """Rewrite the sites of `groups` and free their statistics.

        Work that can be done independently is divided among the processes of the team, and each process then takes over
        the results of the others. The unit is one site, or all sites of an input if a pass takes these together.
        """
        joint = any(self.passes[i].joint for i in self.part)
        works = [(group, sites) for group in groups for sites in ([group] if joint else [[site] for site in group])]
        owners = self.team.deal([sum(map(cost, sites)) for _, sites in works])
        for rank, parcel in enumerate(self.team.share(lambda: self.rewrite_own(works, owners))):
            if rank != self.team.rank:
                self.take(parcel, {site.name: site for group in groups for site in group})

    def rewrite_own(self, works: Sequence[Work], owners: Sequence[int]) -> Parcel:
        """Rewrite the sites that this process owns, and return the parcel for the other processes."""
        self.said = []
        done: list[Site] = []
        for i, (group, sites) in enumerate(works):
            if owners[i] == self.team.rank:
                self.rewrite_sites(sites)
                done += sites
            if i + 1 == len(works) or works[i + 1][0] is not group:
                group[0].stats.forget()  # a Gram and its factor are the largest tensors in memory
        return self.told(done) if self.team.size > 1 else (None, [])

    def told(self, sites: Sequence[Site]) -> Parcel:
        """The results and the events of the sites that this process has rewritten, as a parcel."""
        tensors: list[Tensor] = []
        told = {site.name: site.told(tensors) for site in sites}
        return {"sites": told, "events": [[type(event).__name__, asdict(event)] for event in self.said]}, tensors

    def take(self, parcel: Parcel, sites: Mapping[str, Site]) -> None:
        """Take over the results of another process for its sites, and emit its events."""
        value, tensors = parcel
        for name, told in value["sites"].items():
            sites[name].take(told, tensors)
        for kind, told in value["events"]:
            self.emit(SITE_EVENTS[kind](**told))

    def rewrite_sites(self, sites: Sequence[Site]) -> None:
        """Apply all passes to one site, then to the next.

        A joint pass takes the sites together, so the passes before it finish on all of them first, and those after it
        start then.
        """
        for joint, run in groupby(self.part, lambda i: self.passes[i].joint):
            numbers = list(run)
            for some in [sites] if joint else [[site] for site in sites]:
                for i in numbers:
                    self.rewrite_peers(i, some)

    def say(self, event: Event) -> None:
        """Emit an event about a site, and remember it for the other processes."""
        self.said.append(event)
        self.emit(event)

    def rewrite_peers(self, index: int, sites: Sequence[Site]) -> None:
        """Apply a pass to those of these sites of one input that it selects, together where it has the same options."""
        peers: dict[SitePass, list[Site]] = {}
        for site in sites:
            if index in self.chosen_for(site):
                peers.setdefault(self.chosen_for(site)[index], []).append(site)
        for step, same in peers.items():
            if isinstance(step, WeightPass):
                self.rewrite(index, step, same)

    def rewrite_together(self, step: BlockPass, block: Block, sites: Sequence[Site]) -> None:
        """Apply a pass to these sites of a block and report each.

        Raises CalibrationError if there are no calibration windows or no twin of each, and otherwise raises like
        `rewrite`.
        """
        if not block.batches or len(block.batches) != len(block.twins):
            raise CalibrationError(
                f"{step.name}: {block.name}: needs calibration windows, and a twin of each in the dense model"
            )
        for site in sites:
            step.check(site.name, site.shape)
        fed = [site for site in sites if not self.starves(step, site)]
        known = {site.name: len(site.fallbacks) for site in fed}
        began = time.monotonic()
        made = step.rewrite(block, fed) if fed else {}
        seconds = (time.monotonic() - began) / max(1, len(fed))
        for site in fed:
            self.put(step, site, made[site.name], known[site.name], seconds)
            site.stats.forget()

    def steps(self, site: Site) -> list[SitePass]:
        """The passes of the current part that select this site."""
        return [step for i, step in self.chosen_for(site).items() if i in self.part]

    def chosen_for(self, site: Site) -> dict[int, SitePass]:
        """The passes that select this site, by index, each with the option value that a budget set for the site."""
        if site.name not in self.chosen:
            chosen = [i for i, step in enumerate(self.passes) if matches(site.name, step.sites)]
            self.chosen[site.name] = {i: self.tuned(i, site.name) for i in chosen}
        return self.chosen[site.name]

    def tuned(self, index: int, name: str) -> SitePass:
        """A pass with the option value that a budget set for this site."""
        step, given = self.passes[index], self.budgets.get(index, {})
        if name not in given or not isinstance(step, WeightPass):
            return step
        options: dict[str, Any] = {step.shared_out: given[name]}
        return replace(step, **options)

    def nbytes(self, group: Sequence[Site]) -> int:
        """Bytes of the statistics that these sites need of their shared input."""
        return sum(kind.nbytes(group[0].shape[1]) for kind in self.statistics(group))

    def statistics(self, group: Iterable[Site]) -> tuple[type[Statistic], ...]:
        """The statistics that the passes on these sites require of their input."""
        return tuple(dict.fromkeys(kind for site in group for step in self.steps(site) for kind in step.requires))

    def rewrite(self, index: int, step: WeightPass, sites: Sequence[Site]) -> None:
        """Apply the pass of this index, with the options that these sites of one input share, and report each.

        Raises CompressError if a result is not finite.
        """
        known = {site.name: len(site.fallbacks) for site in sites}
        for site in sites:
            step.check(site.name, site.shape)
        fed = [site for site in sites if not self.starves(step, site)]
        began = time.monotonic()
        made = step.rewrite_peers(fed) if fed else {}
        made = {site.name: made[site.name] if site.name in made else step.rewrite_unfed(site) for site in sites}
        seconds = (time.monotonic() - began) / len(sites)
        for site in sites:
            self.put(self.chosen_for(site)[index], site, made[site.name], known[site.name], seconds)

    def starves(self, step: SitePass, site: Site) -> bool:
        """Whether too few tokens reach a site for a pass; if so, this is recorded at the site and reported."""
        if not site.starved or not step.requires:
            return False
        site.starving.append(f"{step.name}: {step.unfed}")
        self.say(Starved(site=site.name, step=step.name, tokens=site.stats.tokens, needed=site.needed))
        return True

    def put(self, step: SitePass, site: Site, weight: Weight, known: int, seconds: float) -> None:
        """Give a site its new weight, which took `seconds`; report it, with the fallbacks after the first `known`."""
        site.weight = weight
        if not finite(site.view()):
            raise CompressError(f"{step.name}: {site.name}: the rewritten weight is not finite")
        site.ledger |= mask_statistics(weight)
        site.measure(output=step is self.steps(site)[-1])  # after the last pass only: it costs as much as a solver
        site.errors.append((step.name, site.weight_error))
        for name, reason in site.fallbacks[known:]:
            self.say(Fallback(site=site.name, step=name, reason=reason))
        self.say(
            WeightRewritten(
                site=site.name,
                step=step.name,
                weight=weight.describe(),
                nbytes=weight.nbytes(),
                weight_error=site.weight_error,
                output_error=site.output_error,
                seconds=seconds,
                peak_bytes=peak_bytes(),
            )
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model in eval mode inside the context, then restore the mode of each of its modules."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


def check_tokens(windows: Sequence[Tensor], known: int) -> None:
    """Raise CalibrationError if windows [N, T] contain a token that a model of `known` tokens does not have."""
    for ids_NT in windows:
        strange = ids_NT[(ids_NT < 0) | (ids_NT >= known)]
        if len(strange):
            raise CalibrationError(f"token {int(strange[0])} is unknown to this model")


def cost(site: Site) -> int:
    """The cost of solving a site relative to other sites."""
    rows, columns = site.shape
    return rows * columns * columns


def parts(passes: Sequence[SitePass]) -> list[range]:
    """The indices of the passes in consecutive parts: each `BlockPass` alone, the passes between them together."""
    cuts = [i + behind for i, step in enumerate(passes) if isinstance(step, BlockPass) for behind in (0, 1)]
    edges = sorted({0, *cuts, len(passes)})
    return [range(start, stop) for start, stop in pairwise(edges)]
