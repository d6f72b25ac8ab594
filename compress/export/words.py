"""Packs small codes in 32-bit words and in nibbles, the layouts that several formats share."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.weights.bits import pack_bits

WORD = 32


def to_words(codes_RC: Tensor, bits: int) -> Tensor:
    """Pack each row of codes into int32 words [rows, words], the first code in the lowest bits.

    Codes are below 2**bits, where bits divides 32; the last word of a row is padded with zeros.
    """
    codes_RC = F.pad(codes_RC, (0, -codes_RC.shape[1] % (WORD // bits)))
    return pack_bits(codes_RC, bits).view(torch.int32).view(codes_RC.shape[0], -1)


def from_words(words_RW: Tensor, bits: int) -> Tensor:
    """The codes in words, int32 [rows, codes]; the inverse of `to_words`, but padding is not removed."""
    shifts = torch.arange(0, WORD, bits, dtype=torch.int32)
    codes: Tensor = ((words_RW[..., None] >> shifts) & (2**bits - 1)).flatten(1)
    return codes


def to_nibbles(codes_RC: Tensor, *, first_low: bool) -> Tensor:
    """Pack codes below 16 in pairs, uint8 [rows, codes / 2]; the first of a pair is in the low or the high half."""
    even, odd = codes_RC[:, ::2].to(torch.uint8), codes_RC[:, 1::2].to(torch.uint8)
    return even | odd << 4 if first_low else even << 4 | odd
