"""Deltas of several tenants in one launch: each tenant's own product is added to the base's product for all rows.

The rows of x are sorted by tenant. An int32 table [S, 3] lists segments as (first row, row after the last, tenant). No
segment is longer than `tile` and none overlap; an empty segment does nothing, so that a table of fixed length can be
used in a CUDA graph. The tenants' tensors are stacked. The ops are `compress::sign_segments` (a scale times signs, one
bit per weight) and `compress::low_rank_segments` (two factors). Both change y in place. On the CPU they run the
specification; the fast path there is `planes.py`.
Shape suffixes: M rows of x, O out, I in, R padded rows, K rank, T tenants, S segments, B blocks, P places.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from compress_kernels import formats, given

TILES = (8, 16, 32, 64)


def table(counts: Sequence[int], tenants: Sequence[int], tile: int, length: int = 0) -> Tensor:
    """The table for rows of which `counts[i]` in turn belong to `tenants[i]`, padded to `length` with empty segments.

    Raises ValueError if there are more than `length` segments; 0 sets no limit.
    """
    segments, first = [], 0
    for count, tenant in zip(counts, tenants, strict=True):
        last = first + count
        segments += [(start, min(start + tile, last), tenant) for start in range(first, last, tile)]
        first = last
    if length and len(segments) > length:
        raise ValueError(f"{len(segments)} segments of {tile} rows; the table has {length}")
    segments += [(0, 0, 0)] * (length - len(segments))
    return torch.tensor(segments, dtype=torch.int32).view(-1, 3)


def pack_signs(positive_TOI: Tensor) -> Tensor:
    """Pack signs into words [T, B, R, P] with one bit per weight, set where positive."""
    return torch.stack([formats.pack_words(each_OI, 1) for each_OI in positive_TOI])


def signs(words_BRP: Tensor, shape: tuple[int, int]) -> Tensor:
    """The specification: a tenant's words as a float32 matrix [out, in] of 1 and -1."""
    outputs, inputs = shape
    return formats.unpack_words(words_BRP, 1)[:outputs, :inputs].float() * 2 - 1


def check(op: str, y: Tensor, x: Tensor, segments: Tensor, tile: int) -> None:
    """Check x, y and the table. Raises ValueError or TypeError that names the argument."""
    given.floats(f"{op}: x", x)
    if x.ndim != 2 or y.ndim != 2:
        raise ValueError(f"{op}: x and y must be matrices; they are {given.described(x)} and {given.described(y)}")
    given.expect(f"{op}: x", x, y, tuple(x.shape), y.dtype)
    given.expect(f"{op}: y", y, x, (x.shape[0], y.shape[1]), x.dtype)
    given.expect(f"{op}: segments", segments, x, (segments.shape[0], 3), torch.int32)
    if tile not in TILES:
        raise ValueError(f"{op}: tile is {tile}; allowed: {', '.join(map(str, TILES))}")


def check_signs(y: Tensor, x: Tensor, words: Tensor, scale: Tensor, segments: Tensor, tile: int) -> None:
    """Check all arguments of `sign_segments`; raises as `check`."""
    check("sign_segments", y, x, segments, tile)
    blocks, rows = -(-x.shape[1] // formats.block(1)), formats.padded(y.shape[1], formats.ROWS)
    tenants = words.shape[0]
    given.expect("sign_segments: words", words, x, (tenants, blocks, rows, formats.PLACES), torch.int16)
    each = 1 if tuple(scale.shape) == (tenants, 1) else y.shape[1]
    given.expect("sign_segments: scale", scale, x, (tenants, each), None)


def check_factors(y: Tensor, x: Tensor, left: Tensor, right: Tensor, segments: Tensor, tile: int) -> None:
    """Check all arguments of `low_rank_segments`; raises as `check`."""
    check("low_rank_segments", y, x, segments, tile)
    tenants, rank = left.shape[0], left.shape[-1]
    given.expect("low_rank_segments: left", left, x, (tenants, y.shape[1], rank), x.dtype)
    given.expect("low_rank_segments: right", right, x, (tenants, rank, x.shape[1]), x.dtype)


@torch.library.custom_op("compress::sign_segments", mutates_args=("y",), device_types="cpu")
def sign_segments(y: Tensor, x: Tensor, words: Tensor, scale: Tensor, segments: Tensor, tile: int) -> None:
    """y [M, O] += scale * (x @ signs.T) with each row's tenant, rounded once; scale is [T, 1] or [T, O]."""
    check_signs(y, x, words, scale, segments, tile)
    for start, end, tenant in segments.tolist():
        part_MO = x[start:end].float() @ signs(words[tenant], (y.shape[1], x.shape[1])).T
        y[start:end] = y[start:end].float() + part_MO * scale[tenant].float()


@sign_segments.register_kernel("cuda")
def _(y: Tensor, x: Tensor, words: Tensor, scale: Tensor, segments: Tensor, tile: int) -> None:
    from compress_kernels.gpu import segments as gpu

    check_signs(y, x, words, scale, segments, tile)
    gpu.add_signs(y, x, words, scale, segments, tile)


@sign_segments.register_fake
def _(y: Tensor, x: Tensor, words: Tensor, scale: Tensor, segments: Tensor, tile: int) -> None:
    return None


@torch.library.custom_op("compress::low_rank_segments", mutates_args=("y",), device_types="cpu")
def low_rank_segments(y: Tensor, x: Tensor, left: Tensor, right: Tensor, segments: Tensor, tile: int) -> None:
    """y [M, O] += (x @ right.T) @ left.T with each row's tenant; left is [T, O, K], right [T, K, I].

    Computed in float32; on a GPU the inner product is rounded to the dtype of x.
    """
    check_factors(y, x, left, right, segments, tile)
    for start, end, tenant in segments.tolist():
        inner_MK = x[start:end].float() @ right[tenant].float().T
        y[start:end] = y[start:end].float() + inner_MK @ left[tenant].float().T


@low_rank_segments.register_kernel("cuda")
def _(y: Tensor, x: Tensor, left: Tensor, right: Tensor, segments: Tensor, tile: int) -> None:
    from compress_kernels.gpu import segments as gpu

    check_factors(y, x, left, right, segments, tile)
    gpu.add_low_rank(y, x, left, right, segments, tile)


@low_rank_segments.register_fake
def _(y: Tensor, x: Tensor, left: Tensor, right: Tensor, segments: Tensor, tile: int) -> None:
    return None
