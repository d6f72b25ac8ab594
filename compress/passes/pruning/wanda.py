"""Wanda: the score is the weight times the norm of its input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.factor_pruner import FactorPruner
from compress.stats import ColumnNorm, Gram, Statistic
from compress.weights import Dense, Masked, Weight
from compress.weights.pattern import percent

HIGHEST = 0.8  # largest alpha, the share of a row's summed scores that may be cut; as in the released code
CLOSE = 1e-3  # the bisection ends when the sparsity reached or the bracket is this close
FAR = 0.01  # a distance from the sparsity asked for that few entries or equal scores do not explain


@dataclass(frozen=True, kw_only=True)
class Wanda(FactorPruner, name="wanda"):
    """Score |w| * ||x||: a weight matters if it is large and its input has a large norm.

    With `alpha`, rows get unequal counts: each drops its smallest scores while their sum is at most a share alpha of
    the row's sum. There is one alpha per matrix, found by bisection to within 0.1 % of the sparsity.
    Source: Sun et al., "A Simple and Effective Pruning Approach for LLMs", ICLR 2024, eq. 1; compared within each
    output row. Counts are exact and ties stable, where the released code floors.
    """

    alpha: Annotated[
        bool, Field(description="let the sparsity of rows differ: each drops the same share of the sum of its scores")
    ] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha and (isinstance(self.sparsity, str) or self.scope != "row"):
            raise RecipeError(
                f"{self.name}.alpha: needs a fraction with scope row, not {self.sparsity} with scope {self.scope}"
            )
        if self.alpha and self.factors:
            raise RecipeError(f"{self.name}.factors: cannot be combined with alpha")

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """Norms of the input; with `factors` also its Gram, which gives the norms behind a right factor."""
        return (ColumnNorm, Gram) if self.factors else (ColumnNorm,)

    def score(self, site: Site) -> Tensor:
        """|w| * ||x||, float32."""
        return site.weight.dense().float().abs() * site.stats[ColumnNorm]

    def outline(self, site: Site) -> Weight | None:
        """As for any pruner; with `alpha` None, because the counts follow from the scores."""
        return None if self.alpha else super().outline(site)

    def prune(self, site: Site) -> Weight:
        """The same values under a mask that keeps the highest scores."""
        if not self.alpha or isinstance(self.sparsity, str) or not self.sparsity:
            return super().prune(site)
        keep_OI, alpha = keep_by_alpha(self.score(site), self.sparsity)
        site.ledger["alpha"] = alpha
        reached = round(1 - float(keep_OI.sum()) / keep_OI.numel(), 4)
        if abs(reached - self.sparsity) > FAR:
            site.fall_back(
                self.name, f"no alpha up to {HIGHEST} reaches {percent(self.sparsity)}; {percent(reached)} were cut"
            )
        return Masked(site.expect(Dense, by=self.name), keep_OI, percent(reached))


def keep_by_alpha(score_OI: Tensor, sparsity: float) -> tuple[Tensor, float]:
    """(mask, alpha): each row drops its lowest scores while they sum to at most alpha of the sum of the row.

    In a row of zeros every entry counts the same. Sparsities that need an alpha above 0.8 are not reached.
    Source: the released code of Wanda, `use_variant`; a row that may drop nothing drops nothing, where that code wraps
    around.
    """
    ordered_OI, order_OI = score_OI.sort(dim=1, stable=True)
    share_OI = torch.where(ordered_OI[:, -1:] > 0, ordered_OI.double(), 1.0).cumsum(1)
    share_OI /= share_OI[:, -1:].clone()
    alpha, low, high = 0.4, 0.0, HIGHEST
    while True:
        cut_OI = share_OI <= alpha
        reached = float(cut_OI.sum()) / cut_OI.numel()
        if abs(reached - sparsity) <= CLOSE or high - low < CLOSE:
            break
        low, high = (low, alpha) if reached > sparsity else (alpha, high)
        alpha = (low + high) / 2
    return ~cut_OI.new_zeros(cut_OI.shape).scatter_(1, order_OI, cut_OI), alpha
