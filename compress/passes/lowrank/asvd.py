"""ASVD: the singular value decomposition of a matrix whose columns are scaled by how loud their inputs are."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.factorizer import Factorizer
from compress.stats import AbsMean

LEAST = 1e-6  # added to every scale, as the released code does


@dataclass(frozen=True, kw_only=True)
class ASVD(Factorizer, name="asvd"):
    """Scale column j by mean|x_j| to the power `alpha`, keep the first directions, and scale back.

    Source: Yuan et al., "ASVD: Activation-aware Singular Value Decomposition", 2023, section 3.2. Ranks by its search
    over perplexities: use the budget `sensitivity` before it.
    """

    requires = (AbsMean,)

    alpha: Annotated[float, Field(ge=0, le=2, description="power of the mean |x| of an input")] = 0.5

    def metric(self, site: Site) -> Tensor | None:
        """The squares of the scales."""
        metric_I: Tensor = (site.stats[AbsMean] ** self.alpha + LEAST).square()
        return metric_I
