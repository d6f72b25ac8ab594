"""Adds to y the product of each segment of rows with its tenant's signs or factors: kernels, launches and cases."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compress_kernels import formats
from compress_kernels.gpu import launch
from compress_kernels.gpu.aot import SUMS, Case
from compress_kernels.gpu.decode import sign
from compress_kernels.gpu.gemm import finish, load_x

INPUTS = 64  # inputs per step of the product with the right factor: one cache line of a row
RANKS = 64  # ranks per step of the product with the left factor
STAGES = {8: 4, 16: 4, 32: 2, 64: 2}  # pipeline stages by rows; each stage holds 512 inputs of them


@triton.jit
def segment(p_table, M, BM: tl.constexpr):
    """(first row, rows, row after the last, tenant) of a program's segment; rows beyond the segment are M."""
    p_own = p_table + 3 * tl.program_id(1)
    start, end, tenant = tl.load(p_own), tl.load(p_own + 1), tl.load(p_own + 2)
    o_m = start + tl.arange(0, BM)
    return start.to(tl.int64), tl.where(o_m < end, o_m, M), end, tenant.to(tl.int64)


@triton.jit
def held(p_y, o_n, o_m, N, M):
    """The present values of y [M, N], transposed, in the first of the programs that share a tile; zero in the others.

    They are read before any program stores, because only the last one to arrive does.
    """
    mask = (o_n < N)[:, None] & (o_m < M)[None, :] & (tl.program_id(2) == 0)
    return tl.load(p_y + o_m.to(tl.int64)[None, :] * N + o_n[:, None], mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _sign_segments_kernel(
    p_x, p_words, p_scale, p_table, p_y, p_work, p_count, M, N, K, R,
    WIDE: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr,
    ASM: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs, segments, splits of the blocks of inputs. WIDE: one scale per output."""
    P: tl.constexpr = 32
    BLOCK: tl.constexpr = 16 * P
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    start, o_m, end, tenant = segment(p_table, M, BM)
    o_row, p_first = tl.arange(0, BM), p_x + start * K
    o_p = tl.arange(0, P)
    blocks = tl.cdiv(K, BLOCK)
    p_tile = p_words + tenant * blocks * R * P + o_n[:, None] * P + o_p[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for i_b in range(tl.program_id(2), tl.where(end > 0, blocks, 0), SPLITS):  # segments that pad a table end at 0
        b_q = tl.load(p_tile + i_b * R * P, eviction_policy="evict_first")
        for j in tl.static_range(16):
            b_x = load_x(p_first, o_row, i_b * BLOCK + j * P + o_p, end - start, K, EVEN)
            acc = tl.dot(sign(b_q, j, p_x.dtype.element_ty, ASM), b_x, acc, input_precision="ieee")
    if WIDE:
        acc *= tl.load(p_scale + tenant * N + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
    else:
        acc *= tl.load(p_scale + tenant).to(tl.float32)
    acc += held(p_y, o_n, o_m, N, M)
    finish(acc, p_scale, p_y, p_work, p_count, o_n, o_m, N, M, False, SPLITS)


@triton.jit
def _segment_product_kernel(
    p_x, p_w, p_table, p_y, p_work, p_count, M, N, K,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr, EVEN: tl.constexpr, ADD: tl.constexpr,
):  # fmt: skip
    """y = x W^T, or with ADD y += x W^T, for one of the two factors; W [T, N, K] is that of each row's tenant."""
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    start, o_m, end, tenant = segment(p_table, M, BM)
    o_row, p_first = tl.arange(0, BM), p_x + start * K
    o_k = tl.arange(0, BK)
    o_w = tl.minimum(o_n, N - 1)  # rows beyond the last are read as the last, and not stored
    p_tile = p_w + tenant * N * K + o_w[:, None] * K + o_k[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for i_b in range(tl.program_id(2), tl.where(end > 0, tl.cdiv(K, BK), 0), SPLITS):
        k = i_b * BK
        if EVEN:
            b_w = tl.load(p_tile + k)
        else:
            b_w = tl.load(p_tile + k, mask=(k + o_k < K)[None, :], other=0.0)
        acc = tl.dot(b_w, load_x(p_first, o_row, k + o_k, end - start, K, EVEN), acc, input_precision="ieee")
    if ADD:
        acc += held(p_y, o_n, o_m, N, M)
    finish(acc, p_x, p_y, p_work, p_count, o_n, o_m, N, M, False, SPLITS)


def add_signs(y: Tensor, x: Tensor, words: Tensor, scale: Tensor, table: Tensor, tile: int, splits: int = 0) -> None:
    """`segments.sign_segments` for checked tensors on one device; with `splits` 0 they are chosen."""
    (m, n), k = y.shape, x.shape[1]
    blocks, outputs = words.shape[1], 64 if n % 128 else 128
    tiles = -(-n // outputs) * len(table)
    splits, stages = splits or launch.splits_for(tiles, blocks, x.device), STAGES[tile]
    chosen = launch.Config(rows=tile, outputs=outputs, splits=splits, stages=stages)
    work, count = launch.workspace(chosen, m, n, x.device)
    launch.run(
        _sign_segments_kernel, (-(-n // outputs), len(table), chosen.splits),
        x, words, scale, table, y, work, count, m, n, k, words.shape[2],
        WIDE=scale.shape[1] > 1, BM=tile, BN=outputs, SPLITS=chosen.splits, EVEN=k % formats.block(1) == 0,
        ASM=chosen.inline, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip


def add_low_rank(y: Tensor, x: Tensor, left: Tensor, right: Tensor, table: Tensor, tile: int, splits: int = 0) -> None:
    """`segments.low_rank_segments` for checked tensors on one device, in two launches; `splits` is for the first."""
    rank = right.shape[1]
    inner_MK = x.new_empty(len(x), rank)
    multiply(x, right, inner_MK, table, tile, INPUTS, splits, add=False)
    multiply(inner_MK, left, y, table, tile, min(RANKS, max(16, triton.next_power_of_2(rank))), splits=1, add=True)


def multiply(
    x: Tensor, w_TNK: Tensor, y: Tensor, table: Tensor, tile: int, width: int, splits: int, *, add: bool
) -> None:
    """Write the products with one factor to y, or add them to it."""
    (m, n), k = y.shape, x.shape[1]
    outputs = min(64, max(16, triton.next_power_of_2(n)))
    blocks, tiles = -(-k // width), -(-n // outputs) * len(table)
    chosen = launch.Config(rows=tile, outputs=outputs, splits=splits or launch.splits_for(tiles, blocks, x.device))
    work, count = launch.workspace(chosen, m, n, x.device)
    launch.run(
        _segment_product_kernel, (-(-n // outputs), len(table), chosen.splits),
        x, w_TNK, table, y, work, count, m, n, k, BM=tile, BN=outputs, BK=width, SPLITS=chosen.splits,
        EVEN=k % width == 0, ADD=add, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip


def signs_case(kind: str, rows: int, outputs: int) -> Case:
    """One product with signs to compile."""
    return Case(
        name=f"signs {kind} {rows}x{outputs}",
        kernel=_sign_segments_kernel,
        types=dict.fromkeys(("p_x", "p_y"), f"*{kind}") | SUMS | dict.fromkeys("MNKR", "i32")
        | {"p_words": "*i16", "p_scale": "*fp32", "p_table": "*i32"},
        constants={"WIDE": True, "BM": rows, "BN": outputs, "SPLITS": 1, "EVEN": True, "ASM": True},
        weights=outputs * formats.block(1),
        stages=STAGES[rows],
    )  # fmt: skip


def factor_case(rows: int, outputs: int, width: int, *, add: bool) -> Case:
    """One factor's product to compile."""
    return Case(
        name=f"{'left' if add else 'right'} {rows}x{outputs}x{width}",
        kernel=_segment_product_kernel,
        types=dict.fromkeys(("p_x", "p_w", "p_y"), "*bf16") | SUMS | dict.fromkeys("MNK", "i32") | {"p_table": "*i32"},
        constants={"BM": rows, "BN": outputs, "BK": width, "SPLITS": 1, "EVEN": True, "ADD": add},
        weights=outputs * width,
    )


CASES = [
    signs_case("bf16", 8, 128),
    signs_case("bf16", 64, 128),
    factor_case(8, 16, INPUTS, add=False),
    factor_case(8, 64, RANKS, add=True),
]
