"""Rounds rows to 8 bits in one launch, and multiplies two 8-bit matrices, y = x W^T: kernels, launches and cases."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_kernels import w8a8
from compress_kernels.gpu import launch
from compress_kernels.gpu.aot import SUMS, Case
from compress_kernels.gpu.gemm import finish, load_x

INPUTS = 128  # inputs per step, one cache line of a row; then fp8 sums, held in fewer bits, are added to float32 ones
ROW = 4096  # entries of a row that a program holds at a time
FLOOR = tl.constexpr(w8a8.FLOOR)
INF = tl.constexpr(float("inf"))
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit
def _quantize_rows_kernel(p_x, p_codes, p_scale, K, LIMIT: tl.constexpr, BLOCK: tl.constexpr):
    """One program per row. Divisions round to nearest: the results of `/` may be off by a bit, which changes codes."""
    i_m = tl.program_id(0)
    p_row = p_x + i_m.to(tl.int64) * K
    o_k = tl.arange(0, BLOCK)
    b_top = tl.zeros((BLOCK,), tl.float32)
    for k in range(0, K, BLOCK):
        b_x = tl.abs(tl.load(p_row + k + o_k, mask=k + o_k < K, other=0.0).to(tl.float32))
        b_top = tl.maximum(b_top, tl.where(b_x < INF, b_x, INF))  # NaN counts as infinite
    largest = tl.maximum(tl.max(b_top, 0), FLOOR)
    finite = largest < INF
    scale = tl.math.div_rn(tl.where(finite, largest, LIMIT), tl.full((), LIMIT, tl.float32))
    for k in range(0, K, BLOCK):
        b_x = tl.load(p_row + k + o_k, mask=k + o_k < K, other=0.0).to(tl.float32)
        b_step = tl.math.div_rn(tl.where(finite, b_x, 0.0), tl.zeros_like(b_x) + scale)
        if p_codes.dtype.element_ty == tl.int8:
            b_step = (b_step + NEAREST) - NEAREST
        else:
            b_step = tl.minimum(tl.maximum(b_step, -LIMIT), LIMIT)
        tl.store(p_codes + i_m.to(tl.int64) * K + k + o_k, b_step.to(p_codes.dtype.element_ty), mask=k + o_k < K)
    tl.store(p_scale + i_m, tl.where(finite, scale, float("nan")))


@triton.jit
def _w8a8_linear_kernel(
    p_x, p_row, p_w, p_scale, p_bias, p_y, p_work, p_count, M, N, K,
    GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, SPLITS: tl.constexpr,
    BIAS: tl.constexpr, EVEN: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs, tiles of rows, splits of the inputs. GROUP 0 is one group per row."""
    SUM: tl.constexpr = tl.int32 if p_x.dtype.element_ty == tl.int8 else tl.float32
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_row, i_m = tl.arange(0, BM), tl.program_id(1) * BM
    o_m, p_first = i_m + o_row, p_x + i_m.to(tl.int64) * K
    o_k = tl.arange(0, BK)
    o_w = tl.minimum(o_n, N - 1)  # rows beyond the last are read as the last, and not stored
    p_tile = p_w + o_w.to(tl.int64)[:, None] * K + o_k[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    b_sum = tl.zeros((BN, BM), SUM)
    for i_b in range(tl.program_id(2), tl.cdiv(K, BK), SPLITS):
        k = i_b * BK
        if EVEN:
            b_w = tl.load(p_tile + k, eviction_policy="evict_first")
        else:
            b_w = tl.load(p_tile + k, mask=(k + o_k < K)[None, :], other=0.0, eviction_policy="evict_first")
        b_x = load_x(p_first, o_row, k + o_k, M - i_m, K, EVEN)
        if GROUP:
            b_part = tl.dot(b_w, b_x, out_dtype=SUM, max_num_imprecise_acc=BK)
            acc += b_part.to(tl.float32) * tl.load(p_scale + (k // GROUP) * N + o_w).to(tl.float32)[:, None]
        else:
            b_sum = tl.dot(b_w, b_x, b_sum, out_dtype=SUM, max_num_imprecise_acc=BK)
    if not GROUP:
        acc = b_sum.to(tl.float32) * tl.load(p_scale + o_w).to(tl.float32)[:, None]
    acc *= tl.load(p_row + o_m, mask=o_m < M, other=0.0)[None, :]
    finish(acc, p_bias, p_y, p_work, p_count, o_n, o_m, N, M, BIAS, SPLITS)


def quantize(x_MI: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """`w8a8.quantize` for a contiguous x, with the same bits, in one launch."""
    m, k = x_MI.shape
    codes_MI, scale_M = torch.empty_like(x_MI, dtype=dtype), x_MI.new_empty(m, dtype=torch.float32)
    block = min(ROW, triton.next_power_of_2(k))
    launch.run(
        _quantize_rows_kernel, (m,), x_MI, codes_MI, scale_M, k, LIMIT=w8a8.LIMITS[dtype], BLOCK=block, num_warps=8
    )
    return codes_MI, scale_M


def linear(
    codes_MI: Tensor, scale_M: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None, out: torch.dtype,
    config: launch.Config | None = None,
) -> Tensor:  # fmt: skip
    """The product of checked, contiguous tensors on one device, in the dtype `out`."""
    (m, k), n = codes_MI.shape, len(weight)
    group = 0 if len(scale) == 1 else k // len(scale)
    width = min(INPUTS, group & -group) if group else INPUTS  # a power of two that divides the group
    tile = launch.heuristic(m, n, codes_MI.device)
    chosen = config or launch.split(tile, m, n, -(-k // width), codes_MI.device)
    y_MN = codes_MI.new_empty(m, n, dtype=out)
    work, count = launch.workspace(chosen, m, n, codes_MI.device)
    grid = (-(-n // chosen.outputs), -(-m // chosen.rows), chosen.splits)
    launch.run(
        _w8a8_linear_kernel, grid,
        codes_MI, scale_M, weight, scale, scale if bias is None else bias, y_MN, work, count, m, n, k,
        GROUP=group, BM=chosen.rows, BN=chosen.outputs, BK=width, SPLITS=chosen.splits,
        BIAS=bias is not None, EVEN=k % width == 0, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return y_MN


CODES = {"int8": ("*i8", (80, 90)), "fp8": ("*fp8e4nv", (90,))}


def rounding(kind: str, floats: str) -> Case:
    """One configuration of the rounding to compile."""
    codes, architectures = CODES[kind]
    return Case(
        name=f"quantize {kind} {floats}",
        kernel=_quantize_rows_kernel,
        types={"p_x": f"*{floats}", "p_codes": codes, "p_scale": "*fp32", "K": "i32"},
        constants={"LIMIT": {"int8": 127.0, "fp8": 448.0}[kind], "BLOCK": ROW},
        weights=ROW,
        warps=8,
        architectures=architectures,
    )


def case(kind: str, group: int, rows: int, outputs: int, splits: int = 4) -> Case:
    """One configuration of the product to compile."""
    codes, architectures = CODES[kind]
    return Case(
        name=f"w8a8 {kind} g{group} {rows}x{outputs}",
        kernel=_w8a8_linear_kernel,
        types=dict.fromkeys(("p_x", "p_w"), codes) | dict.fromkeys(("p_row", "p_scale"), "*fp32")
        | dict.fromkeys(("p_bias", "p_y"), "*bf16") | SUMS | dict.fromkeys("MNK", "i32"),
        constants={
            "GROUP": group, "BM": rows, "BN": outputs, "BK": INPUTS, "SPLITS": splits, "BIAS": False, "EVEN": True,
        },
        weights=outputs * INPUTS,
        architectures=architectures,
    )  # fmt: skip


CASES = [
    rounding("int8", "bf16"),
    rounding("fp8", "bf16"),
    case("int8", 0, 8, 128),
    case("int8", 0, 64, 128, 1),
    case("int8", 128, 8, 128),
    case("fp8", 0, 8, 128),
    case("fp8", 0, 64, 128, 1),
]
