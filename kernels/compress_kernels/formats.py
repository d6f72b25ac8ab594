"""The memory layout of codes for the GPU kernels: K-plane words, tile by tile. Torch only; layouts are defined here.

The inputs of a matrix are divided into blocks; a block of a row is stored as PLACES words of 16 bits. Word p of a block
holds, from bit `bits * j` on, the code of input `j * PLACES + p` of the block. Plane j of the words thus belongs to
PLACES consecutive inputs, so that a kernel multiplies plane after plane without moving a value between lanes. Words are
stored as [blocks, rows, PLACES], so that the rows that one program reads are contiguous in memory.
Shape suffixes: O out, I in, R rows (out, padded to ROWS), B blocks, P places, J planes, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

PLACES = 32  # words per row of a block: 64 bytes, half of a cache line
ROWS = 64  # rows are padded to a multiple of this, the size of the smallest tile
WORD = 16


def planes(bits: int) -> int:
    """The number of codes in a word, which is the number of planes."""
    return WORD // bits


def block(bits: int, places: int = PLACES) -> int:
    """The number of inputs of one block: 512 for one bit, 128 for four, 64 for eight."""
    return places * planes(bits)


def padded(n: int, multiple: int) -> int:
    """`n` rounded up to a multiple."""
    return -(-n // multiple) * multiple


def pack_words(codes_OI: Tensor, bits: int, inputs: int | None = None, places: int = PLACES) -> Tensor:
    """Pack codes below 2**bits (bits 1, 2, 4 or 8) into int16 words [B, R, P]; padding in rows and blocks is 0.

    `inputs` pads to more blocks than the codes need, which formats with two sets of words use. Groups of 16 inputs need
    blocks with 16 `places`.
    """
    outputs, given = codes_OI.shape
    wide, rows = padded(inputs or given, block(bits, places)), padded(outputs, ROWS)
    whole_RI = F.pad(codes_OI.to(torch.int32), (0, wide - given, 0, rows - outputs))
    places_J = torch.arange(0, WORD, bits, dtype=torch.int32, device=codes_OI.device)
    parts_RBJP = whole_RI.view(rows, -1, planes(bits), places) << places_J[:, None]
    words_RBP = parts_RBJP.sum(2, dtype=torch.int32)
    return words_RBP.to(torch.int16).transpose(0, 1).contiguous()


def unpack_words(words_BRP: Tensor, bits: int) -> Tensor:
    """The specification: the codes [R, inputs] in words, int32, including padding."""
    places_J = torch.arange(0, WORD, bits, dtype=torch.int32, device=words_BRP.device)
    codes_BRJP: Tensor = (words_BRP[:, :, None].to(torch.int32) >> places_J[:, None]) & (2**bits - 1)
    return codes_BRJP.permute(1, 0, 2, 3).flatten(1)


def pack_groups(values_OG: Tensor) -> Tensor:
    """Transpose the values of groups of inputs to [G, R]; padding rows are 0."""
    padding = padded(values_OG.shape[0], ROWS) - values_OG.shape[0]
    return F.pad(values_OG, (0, 0, 0, padding)).T.contiguous()
