"""WeLore: one threshold on normalised singular values for the whole model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.model.whole import Whole
from compress.passes.base import Budget, Sparsity
from compress.passes.factorizer import Factorizer
from compress.passes.ranks import above, budget_of, factored_together, given, parameters, part_of

HALVINGS = 60


@dataclass(frozen=True, kw_only=True)
class WeLore(Budget, name="welore"):
    """Stretch the singular values of each matrix to [0, 1] and cut those below one threshold, which meets the budget.

    A matrix that keeps so many that its factors would be no smaller stays dense (N-LRC: to be frozen in later
    fine-tuning); the others are low-rank components (LRC: to be tuned). The artifact records what each matrix became:
    its rank, or `dense`. With `svd` behind it this is the paper's method; another pass may supply a different metric.
    Source: Jaiswal et al., "From Low Rank Gradient Subspace Stabilization to Low-Rank Weights (WeLore)", ICML 2025,
    section 3. Deviation: the threshold meets a number of parameters, not of singular values.
    """

    options_set = ("removed",)

    def allocate(self, model: Whole, step: Factorizer) -> dict[str, Sparsity]:
        """The share removed of each matrix that `step` selects."""
        parts = [
            part_of(sites, stretched(step, sites))
            for block in model.blocks(step.requires, step.sites)
            for sites in factored_together(block, step)
        ]
        budget = budget_of(parts, step.removed)
        low, high = 0.0, 1.0 + 1e-9
        for _ in range(HALVINGS):
            level = (low + high) / 2
            low, high = (low, level) if parameters(parts, above(parts, level)) <= budget else (level, high)
        return dict(given(parts, above(parts, high)))


def stretched(step: Factorizer, sites: Sequence[Site]) -> Tensor:
    """The singular values, mapped linearly so that they run from 1 down to 0."""
    values_R = step.spectrum(sites).double().sqrt()
    span = (values_R[0] - values_R[-1]).clamp(min=1e-300)
    return (values_R - values_R[-1]) / span
