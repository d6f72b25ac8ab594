"""Wanda-sp: remove heads and neurons whose weights are small and whose inputs have a small norm."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.passes.structured import StructuredPruner
from compress.stats import ColumnNorm


@dataclass(frozen=True, kw_only=True)
class WandaSP(StructuredPruner, name="wanda-sp"):
    """Remove heads and neurons by |w| * ||x|| of the inputs of o_proj and down_proj: mean over rows, sum over a head.

    Equally many are removed from every block, nothing is compensated, and each block is measured after the removals
    before it.
    Source: An et al., "Fluctuation-based Adaptive Structured Pruning for Large Language Models", AAAI 2024, its
    baseline Wanda-sp; the score is Sun et al., Wanda, ICLR 2024, equation 1. Deviation: a head is a whole key-value
    group with its query heads, so that models with grouped queries stay consistent.
    """

    requires = (ColumnNorm,)

    def score(self, site: Site) -> Tensor:
        """Weight times input norm, averaged over outputs, [in]."""
        return site.original.data.float().abs().mean(0) * site.stats[ColumnNorm]
