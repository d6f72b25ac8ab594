"""Wanda: weights times input norms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.passes.base import Pruner
from compress.stats import ColumnNorm


@dataclass(frozen=True, kw_only=True)
class Wanda(Pruner, name="wanda"):
    """Score |w| * ||x||: a weight matters if it is large and its input is loud.

    Source: Sun et al., "A Simple and Effective Pruning Approach for LLMs", ICLR 2024, eq. 1; compared within
    each output row. Counts are exact and ties stable, where the released code floors.
    """

    requires = (ColumnNorm,)

    def score(self, site: Site) -> Tensor:
        """|w| * ||x||, float32."""
        return site.weight.dense().float().abs() * site.stats[ColumnNorm]
