"""Sparsity where it costs least: measured KL of pruning each group of sites alone, spread along its error curve.

Shape suffixes: B batch, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.model.block import Block
from compress.model.site import Site
from compress.model.whole import Whole
from compress.passes.base import Budget, Pruner, Sparsity
from compress.passes.budget import density
from compress.stats import ColumnNorm
from compress.weights import Dense, Masked

POINTS = 9  # of an error curve, where sparsity is a fraction


@dataclass(frozen=True, kw_only=True)
class Part:
    """Sites that share an input: their names and parameters, the sparsities tried, and the error at each."""

    sites: tuple[str, ...]
    size: int
    options: tuple[Sparsity, ...]
    errors: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Budget, name="sensitivity"):
    """Minimise the sum of the KL that each group of sites costs, at the mean sparsity the next pruner asks for.

    A group is the sites that read one input. The KL of a group is measured: the probe runs through the dense model with
    this group alone pruned by |w| * ||x||, all groups in one reading of the model. Between sparsities it follows the
    group's error, the share of its squared scores that is cut; marginal costs are then made equal.
    Source: the additive second-order model of pruning damage, LeCun et al., "Optimal Brain Damage", NeurIPS 1989, with
    Lagrangian allocation (Shoham and Gersho, 1988); the measured weights are ours.
    """

    requires = (ColumnNorm,)

    spread: Annotated[float, Field(gt=0, le=0.5, description="furthest that a group may be from the mean sparsity")] = (
        0.2
    )

    def allocate(self, model: Whole, step: Pruner) -> dict[str, Sparsity]:
        """One sparsity for the sites of each group that `step` selects."""
        parts: list[Part] = []
        probes: list[Tensor] = []
        tried = self.options_for(step)
        middle = tried.index(step.sparsity)
        batch = model.walk.enter(model.probe_NT)
        for block in model.blocks(self.requires):
            probes = [batch.through(block.module, block.index, hidden) for hidden in probes]
            for group in block.groups:
                sites = [s for s in group if fnmatchcase(s.name, step.sites) and ColumnNorm in s.stats]
                if sites:
                    parts.append(part(sites, step, tried))
                    probes.append(pruned_output(block, sites, step))
        dense = model.walk.dense_logits
        costs = []
        for hidden in probes:
            batch.hidden_BTD = hidden
            costs.append(kl(dense, model.walk.leave(batch)))
        weights = [cost / max(p.errors[middle], 1e-12) for cost, p in zip(costs, parts, strict=True)]
        chosen = spend(parts, weights, density(step.sparsity))
        return {site: sparsity for p, sparsity in zip(parts, chosen, strict=True) for site in p.sites}

    def options_for(self, step: Pruner) -> tuple[Sparsity, ...]:
        """The sparsities to try, from the densest: around a fraction, or every n of n:m within the spread."""
        if isinstance(step.sparsity, str):
            kept, of = map(int, step.sparsity.split(":"))
            near = [n for n in range(of - 1, 0, -1) if abs(n - kept) <= max(1.0, self.spread * of)]
            return tuple(f"{n}:{of}" for n in near)
        half = POINTS // 2
        offsets = [self.spread * i / half for i in range(-half, half + 1)]
        around = [step.sparsity if o == 0 else round(min(0.99, max(0.0, step.sparsity + o)), 6) for o in offsets]
        return tuple(dict.fromkeys(around))


def part(sites: Sequence[Site], step: Pruner, tried: Sequence[Sparsity]) -> Part:
    """A group with its error at each sparsity tried: the share of the squared scores that is cut."""
    errors = [0.0] * len(tried)
    total = 0.0
    for site in sites:
        score_OI = site.weight.dense().float().abs() * site.stats[ColumnNorm]
        energy_OI = score_OI.square()
        total += float(energy_OI.sum(dtype=torch.float64))
        for i, sparsity in enumerate(tried):
            kept_OI = replace(step, sparsity=sparsity).pattern().keep(score_OI)
            errors[i] += float(energy_OI.masked_fill(kept_OI, 0).sum(dtype=torch.float64))
    size = sum(site.shape[0] * site.shape[1] for site in sites)
    shares = tuple(error / max(total, 1e-30) for error in errors)
    return Part(sites=tuple(s.name for s in sites), size=size, options=tuple(tried), errors=shares)


def pruned_output(block: Block, sites: Sequence[Site], step: Pruner) -> Tensor:
    """The probe behind a block of which these sites alone are pruned; the block is then as it was."""
    for site in sites:
        score_OI = site.weight.dense().float().abs() * site.stats[ColumnNorm]
        site.weight = Masked(Dense(site.original.data), step.pattern().keep(score_OI), "probe")
    moved = block.probe.through(block.module, block.index)
    for site in sites:
        site.weight = site.original
    return moved


def kl(dense_BTV: Tensor, other_BTV: Tensor) -> float:
    """Mean over tokens of KL(dense || other), nats."""
    total = 0.0
    for dense_TV, other_TV in zip(dense_BTV, other_BTV, strict=True):
        left, right = F.log_softmax(dense_TV.float(), -1), F.log_softmax(other_TV.float(), -1)
        total += float((left.exp() * (left - right)).sum(-1).mean())
    return max(total / len(dense_BTV), 1e-12)


def spend(parts: Sequence[Part], weights: Sequence[float], keep: float) -> list[Sparsity]:
    """The sparsity of each part at which their weighted errors sum to the least, and `keep` of all is kept.

    Greedy along the lower convex hull of each error curve, which is exact there; a fraction's last step is cut short,
    so that the share kept is met, and for n:m it is overshot by less than one step.
    """
    at = [0] * len(parts)
    total = sum(p.size for p in parts)
    surplus = sum(p.size * (density(p.options[0]) - keep) for p in parts)  # parameters still to be cut
    while surplus > 1e-6 * total:
        best = min(
            ((slope, i, j) for i, p in enumerate(parts) for slope, j in [next_step(p, at[i], weights[i])] if j),
            default=None,
        )
        if best is None:
            break
        _, i, j = best
        p = parts[i]
        gain = p.size * (density(p.options[at[i]]) - density(p.options[j]))
        if gain > surplus and not isinstance(p.options[j], str):
            kept = density(p.options[at[i]]) - surplus / p.size
            return [round(1 - kept, 6) if k == i else q.options[at[k]] for k, q in enumerate(parts)]
        at[i], surplus = j, surplus - gain
    return [p.options[at[i]] for i, p in enumerate(parts)]


def next_step(p: Part, at: int, weight: float) -> tuple[float, int]:
    """(added cost for each parameter cut, the option reached) of the cheapest step from `at`; option 0 if none."""
    steps = [
        (weight * (p.errors[j] - p.errors[at]) / (p.size * (density(p.options[at]) - density(p.options[j]))), j)
        for j in range(at + 1, len(p.options))
    ]
    return min(steps, default=(0.0, 0))
