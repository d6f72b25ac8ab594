"""Ranks where they keep most: one price of a parameter for all matrices."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.model.whole import Whole
from compress.passes.base import Budget, Sparsity
from compress.passes.factorizer import Factorizer
from compress.passes.ranks import budget_of, cheapest, given, parts_of


@dataclass(frozen=True, kw_only=True)
class Ranks(Budget, name="ranks"):
    """Minimise the sum over matrices of the share of output energy lost, at the parameters the next pass asks for.

    In that pass's own metric. Energies fall, so taking the best energy for a parameter first is exact, but for
    matrices that come out no shorter than they are: these stay whole.
    Source: Shoham and Gersho, "Efficient Bit Allocation for an Arbitrary Set of Quantizers", 1988, for convex losses;
    truncation loss as the loss, Wang et al., SVD-LLM V2, NAACL 2025.
    """

    options_set = ("removed",)

    def allocate(self, model: Whole, step: Factorizer) -> dict[str, Sparsity]:
        """The share removed of each matrix that `step` selects."""

        def shares(sites: Sequence[Site]) -> Tensor:
            energy_R = step.spectrum(sites).double()
            return energy_R / energy_R.sum().clamp(min=1e-300)

        parts = list(parts_of(model, step, shares))
        return dict(given(parts, cheapest(parts, budget_of(parts, step.removed))))
