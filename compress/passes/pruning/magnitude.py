"""Magnitude pruning: cut the smallest weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.factor_pruner import FactorPruner


@dataclass(frozen=True, kw_only=True)
class Magnitude(FactorPruner, name="magnitude"):
    """Score |w|: a weight matters if it is large. Needs no data.

    Source: Han et al., "Learning both Weights and Connections", NeurIPS 2015; compared over the whole matrix by
    default, as in the LLM literature.
    """

    scope: Annotated[
        str, Field(description="the weights compared with each other: row, matrix, or whole blocks such as 16x16")
    ] = "matrix"

    def score(self, site: Site) -> Tensor:
        """|w|, float32."""
        return site.weight.dense().float().abs()
