"""Rounding to nearest."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.passes.base import GridQuantizer
from compress.weights import Weight


@dataclass(frozen=True, kw_only=True)
class RTN(GridQuantizer, name="rtn"):
    """Round each weight to the nearest point of its group's grid. Needs no data, unless `search` is `output`.

    Source: the common baseline; grids and range search as in Frantar et al., GPTQ, ICLR 2023 (released code); search by
    output error after the clipping of Lin et al., AWQ, MLSys 2024, with the Gram in place of tokens.
    """

    def quantize(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The nearest codes; a cut weight stays 0, because 0 is on every grid."""
        return self.grid.quantize(w_OI, search=bool(self.search), gram_II=self.gram(site))
