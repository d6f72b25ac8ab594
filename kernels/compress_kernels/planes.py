"""Products with small integer codes that stay packed: several codes a byte, one AND a product, no shifts.

Codes are packed along the inputs: bit place p of row j of the bytes belongs to input p * J + j. So a mask gives whole
rows of the transposed matrix at once, times 2**place, and the power of two is taken from x instead of from the matrix.
For a few rows of x on the CPU, the masked bytes are summed as they are, weighted with x, by the kernel that torch has
for bags of embeddings kept in bytes; it takes the matrices of several tenants in one call. For more rows, the matrix is
made float32 for one product.
Shapes: N rows of x, O out, I in, J rows of bytes, P codes a byte, G groups of W inputs, K tenants.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from threading import get_ident

import torch
from torch import Tensor

FEW_ROWS = 4  # of one tenant, up to which reading the bytes once a row is no slower
AT_ONCE = 1 << 20  # bytes of masked codes made at a time, about a second-level cache; 2**18 to 2**22 were as fast
TAIL = 8  # bytes behind each row, in which the kernel finds the row's scale and offset, as float32


def pack(codes_OI: Tensor, bits: int) -> Tensor:
    """Codes below 2**bits, bits 1, 2, 4 or 8, as bytes [J, O]; inputs missing in the last bytes are 0."""
    outputs, inputs = codes_OI.shape
    per = 8 // bits
    whole_IO = codes_OI.new_zeros(-(-inputs // per) * per, outputs, dtype=torch.uint8)
    whole_IO[:inputs] = codes_OI.T
    places_P = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes_OI.device)
    packed: Tensor = (whole_IO.view(per, -1, outputs) << places_P[:, None, None]).sum(0, dtype=torch.uint8)
    return packed


def unpack(words_JO: Tensor, bits: int, inputs: int) -> Tensor:
    """The codes [O, I] that bytes hold: the specification."""
    places_P = torch.arange(0, 8, bits, dtype=torch.uint8, device=words_JO.device)
    codes_PJO = (words_JO >> places_P[:, None, None]) & (2**bits - 1)
    return torch.as_tensor(codes_PJO.flatten(0, 1)[:inputs].T)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # else what is cached could serve inference only
def masks_of(bits: int, device: torch.device) -> Tensor:
    """The mask of each code of a byte, [P, 1, 1]."""
    places_P = torch.arange(0, 8, bits)
    return torch.as_tensor((2**bits - 1) << places_P).to(torch.uint8)[:, None, None].to(device)


@lru_cache(maxsize=256)
@torch.inference_mode(False)
def undone(bits: int, inputs: int, device: torch.device) -> Tensor:
    """2**-place of every input, [I]."""
    per = 8 // bits
    return (0.5 ** torch.arange(0, 8, bits)).repeat_interleave(-(-inputs // per))[:inputs].to(device)


def products(x_NI: Tensor, counts: Sequence[int], words: Sequence[Tensor], bits: int, groups: int = 1) -> Tensor:
    """Each tenant's rows of float32 x, `counts` of them, times its own codes, group by group: [N, G, O]."""
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
    """For a few rows: sums of masked bytes, weighted with x."""
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
    """Memory for masked codes [K, P, J, O + TAIL] of one thread, at most `AT_ONCE` bytes or one tenant's.

    Every row ends in a scale of 1 and an offset of 0. It is kept, for to write these cost as much as to mask.
    """
    with torch.inference_mode(False):  # else only inference could write to it
        matrix = torch.empty(tenants, per, rows, outputs + TAIL, dtype=torch.uint8)
        matrix[..., outputs:] = torch.tensor([1.0, 0.0]).view(torch.uint8)
        return matrix


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def rows_of(counts: tuple[int, ...], inputs: int, held: int, groups: int) -> tuple[Tensor, Tensor]:
    """For every row of x the rows of its tenant's matrix, of `held` each, end to end; where every group begins."""
    first_N = (torch.arange(len(counts)) * held).repeat_interleave(torch.tensor(counts))
    index = (first_N[:, None] + torch.arange(inputs)).flatten().int()
    return index, torch.arange(0, len(index), inputs // groups, dtype=torch.int32)


def product(x_NI: Tensor, words_JO: Tensor, bits: int, groups: int) -> Tensor:
    """For many rows: one float32 matrix."""
    w_IO = (words_JO & masks_of(bits, words_JO.device)).flatten(0, 1)[: x_NI.shape[1]].float()
    if groups == 1:
        return (x_NI @ w_IO)[:, None]
    return torch.bmm(x_NI.unflatten(1, (groups, -1)).transpose(0, 1), w_IO.unflatten(0, (groups, -1))).transpose(0, 1)
