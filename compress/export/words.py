"""Small codes in 32-bit words and in nibbles, the layouts that several formats share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.weights.bits import pack_bits

WORD = 32


def to_words(codes_RC: Tensor, bits: int) -> Tensor:
    """int32 [rows, words]: each row of codes (below 2**bits, bits dividing 32) end to end, the first lowest."""
    codes_RC = F.pad(codes_RC, (0, -codes_RC.shape[1] % (WORD // bits)))
    return pack_bits(codes_RC, bits).view(torch.int32).view(codes_RC.shape[0], -1)


def from_words(words_RW: Tensor, bits: int) -> Tensor:
    """int32 [rows, codes], the inverse of `to_words`; what was padded stays."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    codes: Tensor = ((words_RW[..., None] >> shifts) & (2**bits - 1)).flatten(1)
    return codes


def to_nibbles(codes_RC: Tensor, *, first_low: bool) -> Tensor:
    """uint8 [rows, codes / 2]: two codes below 16 a byte, the first in the low half or in the high one."""
    even, odd = codes_RC[:, ::2].to(torch.uint8), codes_RC[:, 1::2].to(torch.uint8)
    return even | odd << 4 if first_low else even << 4 | odd
