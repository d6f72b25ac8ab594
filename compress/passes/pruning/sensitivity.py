"""Sparsity where it costs least: the KL of pruning each part of the model alone, measured.

Shape suffixes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.errors import CalibrationError
from compress.model.block import Block, peers_of
from compress.model.divergence import mean_kl
from compress.model.site import Site
from compress.model.whole import Whole
from compress.passes.base import Budget, Pruner, Sparsity
from compress.passes.budget import density

FINE = 16  # steps between two measured fractions
LEAST = 1e-9  # nats; a part whose pruning cannot be seen


@dataclass(frozen=True, kw_only=True)
class Part:
    """Sites that read one input, or all experts of a layer: their parameters, and the cost of each option."""

    sites: tuple[str, ...]
    size: int
    options: tuple[Sparsity, ...]  # from the densest
    costs: tuple[float, ...]  # KL in nats


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Budget, name="sensitivity"):
    """Minimise the sum of what pruning each part alone costs in KL, at the mean sparsity the next pruner asks for.

    A part is the sites that read one input, or all experts of a layer. The pruner itself prunes it at three sparsities,
    the rest stays dense, and the probe runs to the logits: all parts in one reading of the model. Between them the
    logarithm of the KL is interpolated; marginal costs are then made equal. Takes about three times what the pruner
    takes. For n:m each n within the spread is measured, and an n above the pattern's loses its speed on hardware.
    Source: additive damage, LeCun et al., "Optimal Brain Damage", NeurIPS 1989; allocation, Shoham and Gersho,
    "Efficient Bit Allocation for an Arbitrary Set of Quantizers", 1988; measuring the costs in this way is ours.
    """

    spread: Annotated[
        float, Field(ge=0.01, le=0.5, description="furthest that a part may be from the mean sparsity")
    ] = 0.2

    def allocate(self, model: Whole, step: Pruner) -> dict[str, Sparsity]:
        """One sparsity for the sites of each part that `step` selects."""
        tried = self.options_for(step)
        found: list[tuple[tuple[str, ...], int]] = []
        probes: list[Tensor] = []  # of each part, one for each sparsity tried
        batch = model.walk.enter(model.probe_NT)
        for block in model.blocks(step.requires, step.sites):
            probes = [batch.through(block.module, block.index, hidden) for hidden in probes]
            for sites in parts_of(block, step.sites):
                found.append((tuple(s.name for s in sites), sum(s.shape[0] * s.shape[1] for s in sites)))
                probes += [pruned_output(block, sites, replace(step, sparsity=sparsity)) for sparsity in tried]
                for site in sites:
                    site.stats.forget()
        costs: list[float] = []
        for hidden in probes:
            batch.hidden_BTD = hidden
            cost = mean_kl(model.walk.dense_logits, model.walk.leave(batch))
            if not math.isfinite(cost):
                first = found[len(costs) // len(tried)][0][0]
                raise CalibrationError(f"{self.name}: pruning {first} alone makes the logits not finite")
            costs.append(max(LEAST, cost))
        parts = [
            curve(names, size, tried, costs[i * len(tried) : (i + 1) * len(tried)])
            for i, (names, size) in enumerate(found)
        ]
        chosen = spend(parts, density(step.sparsity))
        return {site: sparsity for part, sparsity in zip(parts, chosen, strict=True) for site in part.sites}

    def options_for(self, step: Pruner) -> tuple[Sparsity, ...]:
        """The sparsities to measure, from the densest: a fraction and both ends of its spread, or every n in it."""
        if isinstance(step.sparsity, str):
            kept, of = map(int, step.sparsity.split(":"))
            near = [n for n in range(of - 1, 0, -1) if abs(n - kept) <= max(1.0, self.spread * of)]
            return tuple(f"{n}:{of}" for n in near)
        ends = (max(0.0, step.sparsity - self.spread), step.sparsity, min(1.0, step.sparsity + self.spread))
        return tuple(dict.fromkeys(round(end, 4) for end in ends)) if 0 < step.sparsity < 1 else (step.sparsity,)


def parts_of(block: Block, glob: str) -> list[list[Site]]:
    """The selected sites of a block by what they read; the experts of a layer together."""
    parts: dict[str, list[Site]] = {}
    for group in block.groups:
        parts.setdefault(peers_of(group), []).extend(site for site in group if fnmatchcase(site.name, glob))
    return [sites for sites in parts.values() if sites]


def pruned_output(block: Block, sites: Sequence[Site], step: Pruner) -> Tensor:
    """The probe behind a block of which these sites alone are pruned; the block is then as it was."""
    for site in sites:
        site.weight = step.rewrite_unfed(site) if site.starved and step.requires else step.rewrite(site)
    moved = block.probe.through(block.module, block.index)
    for site in sites:
        site.weight = site.original
    return moved


def curve(sites: tuple[str, ...], size: int, tried: Sequence[Sparsity], costs: Sequence[float]) -> Part:
    """A part with its costs, those of fractions interpolated between the measured ones, in their logarithm."""
    if isinstance(tried[0], str) or len(tried) == 1:
        return Part(sites=sites, size=size, options=tuple(tried), costs=tuple(costs))
    options: list[Sparsity] = []
    fine: list[float] = []
    for i in range(len(tried) - 1):
        (left, low), (right, high) = [(1 - density(tried[j]), math.log(costs[j])) for j in (i, i + 1)]
        shares = [k / FINE for k in range(FINE + (i == len(tried) - 2))]
        options += [round(left + share * (right - left), 4) for share in shares]
        fine += [math.exp(low + share * (high - low)) for share in shares]
    return Part(sites=sites, size=size, options=tuple(options), costs=tuple(fine))


def spend(parts: Sequence[Part], keep: float) -> list[Sparsity]:
    """The sparsity of each part at which their costs sum to the least, and `keep` of all parameters is kept.

    Greedy along the lower convex hull of each curve, which is exact there; the last step of a fraction is cut short, so
    that the share kept is met; with n:m at most one step of one part too much is cut.
    """
    at = [0] * len(parts)
    total = sum(p.size for p in parts)
    surplus = sum(p.size * (density(p.options[0]) - keep) for p in parts)  # parameters still to be cut
    while surplus > 1e-6 * total:
        steps = [(*next_step(p, at[i]), i) for i, p in enumerate(parts)]
        open_steps = [(slope, i, j) for slope, j, i in steps if j]
        if not open_steps:
            break
        _, i, j = min(open_steps)
        p = parts[i]
        gain = p.size * (density(p.options[at[i]]) - density(p.options[j]))
        if gain > surplus and not isinstance(p.options[j], str):
            last = 1 - density(p.options[at[i]]) + surplus / p.size
            return [round(last, 4) if k == i else q.options[at[k]] for k, q in enumerate(parts)]
        at[i], surplus = j, surplus - gain
    return [p.options[at[i]] for i, p in enumerate(parts)]


def next_step(p: Part, at: int) -> tuple[float, int]:
    """(added cost for each parameter cut, the option reached) of the cheapest step from `at`; option 0 if none."""
    steps = [
        ((p.costs[j] - p.costs[at]) / (p.size * (density(p.options[at]) - density(p.options[j]))), j)
        for j in range(at + 1, len(p.options))
    ]
    return min(steps, default=(0.0, 0))
