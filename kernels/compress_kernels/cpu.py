"""Weight-only int4 and int8 on the CPU through ATen's packed GEMMs, with their plain-torch specification.

The fast forms win only for a few rows of x (decoding): they stream a quarter or half of the bytes but do not
block for reuse. `worth_packing` and `FEW_ROWS` hold the measured rule; `python -m compress_kernels.bench` measures.
Shape suffixes: M rows of x, O out, I in, G groups.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FEW_ROWS = 8  # rows of x up to which a packed product beat the bf16 one
SMALLEST = 1 << 16  # weights; the smallest size measured, where it still wins
GROUPS = (32, 64, 128, 256)  # what ATen's int4 kernel takes


def reference(codes_OI: Tensor, scale_OG: Tensor, offset_OG: Tensor) -> Tensor:
    """The specification, float32 [out, in]: `scale * codes + offset` group by group."""
    codes = codes_OI.unflatten(1, (scale_OG.shape[1], -1)).float()
    dense: Tensor = (codes * scale_OG.float()[..., None] + offset_OG.float()[..., None]).flatten(1)
    return dense


def worth_packing(out_features: int, in_features: int) -> bool:
    """Whether a packed copy of a weight of this size is worth its memory."""
    return out_features * in_features >= SMALLEST and out_features % 16 == 0


@dataclass(frozen=True)
class Int4:
    """A weight packed for `_weight_int4pack_mm_for_cpu`; scales and offsets are rounded to bf16."""

    packed: Tensor
    scales: Tensor
    group: int

    @staticmethod
    def pack(codes_OI: Tensor, scale_OG: Tensor, zero_OG: Tensor | float) -> Int4:
        """Pack codes 0..15 that denote `scale * (code - zero)`; ATen computes `scale * (code - 8) + offset`."""
        scale = scale_OG.float()
        offset = (8 - torch.as_tensor(zero_OG, dtype=torch.float32)) * scale
        pairs = torch.stack((scale.T, offset.expand_as(scale).T), -1).contiguous().to(torch.bfloat16)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes_OI.int(), 1)
        return Int4(packed, pairs, codes_OI.shape[1] // scale.shape[1])

    def linear(self, x_MI: Tensor) -> Tensor:
        """`x @ W.T` for bf16 x."""
        return torch.as_tensor(torch.ops.aten._weight_int4pack_mm_for_cpu(x_MI, self.packed, self.group, self.scales))


@dataclass(frozen=True)
class Int8:
    """A weight with one symmetric scale a row, for `_weight_int8pack_mm`; scales are rounded to bf16."""

    codes: Tensor
    scales: Tensor

    @staticmethod
    def pack(codes_OI: Tensor, scale_O: Tensor) -> Int8:
        """Pack codes 0..255 that denote `scale * (code - 128)`."""
        return Int8((codes_OI.int() - 128).to(torch.int8).contiguous(), scale_O.to(torch.bfloat16).contiguous())

    def linear(self, x_MI: Tensor) -> Tensor:
        """`x @ W.T` for bf16 x."""
        return torch.as_tensor(torch.ops.aten._weight_int8pack_mm(x_MI, self.codes, self.scales))
