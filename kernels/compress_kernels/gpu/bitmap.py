"""y = x W^T for weights with unstructured sparsity, stored as a bitmap and values: kernels, launches and cases.

The layout is described in `compress_kernels/bitmap.py`.
"""

from __future__ import annotations

from dataclasses import replace

import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import bitmap, dispatch, low_rank
from compress_kernels.gpu import asm_spread, launch
from compress_kernels.gpu.aot import SUMS, Case
from compress_kernels.gpu.gemm import add_low_rank, finish, load_x

DENSE_TILE = 32  # rows of the matrix that one program decodes
COUNT = tl.constexpr(asm_spread.COUNT)


@triton.jit
def ones(b_v, ASM: tl.constexpr):
    """How many bits of each int32 are set."""
    if ASM:
        return tl.inline_asm_elementwise(COUNT, "=r,r", [b_v], dtype=tl.int32, is_pure=True, pack=1)
    else:
        b_v = b_v - ((b_v >> 1) & 0x55555555)
        b_v = (b_v & 0x33333333) + ((b_v >> 2) & 0x33333333)
        b_v = (b_v + (b_v >> 4)) & 0x0F0F0F0F
        return ((b_v * 0x01010101) >> 24) & 0xFF


@triton.jit
def decoded(p_values, b_bits, b_at, ASM: tl.constexpr):
    """32 weights of each row, from its bits and the position of its first kept value.

    The caller advances the position by `ones(b_bits)`.
    """
    one = (1 << tl.arange(0, 32))[None, :]
    b_before = ones(b_bits[:, None] & (one - 1), ASM)
    return tl.load((p_values + b_at)[:, None] + b_before, mask=(b_bits[:, None] & one) != 0, other=0.0)


@triton.jit
def _bitmap_linear_kernel(
    p_x, p_bits, p_offsets, p_values, p_t, p_u, p_bias, p_y, p_work, p_count, M, N, K, R,
    BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs, tiles of rows, splits of the blocks of inputs."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_row, i_m = tl.arange(0, BM), tl.program_id(1) * BM
    o_m, p_first = i_m + o_row, p_x + i_m.to(tl.int64) * K
    o_k = tl.arange(0, 32)
    acc = tl.zeros((BN, BM), tl.float32)
    for i_b in range(tl.program_id(2), tl.cdiv(K, 512), SPLITS):
        b_at = tl.load(p_offsets + i_b * R + o_n)
        for j in range(16):
            b_bits = tl.load(p_bits + (i_b * 16 + j) * R + o_n)
            b_w = decoded(p_values, b_bits, b_at, ASM)
            b_x = load_x(p_first, o_row, i_b * 512 + j * 32 + o_k, M - i_m, K, EVEN)
            acc = tl.dot(b_w, b_x, acc, input_precision="ieee")
            b_at += ones(b_bits, ASM)
    acc = add_low_rank(acc, p_t, p_u, o_n, o_m, N, M, RANK)
    finish(acc, p_bias, p_y, p_work, p_count, o_n, o_m, N, M, BIAS, SPLITS)


@triton.jit
def _bitmap_dense_kernel(p_bits, p_offsets, p_values, p_y, N, K, R, BN: tl.constexpr, ASM: tl.constexpr):
    """Programs: tiles of outputs, blocks of inputs."""
    i_b = tl.program_id(1)
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    b_at = tl.load(p_offsets + i_b * R + o_n)
    for j in range(16):
        b_bits = tl.load(p_bits + (i_b * 16 + j) * R + o_n)
        b_w = decoded(p_values, b_bits, b_at, ASM)
        o_k = i_b * 512 + j * 32 + tl.arange(0, 32)
        m_y = (o_n < N)[:, None] & (o_k < K)[None, :]
        tl.store(p_y + o_n.to(tl.int64)[:, None] * K + o_k[None, :], b_w, mask=m_y)
        b_at += ones(b_bits, ASM)


def product(x: Tensor, w: bitmap.Packed, bias: Tensor | None) -> Tensor:
    """`x @ W.T + bias` of checked tensors, by the kernel or, for many rows, with a dense copy of the matrix."""
    x_MI = x.reshape(-1, x.shape[-1]).contiguous()
    if dispatch.decodes(w.kind, x_MI.shape[0], *w.shape, x.device, dispatch.BITMAP_DENSE_ABOVE):
        y = F.linear(x, dense(w), None if bias is None else bias.to(x.dtype))
        return y if w.u is None or w.v is None else y + low_rank.term(x, w.u, w.v)
    return linear(x_MI, w, bias).view(*x.shape[:-1], w.shape[0])


def dense(w: bitmap.Packed) -> Tensor:
    """The matrix [out, in] of a checked weight, without the low-rank term."""
    n, k = w.shape
    y_OI = w.values.new_empty(n, k)
    launch.run(
        _bitmap_dense_kernel, (-(-n // DENSE_TILE), w.bits.shape[0]),
        w.bits, w.offsets, w.values, y_OI, n, k, w.bits.shape[2], BN=DENSE_TILE, ASM=not launch.interpreted(),
    )  # fmt: skip
    return y_OI


def linear(x_MI: Tensor, w: bitmap.Packed, bias: Tensor | None, config: launch.Config | None = None) -> Tensor:
    """`x @ W.T + bias` of checked, contiguous tensors on one device, all of one 16-bit dtype."""
    m, k = x_MI.shape
    n = w.shape[0]
    tuned = launch.tuned(w.kind, m, n, k, len(w.bits), x_MI.device)
    tile = replace(launch.heuristic(m, n, x_MI.device), outputs=64)  # with 128, registers spill
    chosen = config or tuned or launch.split(tile, m, n, w.bits.shape[0], x_MI.device)
    y_MN = x_MI.new_empty(m, n)
    t_MR = x_MI if w.v is None else low_rank.inner(x_MI, w.v)
    work, counters = launch.workspace(chosen, m, n, x_MI.device)
    grid = (-(-n // chosen.outputs), -(-m // chosen.rows), chosen.splits)
    launch.run(
        _bitmap_linear_kernel, grid,
        x_MI, w.bits, w.offsets, w.values, t_MR, x_MI if w.u is None else w.u, x_MI if bias is None else bias,
        y_MN, work, counters, m, n, k, w.bits.shape[2],
        BM=chosen.rows, BN=chosen.outputs, SPLITS=chosen.splits, RANK=0 if w.u is None else w.u.shape[1],
        BIAS=bias is not None, EVEN=k % bitmap.BLOCK == 0, ASM=chosen.inline,
        num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return y_MN


def types(kind: str) -> dict[str, str]:
    """The types of the arguments that the kernels share."""
    floats = dict.fromkeys(("p_x", "p_values", "p_t", "p_u", "p_bias", "p_y"), f"*{kind}")
    return floats | SUMS | {"p_bits": "*i32", "p_offsets": "*i32"} | dict.fromkeys("MNKR", "i32")


def case(kind: str, rows: int, outputs: int) -> Case:
    """One configuration to compile."""
    return Case(
        name=f"bitmap {kind} {rows}x{outputs}",
        kernel=_bitmap_linear_kernel,
        types=types(kind),
        constants={
            "BM": rows, "BN": outputs, "SPLITS": 4, "RANK": 0, "BIAS": False, "EVEN": True, "ASM": True,
        },
        weights=outputs * 32,
    )  # fmt: skip


CASES = [
    case("bf16", 8, 64),
    case("bf16", 16, 64),
    Case(
        name="bitmap dense bf16",
        kernel=_bitmap_dense_kernel,
        types=types("bf16"),
        constants={"BN": DENSE_TILE, "ASM": True},
        weights=DENSE_TILE * 32,
    ),
]
