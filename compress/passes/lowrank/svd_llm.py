"""SVD-LLM: the matrix of its rank whose output on the calibration tokens is nearest to the original output."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.passes.factorizer import Factorizer
from compress.stats import Gram


@dataclass(frozen=True, kw_only=True)
class SVDLLM(Factorizer, name="svd-llm"):
    """Keep the first directions of the output, W' = U Uᵀ W with U of W G Wᵀ; any square root of G gives the same.

    The loss is the sum of the energies left out, the least for its rank. The paper's second step, which aims at the
    output of the dense model after earlier matrices have changed, is the pass `realign` before this one, in closed
    form.
    Source: Wang et al., "SVD-LLM: Truncation-aware Singular Value Decomposition", ICLR 2025, theorem 1.
    """

    requires = (Gram,)

    def metric(self, site: Site) -> Tensor | None:
        """The Gram."""
        return site.stats[Gram]
