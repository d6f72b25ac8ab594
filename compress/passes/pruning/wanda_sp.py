"""Wanda-sp: heads and neurons whose weights are small and whose inputs are quiet."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.passes.structured import StructuredPruner
from compress.stats import ColumnNorm


@dataclass(frozen=True, kw_only=True)
class WandaSP(StructuredPruner, name="wanda-sp"):
    """Remove heads and neurons by |w| * ||x|| of what o_proj and down_proj read of them: mean of rows, sum of a head.

    Equally many from every block, nothing is compensated, and each block is measured behind what was removed before.
    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, its
    baseline Wanda-sp; the score is Sun et al., Wanda, ICLR 2024, equation 1. Deviation: a head is a whole
    key-value group with its query heads, so that models with grouped queries stay consistent.
    """

    requires = (ColumnNorm,)

    def score(self, site: Site) -> Tensor:
        """Weight times input norm, the mean over outputs, [in]."""
        return site.original.data.float().abs().mean(0) * site.stats[ColumnNorm]
