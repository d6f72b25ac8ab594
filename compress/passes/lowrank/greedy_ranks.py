"""Ranks that keep the most energy: one price of a parameter for all matrices."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal

from pydantic import Field

from compress.errors import CalibrationError
from compress.model.whole import Whole
from compress.passes.base import Budget, Sparsity
from compress.passes.factorizer import Factorizer
from compress.passes.probes import Probes, rewritten
from compress.passes.ranks import Part, budget_of, cheapest, factored_together, given, part_of
from compress.passes.whitened import rank_within

TINY = 1e-30


@dataclass(frozen=True, kw_only=True)
class Ranks(Budget, name="ranks"):
    """Minimise the sum over matrices of the output energy lost, at the parameters that the next pass asks for.

    Energies are in that pass's own metric. They fall, so taking the best energy per parameter first is exact, except
    for matrices whose factors would be no smaller than they are; these stay whole. With `energy`, they count relative
    to all energy of the matrix's output. With `kl`, they count by the divergence of the logits when this matrix alone
    is cut to what the pass asks for, divided by the energy that this cut loses, because a few tokens of huge
    activations may hold nearly all energy of an output and still matter little to later blocks.
    Source: Shoham and Gersho, "Efficient Bit Allocation for an Arbitrary Set of Quantizers", 1988, for convex losses;
    truncation loss as the loss, Wang et al., SVD-LLM V2, NAACL 2025; weighing it by KL is ours.
    """

    options_set = ("removed",)

    measure: Annotated[
        Literal["kl", "energy"],
        Field(
            description="weight of a matrix's lost energy: by the KL of the logits (kl), or relative to its whole "
            "output energy (energy)"
        ),
    ] = "kl"

    def allocate(self, model: Whole, step: Factorizer) -> dict[str, Sparsity]:
        """The share removed of each matrix that `step` selects."""
        parts: list[Part] = []
        probes = Probes(model)
        for block in model.blocks(step.requires, step.sites):
            probes.follow(block)
            for sites in factored_together(block, step):
                parts.append(part_of(sites, step.spectrum(sites)))
                if self.measure == "kl" and step.removed:
                    with rewritten(sites, step):
                        probes.take(block)
        costs: Sequence[float | None] = probes.costs() or [None] * len(parts)
        units = [weight(part, cost, step.removed) for part, cost in zip(parts, costs, strict=True)]
        weighed = [replace(part, falling=part.falling * unit) for part, unit in zip(parts, units, strict=True)]
        return dict(given(parts, cheapest(weighed, budget_of(parts, step.removed))))


def weight(part: Part, cost: float | None, removed: float) -> float:
    """The weight of a unit of a part's energy: 1 / its total, or `cost` / the energy beyond the rank asked for.

    Raises CalibrationError if that cost is not finite.
    """
    total = max(TINY, float(part.falling.sum()))
    if cost is None:
        return 1 / total
    if not math.isfinite(cost):
        raise CalibrationError(f"ranks: factoring {part.sites[0]} alone makes the logits not finite")
    lost = float(part.falling[rank_within(1 - removed, part.shape) :].sum())
    return cost / max(lost, 1e-6 * total)
