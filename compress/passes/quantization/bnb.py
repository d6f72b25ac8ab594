"""The formats of bitsandbytes: NF4, whose codes the library itself chooses, and the 8-bit rows of LLM.int8.

The inputs that LLM.int8 keeps in 16 bits are chosen at run time, by whatever runs the model; they are not part of the
weight. Shape suffixes: O out, I in, G blocks of a row.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.base import BlockQuantizer, Quantizer
from compress.weights import BOOKS, Codebook, Dense, Nested, Quantized, Weight

LEVELS = 127.0
SMALLEST = 1e-36  # lower bound of the largest entry of a row: 127 divided by it is still a float32


@dataclass(frozen=True, kw_only=True)
class NF4(BlockQuantizer, name="nf4"):
    """Round to the nearest of 16 quantiles of a normal, times the largest |w| of a block of 64. Needs no data.

    4.5 bits a weight; 4.127 with `double`, which codes the blocks' maxima in 8 bits.
    Source: Dettmers et al., "QLoRA", NeurIPS 2023, section 3, as computed by bitsandbytes in float32.
    """

    block: ClassVar[int] = 64

    double: Annotated[bool, Field(description="store the scales themselves in 8 bits")] = False

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if the blocks do not divide the width, or if bitsandbytes is missing."""
        super().check(site, shape)
        functional()

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The nearest values; 0 is one of them."""
        if w_OI.is_meta:
            return self.formed(w_OI)
        packed, state = functional().quantize_4bit(
            w_OI.float().contiguous(), blocksize=self.block, quant_type="nf4", compress_statistics=self.double
        )
        codes_OI = torch.stack((packed >> 4, packed & 15), -1).view(w_OI.shape)  # the first code is in the high half
        absmax_OG = state.absmax.view(w_OI.shape[0], -1)
        scale = Nested(absmax_OG, state.state2.absmax, state.offset.view(1)) if self.double else Dense(absmax_OG)
        return Codebook(codes_OI, BOOKS["nf4"].to(w_OI.device), scale, "nf4")

    def formed(self, w_OI: Tensor) -> Weight:
        """The form of the result of `round` for a matrix on the meta device."""
        absmax_OG = w_OI.new_empty(w_OI.shape[0], w_OI.shape[1] // self.block, dtype=torch.float32)
        blocks = -(-absmax_OG.numel() // Nested.BLOCK)
        codes, blocked = absmax_OG.to(torch.uint8), absmax_OG.new_empty(blocks)
        scale = Nested(codes, blocked, absmax_OG.new_empty(1)) if self.double else Dense(absmax_OG)
        return Codebook(w_OI.to(torch.uint8), BOOKS["nf4"].to(w_OI.device), scale, "nf4")


@dataclass(frozen=True, kw_only=True)
class Int8(Quantizer, name="int8"):
    """Round to the nearest of 255 steps of the row's largest |w| / 127. Needs no data.

    Source: Dettmers et al., "LLM.int8()", NeurIPS 2022, section 3.1 (vector-wise). Deviation: bitsandbytes rounds
    weights to float16 first; this pass does not.
    """

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """The nearest codes; 128 is zero, 0 is not used."""
        absmax_O1 = w_OI.float().abs().amax(1, keepdim=True).clamp(min=SMALLEST)
        codes_OI = (w_OI.float() * (LEVELS / absmax_O1)).round_().add_(128).to(torch.uint8)
        return Quantized(codes_OI, absmax_O1 / LEVELS, None, 8)


def functional() -> Any:
    """The functions of bitsandbytes; raises RecipeError if it cannot be imported.

    Its warning that a faster matrix product could not be downloaded is suppressed, because it is irrelevant here.
    """
    logger = logging.getLogger("bitsandbytes.backends.cpu.ops")
    before, logger.disabled = logger.disabled, True
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise RecipeError("nf4 needs bitsandbytes: pip install bitsandbytes") from error
    finally:
        logger.disabled = before
    return bitsandbytes.functional
