"""FP8: weights as 8-bit floats with one scale per row, per tile or for the matrix.

Scales are stored as bfloat16, and codes are chosen for the stored scale. Common loaders keep scales in the dtype of the
model or in float32, and both represent them exactly. Shape suffixes: O out, I in, M tiles down, N tiles across.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.model.site import Site
from compress.passes.base import Quantizer
from compress.weights import Scaled, Weight
from compress.weights.leaves import spread_tiles

FORMATS = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}
SMALLEST = 1e-12  # lower bound of the largest entry of a tile; far below it a tile becomes zero


@dataclass(frozen=True, kw_only=True)
class FP8(Quantizer, name="fp8"):
    """Divide each weight by the scale of its tile and round to the nearest 8-bit float. Needs no data.

    The scale maps the largest entry to the largest float (448 or 57344) and is rounded to bfloat16; entries that then
    exceed the largest float saturate. With `power` the scale is the next power of two above, so that none does.
    Source: Micikevicius et al., "FP8 Formats for Deep Learning", 2022; OCP 8-bit Floating Point Specification, 2023.
    """

    format: Annotated[
        Literal["e4m3", "e5m2"], Field(description="exponent and mantissa bits; e5m2 is coarser and reaches further")
    ] = "e4m3"
    tile: Annotated[
        Literal["row", "tensor", "128x128"], Field(description="weights that share a scale; 128x128 is out x in")
    ] = "row"
    power: Annotated[bool, Field(description="round scales up to powers of two")] = False

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The nearest floats; 0 is one of them."""
        outputs, inputs = w_OI.shape
        tile = {"row": (1, inputs), "tensor": (outputs, inputs), "128x128": (128, 128)}[self.tile]
        dtype = FORMATS[self.format]
        limit = torch.finfo(dtype).max
        scale_MN = largest_of_tiles(w_OI.float(), tile).clamp(min=SMALLEST) / limit
        scale_MN = (next_power(scale_MN) if self.power else scale_MN).bfloat16()
        scaled_OI = w_OI.float() / spread_tiles(scale_MN.float(), tile, (outputs, inputs))
        return Scaled(scaled_OI.clamp_(-limit, limit).to(dtype), scale_MN, *tile)


def largest_of_tiles(w_OI: Tensor, tile: tuple[int, int]) -> Tensor:
    """The largest |w| of each tile; the last tiles are smaller if tiles do not divide the matrix."""
    rows, columns = tile
    padded_OI = F.pad(w_OI.abs(), (0, -w_OI.shape[1] % columns, 0, -w_OI.shape[0] % rows))
    largest_MN: Tensor = padded_OI.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).amax((1, 3))
    return largest_MN


def next_power(x: Tensor) -> Tensor:
    """The smallest power of two that is not below each positive x."""
    mantissa, exponent = torch.frexp(x)  # x = mantissa * 2**exponent, mantissa in [0.5, 1)
    return torch.ldexp(torch.ones_like(x), exponent - (mantissa == 0.5).int())
