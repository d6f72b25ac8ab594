"""ASVD: the singular value decomposition of a matrix whose columns are scaled by the mean magnitude of their inputs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.factorizer import Factorizer
from compress.stats import AbsMean

LEAST = 1e-6  # added to every scale, as in the released code


@dataclass(frozen=True, kw_only=True)
class ASVD(Factorizer, name="asvd"):
    """Scale column j by mean|x_j| to the power `alpha`, keep the first singular directions, and scale back.

    Source: Yuan et al., "ASVD: Activation-aware Singular Value Decomposition", 2023, section 3.2. For ranks from a
    search over perplexities, as in the paper, use the budget `sensitivity` before it.
    """

    requires = (AbsMean,)

    alpha: Annotated[float, Field(ge=0, le=2, description="exponent of the mean |x| of an input")] = 0.5

    def metric(self, site: Site) -> Tensor | None:
        """The squares of the scales."""
        metric_I: Tensor = (site.stats[AbsMean] ** self.alpha + LEAST).square()
        return metric_I
