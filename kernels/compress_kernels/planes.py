"""Products with small integer codes that stay packed: several codes per byte, extracted with one AND and no shifts.

Codes are packed along the inputs: bit place p of row j of the bytes belongs to input p * J + j. One mask thus yields
whole rows of the transposed matrix, scaled by 2**place; that power of two is divided out of x instead of the matrix.
For a few rows of x on the CPU, torch's kernel for embedding bags with 8-bit rows sums the masked bytes weighted with x;
it handles the matrices of several tenants in one call. For more rows, the matrix is converted to float32 for one
product.
Shapes: N rows of x, O out, I in, J rows of bytes, P codes a byte, G groups of W inputs, K tenants.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import get_ident

import torch
from torch import Tensor

FEW_ROWS = 4  # rows of x per tenant up to which reading the bytes once for every row is no slower
AT_ONCE = 1 << 20  # bytes of masked codes made at a time, about an L2 cache; 2**18 to 2**22 were equally fast
TAIL = 8  # bytes at the end of each row, where the kernel expects the row's scale and offset in float32


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Pack codes below 2**bits (bits 1, 2, 4 or 8) into bytes [J, O]; padding in the last bytes is 0."""
    outputs, inputs = codes_OI.shape
    per = 8 // bits
    whole_IO = codes_OI.new_zeros(-(-inputs // per) * per, outputs, dtype=torch.uint8)
    whole_IO[:inputs] = codes_OI.T
    places_P = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes_OI.device)
    packed: Tensor = (whole_IO.view(per, -1, outputs) << places_P[:, None, None]).sum(0, dtype=torch.uint8)
    return packed


def unpack(words_JO: Tensor, bits: int, inputs: int) -> Tensor:
    """The specification: the codes [O, I] in packed bytes."""
    places_P = torch.arange(0, 8, bits, dtype=torch.uint8, device=words_JO.device)
    codes_PJO = (words_JO >> places_P[:, None, None]) & (2**bits - 1)
    return torch.as_tensor(codes_PJO.flatten(0, 1)[:inputs].T)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # otherwise the cached tensor could be used in inference mode only
def masks_of(bits: int, device: torch.device) -> Tensor:
    """The mask of each code of a byte, [P, 1, 1]."""
    places_P = torch.arange(0, 8, bits)
    return torch.as_tensor((2**bits - 1) << places_P).to(torch.uint8)[:, None, None].to(device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def undone(bits: int, inputs: int, device: torch.device) -> Tensor:
    """2**-place for every input, [I], which undoes the scaling of masked codes."""
    per = 8 // bits
    return (0.5 ** torch.arange(0, 8, bits)).repeat_interleave(-(-inputs // per))[:inputs].to(device)


def products(x_NI: Tensor, counts: Sequence[int], words: Sequence[Tensor], bits: int, groups: int = 1) -> Tensor:
    """Each tenant's rows of float32 x times its own codes, summed by group of inputs: [N, G, O].

    `counts[k]` is the number of rows of tenant k, whose packed codes are `words[k]`.
    """
    x_NI = x_NI * undone(bits, x_NI.shape[1], x_NI.device)
    if x_NI.device.type == "cpu" and max(counts) <= FEW_ROWS:
        step = max(1, AT_ONCE // (words[0].numel() * (8 // bits)))
        starts = range(0, len(words), step)
        if len(starts) == 1:
            return bags(x_NI, tuple(counts), words, bits, groups)
        xs = x_NI.split([sum(counts[start : start + step]) for start in starts])
        parts = zip(xs, starts, strict=True)
        return torch.cat([bags(x, tuple(counts[s : s + step]), words[s : s + step], bits, groups) for x, s in parts])
    each = zip(x_NI.split(list(counts)), words, strict=True)
    return torch.cat([product(x, some, bits, groups) for x, some in each])


def bags(x_NI: Tensor, counts: tuple[int, ...], words: Sequence[Tensor], bits: int, groups: int) -> Tensor:
    """The products for a few rows: sums of masked bytes, weighted with x."""
    masks_P11 = masks_of(bits, x_NI.device)
    rows, outputs = words[0].shape
    matrix = scratch(get_ident(), len(words), len(masks_P11), rows, outputs)
    for words_JO, codes_PJO in zip(words, matrix[..., :outputs].unbind(), strict=True):
        torch.bitwise_and(words_JO, masks_P11, out=codes_PJO)
    index, offsets = rows_of(counts, x_NI.shape[1], len(masks_P11) * rows, groups)
    y = KERNEL(matrix.view(-1, outputs + TAIL), index, offsets, False, 0, False, x_NI.view(-1), None, False)
    return torch.as_tensor(y).view(-1, groups, outputs)


KERNEL = torch.ops.quantized.embedding_bag_byte_rowwise_offsets.default


@lru_cache(maxsize=8)
def scratch(thread: int, tenants: int, per: int, rows: int, outputs: int) -> Tensor:
    """Scratch memory for the masked codes of one thread, [K, P, J, O + TAIL]: at most `AT_ONCE` bytes or one tenant.

    Every row ends with a scale of 1 and an offset of 0. The tensor is cached, because writing these took as long as
    masking.
    """
    with torch.inference_mode(False):  # otherwise it could be written in inference mode only
        matrix = torch.empty(tenants, per, rows, outputs + TAIL, dtype=torch.uint8)
        matrix[..., outputs:] = torch.tensor([1.0, 0.0]).view(torch.uint8)
        return matrix


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rows_of(counts: tuple[int, ...], inputs: int, held: int, groups: int) -> tuple[Tensor, Tensor]:
    """The index and offsets of the embedding bags.

    The index lists, for every row of x, the rows of its tenant's matrix, which has `held` rows; the offsets say where
    every group of inputs begins.
    """
    first_N = (torch.arange(len(counts)) * held).repeat_interleave(torch.tensor(counts))
    index = (first_N[:, None] + torch.arange(inputs)).flatten().int()
    return index, torch.arange(0, len(index), inputs // groups, dtype=torch.int32)


def product(x_NI: Tensor, words_JO: Tensor, bits: int, groups: int) -> Tensor:
    """The products for many rows: the codes as one float32 matrix."""
    w_IO = (words_JO & masks_of(bits, words_JO.device)).flatten(0, 1)[: x_NI.shape[1]].float()
    if groups == 1:
        return (x_NI @ w_IO)[:, None]
    return torch.bmm(x_NI.unflatten(1, (groups, -1)).transpose(0, 1), w_IO.unflatten(0, (groups, -1))).transpose(0, 1)
