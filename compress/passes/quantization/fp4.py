"""FP4: weights as e2m1 floats {0, .5, 1, 1.5, 2, 3, 4, 6} with one scale per group; OCP's MXFP4 and NVIDIA's NVFP4.

Codes are sign and magnitude as in the hardware formats, so a small negative weight becomes -0. The arithmetic is that
of compressed-tensors, so that its own quantization of the same weights has the same bytes. Shape suffixes: O out, I in,
G groups, S inputs of a group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.base import BlockQuantizer
from compress.weights import BOOKS, Codebook, Dense, Scaled, Weight

BIAS = 127  # of an e8m0 exponent; its largest code is NaN
TOP = 2  # exponent of the largest e2m1 value, 6 = 1.5 * 2**2
LARGEST = 6.0
E4M3_LARGEST, E4M3_SMALLEST = 448.0, 2.0**-9
# midpoints between neighbours; a tie goes to the even code, so odd borders are the next smaller float32
MIDDLES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
BORDERS = torch.where(torch.arange(7) % 2 == 1, MIDDLES.nextafter(torch.zeros(7)), MIDDLES)


def e2m1(x: Tensor) -> Tensor:
    """The codes of the nearest e2m1 values, ties to even, values above 6 saturated: uint8, bit 3 is the sign."""
    magnitude = torch.bucketize(x.abs(), BORDERS.to(x.device), out_int32=True)
    return (magnitude | ((x < 0).int() << 3)).to(torch.uint8)


@dataclass(frozen=True, kw_only=True)
class MXFP4(BlockQuantizer, name="mxfp4"):
    """Round to the nearest e2m1 value, with a power of two as scale for 32 inputs. Needs no data.

    Exponents, from the largest |w| of a group: `floor` is floor(log2) - 2, the rule of the standard, and saturates
    above 6; `round` adds 1 from 1.75 times a power of two, as compressed-tensors does; `search` takes floor or the
    next, whichever has the smaller squared error.
    Source: OCP Microscaling Formats (MX) Specification 1.0, 2023; Rouhani et al., "Microscaling Data Formats for Deep
    Learning", 2023, algorithm 1.
    """

    block: ClassVar[int] = 32

    exponent: Annotated[
        Literal["floor", "round", "search"], Field(description="how the power of two of a group is chosen")
    ] = "floor"

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The nearest values; 0 is one of them."""
        w_OGS = w_OI.float().unflatten(1, (-1, self.block))
        exponent_OG = mx_exponents(w_OGS.abs().amax(-1), carry=0.875 if self.exponent == "round" else 1.0)
        if self.exponent == "search":
            next_OG = (exponent_OG + 1).clamp(max=BIAS)
            exponent_OG = torch.where(mx_error(w_OGS, next_OG) < mx_error(w_OGS, exponent_OG), next_OG, exponent_OG)
        codes_OI = e2m1(torch.ldexp(w_OGS, -exponent_OG[..., None])).flatten(1)
        scale = Dense((exponent_OG + BIAS).to(torch.uint8).view(torch.float8_e8m0fnu))
        return Codebook(codes_OI, BOOKS["mxfp4"].to(w_OI.device), scale, "mxfp4")


def mx_exponents(largest_OG: Tensor, carry: float) -> Tensor:
    """floor(log2(largest)) - 2, one more if the mantissa in [0.5, 1) reaches `carry`; int32, the smallest for a 0."""
    mantissa, exponent = torch.frexp(largest_OG)
    exponent = exponent - 1 - TOP + (mantissa >= carry).int()
    return exponent.masked_fill(largest_OG == 0, -BIAS).clamp(-BIAS, BIAS)


def mx_error(w_OGS: Tensor, exponent_OG: Tensor) -> Tensor:
    """The squared error of each group, relative to the square of its largest entry."""
    rounded = BOOKS["mxfp4"][:, 0].to(w_OGS.device)[e2m1(torch.ldexp(w_OGS, -exponent_OG[..., None])).long()]
    largest = w_OGS.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(torch.float32).tiny)
    return ((torch.ldexp(rounded, exponent_OG[..., None]) - w_OGS) / largest).square().sum(-1)


@dataclass(frozen=True, kw_only=True)
class NVFP4(BlockQuantizer, name="nvfp4"):
    """Round to the nearest e2m1 value, with an e4m3 scale for 16 inputs and a float32 scale for all. Needs no data.

    The scale of the matrix maps the largest entry to 6 * 448. Deviation from compressed-tensors: a group so small that
    its scale underflows gets the smallest e4m3 number, 2**-9, instead of 2**-3.
    Source: NVIDIA, "Pretraining Large Language Models with NVFP4", 2025 (two levels of scales).
    """

    block: ClassVar[int] = 16

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The nearest values; 0 is one of them."""
        w_OGS = w_OI.float().unflatten(1, (-1, self.block))
        largest_OG = w_OGS.abs().amax(-1)
        inverse = (E4M3_LARGEST * LARGEST / largest_OG.max()).nan_to_num(posinf=1.0)  # 1 for a matrix of zeros
        scale_OG = (inverse * (largest_OG / LARGEST)).clamp(E4M3_SMALLEST, E4M3_LARGEST).to(torch.float8_e4m3fn)
        codes_OI = e2m1(w_OGS / (scale_OG.float() / inverse)[..., None]).flatten(1)
        scale = Scaled(scale_OG, inverse.reciprocal().view(1, 1), *scale_OG.shape)
        return Codebook(codes_OI, BOOKS["nvfp4"].to(w_OI.device), scale, "nvfp4")
