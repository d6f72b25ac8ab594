"""y = x W^T for N:M weights stored as values and bitmaps: kernels, launches and cases.

There are three kernels: the product; the permutation of x that makes its planes contiguous, launched before it; and
the decoding to a dense matrix, for many rows of x. The layout is described in `compress_kernels/nm.py`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import dispatch, low_rank, nm
from compress_kernels.gpu import launch
from compress_kernels.gpu.aot import SUMS, Case
from compress_kernels.gpu.gemm import add_low_rank, finish, group
from compress_kernels.gpu.spread import less, nibbles, spread, spread_packed, value

DENSE_TILE = 32  # rows of the matrix that one program decodes
SHARED = 81_920  # target for a program's buffers in bytes: two programs fit a multiprocessor of any GPU since the A100


@triton.jit
def _nm_linear_kernel(
    p_x, p_mask, p_values, p_scale, p_zero, p_t, p_u, p_bias, p_y, p_work, p_count, M, N, K, R,
    FORMAT: tl.constexpr, KEEP: tl.constexpr, OF: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr,
    BIAS: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs, tiles of rows, splits of the blocks of inputs. x is the result of `planes`."""
    BLOCK: tl.constexpr = 16 * P
    RUNS: tl.constexpr = 16 // OF
    RUN: tl.constexpr = OF * P
    PER: tl.constexpr = 1 if FORMAT == "half" else 2 if FORMAT == "int8" or FORMAT == "fp8" else 4
    WORDS: tl.constexpr = (RUNS * KEEP + PER - 1) // PER
    UNTIL: tl.constexpr = RUNS if GROUP == 0 or GROUP >= BLOCK else GROUP // RUN
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    blocks = tl.cdiv(K, BLOCK)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_p = tl.arange(0, P)
    o_tile = o_n[:, None] * P + o_p[None, :]
    p_first = p_x + (tl.program_id(1) * BM).to(tl.int64) * (blocks * BLOCK)  # within a tile 32 bits suffice
    p_tile = p_first + tl.arange(0, BM)[None, :] * (blocks * BLOCK) + o_p[:, None]
    acc = tl.zeros((BN, BM), tl.float32)
    for i_b in range(tl.program_id(2), blocks, SPLITS):
        b_mask = tl.load(p_mask + i_b * R * P + o_tile, eviction_policy="evict_first")
        b_part = acc if GROUP == 0 else tl.zeros((BN, BM), tl.float32)
        b_z = b_mask
        if FORMAT == "nibble":
            words = packed_words(p_values + i_b * WORDS * R * P + o_tile, b_mask, R, P, KEEP, ASM)
        for g in tl.static_range(RUNS):
            if GROUP != 0 and g % UNTIL == 0:  # loaded long before it is used
                b_s = numbers(p_scale, i_b * BLOCK + g * RUN, K, R, o_n, GROUP)
            if ZERO and g % UNTIL == 0:
                b_z = numbers(p_zero, i_b * BLOCK + g * RUN, K, R, o_n, GROUP).to(DTYPE)
            if FORMAT == "nibble":
                planes = nibbles(words, b_z, g, ZERO, DTYPE, ASM)
            else:
                values = tl.tuple(())
                for i in tl.static_range(KEEP):
                    if (g * KEEP + i) % PER == 0:
                        o_word = (i_b * WORDS + (g * KEEP + i) // PER) * R * P
                        b_q = tl.load(p_values + o_word + o_tile, eviction_policy="evict_first")
                    b_v = value(b_q, g * KEEP + i, FORMAT, DTYPE, ASM)
                    if ZERO:
                        b_v = less(b_v, b_z, DTYPE, ASM)
                    values = values + (b_v,)
                planes = spread(values, b_mask, g, KEEP, OF, ASM)
            for e in tl.static_range(OF):
                b_x = tl.load(
                    p_tile + (i_b * BLOCK + g * RUN + e * P), mask=(o_m < M)[None, :], other=0.0,
                    eviction_policy="evict_last",
                )  # fmt: skip
                b_part = tl.dot(planes[e].to(DTYPE, bitcast=True), b_x, b_part, input_precision="ieee")
            if GROUP != 0 and (g + 1) % UNTIL == 0:
                acc += b_part * b_s[:, None]
                b_part = tl.zeros((BN, BM), tl.float32)
        if GROUP == 0:
            acc = b_part
    if GROUP == 0 and FORMAT != "half":
        acc *= tl.load(p_scale + o_n).to(tl.float32)[:, None]
    acc = add_low_rank(acc, p_t, p_u, o_n, o_m, N, M, RANK)
    finish(acc, p_bias, p_y, p_work, p_count, o_n, o_m, N, M, BIAS, SPLITS)


@triton.jit
def packed_words(p_words, b_mask, R, P: tl.constexpr, KEEP: tl.constexpr, ASM: tl.constexpr):
    """Words of four codes for each of the four elements of the groups of a block, masked while packed."""
    slots = tl.tuple(())
    for i in tl.static_range(KEEP):
        slots = slots + (tl.load(p_words + i * R * P, eviction_policy="evict_first"),)
    return spread_packed(slots, b_mask, KEEP, ASM)


@triton.jit
def numbers(p_values, k, K, R, o_n, GROUP: tl.constexpr):
    """The scale or zero of each row for the group of input k, float32."""
    return tl.load(p_values + group(k, K, GROUP, False) * R + o_n).to(tl.float32)


@triton.jit
def _nm_planes_kernel(p_x, p_y, K, OF: tl.constexpr, P: tl.constexpr):
    """Programs: rows of x, blocks of inputs. Element e of group p of a run moves to place p of plane e."""
    BLOCK: tl.constexpr = 16 * P
    o = tl.arange(0, BLOCK)
    o_from = tl.program_id(1) * BLOCK + o // (OF * P) * (OF * P) + o % P * OF + o // P % OF
    i_m = tl.program_id(0).to(tl.int64)
    b_x = tl.load(p_x + i_m * K + o_from, mask=o_from < K, other=0.0)
    tl.store(p_y + (i_m * tl.num_programs(1) + tl.program_id(1)) * BLOCK + o, b_x)


@triton.jit
def _nm_dense_kernel(
    p_mask, p_values, p_scale, p_zero, p_y, N, K, R,
    FORMAT: tl.constexpr, KEEP: tl.constexpr, OF: tl.constexpr, GROUP: tl.constexpr, ZERO: tl.constexpr,
    P: tl.constexpr, BN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs, blocks of inputs. Values are scaled in float32 and rounded once."""
    BLOCK: tl.constexpr = 16 * P
    RUNS: tl.constexpr = 16 // OF
    RUN: tl.constexpr = OF * P
    PER: tl.constexpr = 1 if FORMAT == "half" else 2 if FORMAT == "int8" or FORMAT == "fp8" else 4
    WORDS: tl.constexpr = (RUNS * KEEP + PER - 1) // PER
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    i_b = tl.program_id(1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_tile = o_n[:, None] * P + tl.arange(0, P)[None, :]
    b_mask = tl.load(p_mask + i_b * R * P + o_tile)
    b_z = b_mask
    if FORMAT == "nibble":
        words = packed_words(p_values + i_b * WORDS * R * P + o_tile, b_mask, R, P, KEEP, ASM)
    for g in tl.static_range(RUNS):
        if ZERO:
            b_z = numbers(p_zero, i_b * BLOCK + g * RUN, K, R, o_n, GROUP).to(DTYPE)
        if FORMAT == "nibble":
            planes = nibbles(words, b_z, g, ZERO, DTYPE, ASM)
        else:
            values = tl.tuple(())
            for i in tl.static_range(KEEP):
                if (g * KEEP + i) % PER == 0:
                    b_q = tl.load(p_values + (i_b * WORDS + (g * KEEP + i) // PER) * R * P + o_tile)
                b_v = value(b_q, g * KEEP + i, FORMAT, DTYPE, ASM)
                if ZERO:
                    b_v = less(b_v, b_z, DTYPE, ASM)
                values = values + (b_v,)
            planes = spread(values, b_mask, g, KEEP, OF, ASM)
        b_w = in_order(planes, OF).to(DTYPE, bitcast=True)
        if FORMAT != "half":
            b_s = numbers(p_scale, i_b * BLOCK + g * RUN, K, R, o_n, GROUP)
            b_w = (b_w.to(tl.float32) * b_s[:, None]).to(DTYPE)
        o_k = i_b * BLOCK + g * RUN + tl.arange(0, RUN)
        m_y = (o_n < N)[:, None] & (o_k < K)[None, :]
        tl.store(p_y + o_n.to(tl.int64)[:, None] * K + o_k[None, :], b_w, mask=m_y)


@triton.jit
def in_order(planes, OF: tl.constexpr):
    """Interleave the planes [n, P] of elements 0 to OF - 1 to one [n, P * OF]."""
    if OF == 2:
        return tl.interleave(planes[0], planes[1])
    else:
        HALF: tl.constexpr = OF // 2
        pairs = tl.tuple(())
        for e in tl.static_range(HALF):
            pairs = pairs + (tl.interleave(planes[e], planes[e + HALF]),)
        return in_order(pairs, HALF)


def product(x: Tensor, ready: Tensor | None, w: nm.Packed, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` of checked tensors, by the kernel or, for many rows, with a dense copy of the matrix.

    `ready` is the result of `planes` for x, or None.
    """
    x_MI = x.reshape(-1, x.shape[-1]).contiguous()
    rows = x_MI.shape[0]
    if dispatch.decodes(w.kind, rows, *w.shape, x.device, dispatch.HALF_DENSE_ABOVE):
        y = F.linear(x, dense(w, x.dtype), None if bias is None else bias.to(x.dtype))
        return y if w.u is None or w.v is None else y + low_rank.term(x, w.u, w.v)
    x_MK = planes(x_MI, w.of, w.mask.shape[2]) if ready is None else ready.reshape(rows, -1)
    t_MR = None if w.v is None else low_rank.inner(x_MI, w.v)
    return linear(x_MK, t_MR, w, bias).view(*x.shape[:-1], w.shape[0])


def planes(x_MI: Tensor, of: int, count: int) -> Tensor:
    """x in the order of planes, padded to whole blocks."""
    m, k = x_MI.shape
    blocks = -(-k // (16 * count))
    y_MK = x_MI.new_empty(m, blocks * 16 * count)
    launch.run(_nm_planes_kernel, (m, blocks), x_MI, y_MK, k, OF=of, P=count, num_warps=1)
    return y_MK


def dense(w: nm.Packed, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] of a checked weight in a 16-bit float dtype, without the low-rank term."""
    n, k = w.shape
    blocks, rows, count = w.mask.shape
    y_OI = w.mask.new_empty(n, k, dtype=dtype)
    launch.run(
        _nm_dense_kernel, (-(-n // DENSE_TILE), blocks),
        *weight(w), y_OI, n, k, rows,
        **formed(w), P=count, BN=DENSE_TILE, ASM=not launch.interpreted(), num_warps=4,
    )  # fmt: skip
    return y_OI


def linear(
    x_MK: Tensor, t_MR: Tensor | None, w: nm.Packed, bias: Tensor | None, config: launch.Config | None = None
) -> Tensor:
    """`x @ W.T + bias` of checked, contiguous tensors on one device; x is the result of `planes`, t is `V x`."""
    m, (n, k) = x_MK.shape[0], w.shape
    rows, count = w.mask.shape[1:]
    chosen = config or launch.tuned(w.kind, m, n, k, len(w.mask), x_MK.device) or heuristic(m, n, w, x_MK.device)
    y_MN = x_MK.new_empty(m, n)
    work, counters = launch.workspace(chosen, m, n, x_MK.device)
    grid = (-(-n // chosen.outputs), -(-m // chosen.rows), chosen.splits)
    launch.run(
        _nm_linear_kernel, grid,
        x_MK, *weight(w), some(t_MR, x_MK), some(w.u, x_MK), some(bias, x_MK), y_MN, work, counters, m, n, k, rows,
        **formed(w), P=count, BM=chosen.rows, BN=chosen.outputs, SPLITS=chosen.splits,
        RANK=0 if w.u is None else w.u.shape[1], BIAS=bias is not None,
        ASM=chosen.inline, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return y_MN


def heuristic(m: int, n: int, w: nm.Packed, device: torch.device) -> launch.Config:
    """As `launch.heuristic`, but with tiles whose blocks of inputs, which are long here, fit the shared memory.

    For few rows there are two warps and twice as many programs, so that a thread has more weights over which to spread
    the cost of the loop; not if a group has so many slots that registers would spill.
    """
    blocks, _, count = w.mask.shape
    chosen = launch.heuristic(m, n, device)
    most = 64 if launch.shared(device) > 200_000 else 32  # before Hopper, 64 rows spill registers in some formats
    rows = min(most, chosen.rows)
    outputs = 64 if w.of > 4 or rows > 16 or w.format == "int8" else chosen.outputs
    warps = 2 if outputs == 64 and rows <= 16 and w.of <= 8 and w.keep <= 4 else 4
    if warps == 4:
        rows = max(rows, 256 // count)  # at least two values of x per thread: one alone is not copied asynchronously
    block = 2 * count * (outputs * (1 + w.values.shape[1]) + 16 * rows)
    most = 2 if w.format == "int8" else 3 if w.format == "int4" else 4  # with more stages, registers spill
    stages = min(most, 1 + max(1, SHARED // block))
    fitted = replace(chosen, rows=rows, outputs=outputs, warps=warps, stages=stages)
    return launch.split(fitted, m, n, blocks, device)


def weight(w: nm.Packed) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Mask, the bits of the values, scale and zero point, as arguments of the kernels."""
    return w.mask, w.values.view(torch.int16), some(w.scale, w.mask), some(w.zero, w.mask)


def formed(w: nm.Packed) -> dict[str, Any]:
    """The constants that say how a weight is stored."""
    return {"FORMAT": w.format, "KEEP": w.keep, "OF": w.of, "GROUP": w.group, "ZERO": w.zero is not None}


def some(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor, or `other` in its place as a pointer that is not read."""
    return other if tensor is None else tensor


def case(
    format: str, keep: int, of: int, rows: int, outputs: int, *,
    kind: str = "bf16", group: int = 0, zero: bool = False, rank: int = 0, warps: int = 4,
) -> Case:  # fmt: skip
    """One configuration to compile; its name has `2w` if there are two warps."""
    count = nm.words_of(of, group)
    extra = f" g{group}" * bool(group) + " zero" * zero + f" r{rank}" * bool(rank) + " 2w" * (warps == 2)
    return Case(
        name=f"nm {keep}:{of} {format}{extra} {kind} {rows}x{outputs}",
        kernel=_nm_linear_kernel,
        types=types(kind) | SUMS,
        constants={
            "FORMAT": format, "KEEP": keep, "OF": of, "GROUP": group, "ZERO": zero, "P": count,
            "BM": rows, "BN": outputs, "SPLITS": 4, "RANK": rank, "BIAS": False, "ASM": True,
        },
        weights=outputs * 16 * count,
        warps=warps,
        stages=2,
    )  # fmt: skip


def types(kind: str) -> dict[str, str]:
    """The types of the arguments that the kernels share."""
    floats = dict.fromkeys(("p_x", "p_t", "p_u", "p_bias", "p_y"), f"*{kind}")
    words = dict.fromkeys(("p_mask", "p_values"), "*i16")
    return floats | words | dict.fromkeys(("p_scale", "p_zero"), "*fp16") | dict.fromkeys("MNKR", "i32")


CASES = [
    case("half", 2, 4, 8, 128),
    case("half", 2, 4, 16, 64, rank=64, warps=2),
    case("half", 2, 4, 64, 64),
    case("nibble", 2, 4, 8, 128, kind="fp16", group=128),
    case("nibble", 2, 4, 8, 128, group=128, zero=True),
    case("int4", 2, 8, 8, 64, group=128, zero=True, warps=2),
    case("int8", 2, 4, 16, 64, group=128, zero=True, warps=2),
    case("fp8", 2, 4, 8, 128, group=128),
    case("half", 1, 4, 8, 128),
    case("half", 4, 8, 8, 64, warps=2),
    Case(
        name="nm planes", kernel=_nm_planes_kernel, types=types("bf16"), constants={"OF": 4, "P": 32}, warps=1
    ),
    Case(
        name="nm dense 2:4 nibble",
        kernel=_nm_dense_kernel,
        types=types("bf16"),
        constants={
            "FORMAT": "nibble", "KEEP": 2, "OF": 4, "GROUP": 128, "ZERO": True, "P": 32, "BN": DENSE_TILE, "ASM": True
        },
    ),
]  # fmt: skip
