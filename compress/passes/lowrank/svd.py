"""The plain singular value decomposition: the baseline, and the factorization that WeLore stores."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.passes.factorizer import Factorizer


@dataclass(frozen=True, kw_only=True)
class SVD(Factorizer, name="svd"):
    """The nearest matrix of its rank, by the weights alone; reads no data.

    Source: Eckart and Young, "The approximation of one matrix by another of lower rank", 1936.
    """

    unfed = ""

    def metric(self, site: Site) -> Tensor | None:
        """None: all inputs count equally."""
        del site
        return None
