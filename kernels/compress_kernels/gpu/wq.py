"""y = x W^T for weights coded in K-plane words, with scales for groups of inputs: kernels, launches and cases."""

from __future__ import annotations

from dataclasses import replace

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.nn import functional as F

from compress_kernels import dispatch, low_rank
from compress_kernels.gpu import launch
from compress_kernels.gpu.aot import SUMS, Case
from compress_kernels.gpu.decode import load_book, plane
from compress_kernels.gpu.gemm import add_low_rank, finish, group, load_x
from compress_kernels.gpu.prep import prepare
from compress_kernels.prep import Prepared
from compress_kernels.wq import BITS, Packed, places_of, plan_of, width, width_of


@triton.jit
def load_words(p_words, p_high, i_b, o_tile, R, P: tl.constexpr, BITS: tl.constexpr):
    """The words of a tile of block i_b, in three values.

    With three bits, two sets of words for the lower bits and one for the third bit; otherwise the same words thrice.
    """
    if BITS == 3:
        b_high = tl.load(p_high + i_b * R * P + o_tile, eviction_policy="evict_first")
        b_q = tl.load(p_words + 2 * i_b * R * P + o_tile, eviction_policy="evict_first")
        b_more = tl.load(p_words + (2 * i_b + 1) * R * P + o_tile, eviction_policy="evict_first")
        return b_q, b_more, b_high
    else:
        b_q = tl.load(p_words + i_b * R * P + o_tile, eviction_policy="evict_first")
        return b_q, b_q, b_q


@triton.jit
def load_zero(p_zero, at, BITS: tl.constexpr, ZERO: tl.constexpr, SUBNORMAL: tl.constexpr):
    """What remains to be subtracted from a decoded number.

    That is the zero point, minus the middle of the grid if decoding has already subtracted it.
    """
    MIDDLE: tl.constexpr = 1 << (BITS - 1)
    if ZERO:
        return tl.load(p_zero + at).to(tl.float32) - (0 if SUBNORMAL else MIDDLE)
    else:
        return tl.full(at.shape, MIDDLE, tl.float32)


@triton.jit
def _wq_linear_kernel(
    p_x, p_sums, p_factor, p_words, p_high, p_scale, p_zero, p_book, p_t, p_u, p_bias, p_y, p_work, p_count,
    M, N, K, R, S,
    FORM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    SPLITS: tl.constexpr, ZERO: tl.constexpr, SUBNORMAL: tl.constexpr, RANK: tl.constexpr, BIAS: tl.constexpr,
    EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs, tiles of rows, splits of the blocks of inputs. GROUP 0 is one group per row.

    x has S values per row. If there are sums, the sum of x over every unit (a group, or one block of a larger group)
    times the result of `load_zero` is subtracted:
    sum of scale (code - zero) x = scale (sum of code x - zero sum of x).
    """
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    BLOCK: tl.constexpr = P * PLANES
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    PER: tl.constexpr = PLANES if GROUP == 0 or GROUP >= BLOCK else GROUP // P
    LESS: tl.constexpr = ZERO or SUBNORMAL
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_row, i_m = tl.arange(0, BM), tl.program_id(1) * BM
    o_m, p_first = i_m + o_row, p_x + i_m.to(tl.int64) * S
    o_p = tl.arange(0, P)
    o_tile = o_n[:, None] * P + o_p[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    b_all = tl.zeros((BM,), tl.float32)
    book = load_book(p_book, FORM, DTYPE)
    for i_b in range(tl.program_id(2), tl.cdiv(K, BLOCK), SPLITS):
        b_q, b_more, b_high = load_words(p_words, p_high, i_b, o_tile, R, P, BITS)
        b_part = acc if GROUP == 0 else tl.zeros((BN, BM), tl.float32)
        for j in tl.static_range(PLANES):
            b_w = plane(b_q, b_more, b_high, book, p_book, j, FORM, BITS, SUBNORMAL, DTYPE, ASM)
            b_x = load_x(p_first, o_row, i_b * BLOCK + j * P + o_p, M - i_m, S, EVEN)
            b_part = tl.dot(b_w, b_x, b_part, input_precision="ieee")
            if (j + 1) % PER == 0:
                at = i_b * BLOCK + (j + 1 - PER) * P  # the first input; a block may reach beyond the last
                if LESS:
                    b_sum = tl.load(p_sums + at // (PER * P) * M + o_m, mask=(o_m < M) & (at < K), other=0.0)
                if GROUP == 0:
                    if LESS:
                        b_all += b_sum
                else:
                    o_g = group(at, K, GROUP, EVEN) * R + o_n
                    b_s = tl.load(p_scale + o_g).to(tl.float32)
                    acc += b_part * b_s[:, None]
                    if LESS:
                        b_z = load_zero(p_zero, o_g, BITS, ZERO, SUBNORMAL)
                        acc -= (b_s * b_z)[:, None] * b_sum[None, :]
                    b_part = tl.zeros((BN, BM), tl.float32)
        if GROUP == 0:
            acc = b_part
    if GROUP == 0:
        b_s = tl.load(p_scale + o_n).to(tl.float32)
        acc *= b_s[:, None]
        if LESS:
            b_z = load_zero(p_zero, o_n, BITS, ZERO, SUBNORMAL)
            acc -= (b_s * b_z)[:, None] * b_all[None, :]
    if SUBNORMAL:  # times 2**24, because a subnormal float16 number is a multiple of 2**-24
        acc = acc * 16777216.0 * tl.load(p_factor + o_m, mask=o_m < M, other=0.0)[None, :]
    acc = add_low_rank(acc, p_t, p_u, o_n, o_m, N, M, RANK)
    finish(acc, p_bias, p_y, p_work, p_count, o_n, o_m, N, M, BIAS, SPLITS)


def linear(x_MI: Tensor, w: Packed, bias: Tensor | None, config: launch.Config | None = None) -> Tensor:
    """`x @ W.T + bias` of checked, contiguous tensors on one device; x is float16 or bfloat16.

    A configuration with `dense`, for many rows, decodes the weight to memory and multiplies it as dense.
    """
    m, k = x_MI.shape
    n, wide = w.shape[0], width_of(w)
    tuned = launch.tuned(w.kind, m, n, k, -(-k // wide), x_MI.device)
    chosen = config or tuned or heuristic(w.form, m, n, k, w.group, x_MI.device)
    if w.words.shape[1] % chosen.outputs:
        raise ValueError(f"wq_linear: tiles of {chosen.outputs} outputs for {w.words.shape[1]} rows of words")
    if chosen.dense:
        y = F.linear(x_MI, dense(w, x_MI.dtype), None if bias is None else bias.to(x_MI.dtype))
        return y if w.u is None or w.v is None else y + low_rank.term(x_MI, w.u, w.v)
    plan = plan_of(w, chosen.subnormal)
    ready = prepare(x_MI, plan, w.order) if plan.needed else Prepared(x_MI, w.scale, w.scale)
    y_MN = x_MI.new_empty(m, n)
    t_MR = x_MI if w.v is None else low_rank.inner(x_MI, w.v)
    work, count = launch.workspace(chosen, m, n, x_MI.device)
    grid = (-(-n // chosen.outputs), -(-m // chosen.rows), chosen.splits)
    launch.run(
        _wq_linear_kernel, grid,
        ready.x, ready.sums, ready.factor, w.words, given_or(w.high, w.words), w.scale, given_or(w.zero, w.scale),
        given_or(w.book, w.words), t_MR, given_or(w.u, w.scale), given_or(bias, w.scale), y_MN, work, count,
        m, n, k, w.words.shape[1], ready.x.shape[1],
        FORM=w.form, BITS=BITS[w.form], GROUP=w.group, P=w.words.shape[2], BM=chosen.rows, BN=chosen.outputs,
        SPLITS=chosen.splits, ZERO=w.zero is not None, SUBNORMAL=plan.subnormal,
        RANK=0 if w.u is None else w.u.shape[1], BIAS=bias is not None, EVEN=k % wide == 0,
        ASM=chosen.inline, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return y_MN


def heuristic(form: str, m: int, n: int, k: int, group: int, device: torch.device) -> launch.Config:
    """A reasonable configuration, not measured."""
    wide = width(form, group)
    chosen = fitted(form, group, launch.heuristic(m, n, device), k % wide == 0)
    chosen = replace(chosen, dense=m > (dispatch.above(form, group) or 0))
    return launch.split(chosen, m, n, -(-k // wide), device)


def fitted(form: str, group: int, config: launch.Config, even: bool) -> launch.Config:
    """Adapt a configuration so that it neither spills registers nor exceeds the shared memory, as compiling has shown.

    `even` says that blocks do not reach beyond the inputs. For few rows there are two warps, so that a thread has more
    weights over which to spread the loop's overhead; one multiplication per warp is enough.
    """
    rows, outputs, stages = config.rows, config.outputs, config.stages
    warps = 2 if rows <= 16 else 4
    many = 0 < group < 128  # the scales and sums of every group take registers too
    rows = min(rows, 32) if many else rows
    if form == "int3":  # sixteen planes and three sets of words are held at once
        rows, warps, stages = min(rows, 16 if many else 32), 4, 2
        outputs = outputs if rows <= 16 and even and not many else 64
    if form in ("int2", "book", "e2m1"):  # many planes, a book in registers, or signs and magnitudes of small floats
        warps = {8: 2, 64: 8}.get(rows, 4)
    if form == "int2" and rows == 16 and many:
        outputs = 64
    if form == "int2" and rows == 64:  # 256 inputs of 64 rows are 32 KiB per stage; sm_89 has 99 KiB
        stages = 3
    if form == "book":
        stages = 2
        outputs = 64 if 0 < group < 64 else outputs
    return replace(config, rows=rows, outputs=outputs, warps=warps, stages=stages)


def given_or(tensor: Tensor | None, other: Tensor) -> Tensor:
    """A tensor, or `other` if it is None: a kernel needs a valid pointer even where it does not read it."""
    return other if tensor is None else tensor


@triton.jit
def _wq_dense_kernel(
    p_words, p_high, p_scale, p_zero, p_book, p_order, p_y, N, K, R,
    FORM: tl.constexpr, BITS: tl.constexpr, GROUP: tl.constexpr, P: tl.constexpr, BN: tl.constexpr,
    ZERO: tl.constexpr, ORDER: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs, blocks of inputs. Values are converted to float32, scaled, and rounded once."""
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    DTYPE: tl.constexpr = p_y.dtype.element_ty
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_p = tl.arange(0, P)
    i_b = tl.program_id(1)
    book = load_book(p_book, FORM, DTYPE)
    b_q, b_more, b_high = load_words(p_words, p_high, i_b, o_n[:, None] * P + o_p[None, :], R, P, BITS)
    for j in tl.static_range(PLANES):
        at = (i_b * PLANES + j) * P
        b_w = plane(b_q, b_more, b_high, book, p_book, j, FORM, BITS, False, DTYPE, ASM).to(tl.float32)
        o_g = group(at, K, GROUP, False) * R + o_n
        if ZERO:
            b_w -= load_zero(p_zero, o_g, BITS, ZERO, False)[:, None]
        b_w *= tl.load(p_scale + o_g).to(tl.float32)[:, None]
        o_k = at + o_p
        o_to = tl.load(p_order + o_k, mask=o_k < K, other=0) if ORDER else o_k
        m_y = (o_n < N)[:, None] & (o_k < K)[None, :]
        tl.store(p_y + o_n[:, None].to(tl.int64) * K + o_to[None, :], b_w.to(DTYPE), mask=m_y)


def dense(w: Packed, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in], rounded to float16 or bfloat16, in one launch."""
    n, k = w.shape
    y_NK = w.words.new_empty(n, k, dtype=dtype)
    launch.run(
        _wq_dense_kernel, (w.words.shape[1] // 64, -(-k // width_of(w))),
        w.words, given_or(w.high, w.words), w.scale, given_or(w.zero, w.scale), given_or(w.book, w.words),
        given_or(w.order, w.words), y_NK, n, k, w.words.shape[1],
        FORM=w.form, BITS=BITS[w.form], GROUP=w.group, P=w.words.shape[2], BN=64, ZERO=w.zero is not None,
        ORDER=w.order is not None, ASM=not launch.interpreted(), num_warps=4,
    )  # fmt: skip
    return y_NK


def case(
    form: str, group: int, rows: int, outputs: int, kind: str = "fp16", *, rank: int = 0, zero: bool = False,
    subnormal: bool = False, even: bool = True,
) -> Case:  # fmt: skip
    """One configuration to compile, with the warps and stages that `fitted` gives it."""
    chosen = fitted(form, group, launch.Config(rows=rows, outputs=outputs, subnormal=subnormal), even)
    floats = dict.fromkeys(("p_x", "p_t", "p_u", "p_bias", "p_y"), f"*{kind}")
    words = dict.fromkeys(("p_words", "p_high"), "*i16")
    sums = dict.fromkeys(("p_sums", "p_factor"), "*fp32")
    said = f" r{rank}" * (rank > 0) + " zero" * zero + " subnormal" * subnormal + " ragged" * (not even)
    return Case(
        name=f"wq {form} g{group} {kind} {chosen.rows}x{chosen.outputs}{said}",
        kernel=_wq_linear_kernel,
        types=floats | words | sums | SUMS | {"p_scale": "*fp16", "p_zero": "*u8", "p_book": "*i32"}
        | dict.fromkeys("MNKRS", "i32"),
        constants={
            "FORM": form, "BITS": BITS[form], "GROUP": group, "P": places_of(group), "BM": chosen.rows,
            "BN": chosen.outputs, "SPLITS": 4, "ZERO": zero, "SUBNORMAL": subnormal, "RANK": rank, "BIAS": False,
            "EVEN": even, "ASM": True,
        },
        weights=chosen.outputs * width(form, group),
        warps=chosen.warps,
        stages=chosen.stages,
    )  # fmt: skip


def hardest(form: str, m: int, n: int, group: int = 128) -> Case:
    """The configuration chosen for a shape, with everything that costs registers.

    That is bfloat16, zero points, and blocks that reach beyond the inputs.
    """
    chosen = heuristic(form, m, n, 4100, group, torch.device("cpu"))
    return case(form, group, chosen.rows, chosen.outputs, "bf16", zero=form.startswith("int"), even=False)


DENSE = Case(
    name="wq dense int4 bf16 zero",
    kernel=_wq_dense_kernel,
    types={"p_words": "*i16", "p_high": "*i16", "p_scale": "*fp16", "p_zero": "*u8", "p_book": "*i32",
           "p_order": "*i32", "p_y": "*bf16"} | dict.fromkeys("NKR", "i32"),
    constants={"FORM": "int4", "BITS": 4, "GROUP": 128, "P": 32, "BN": 64, "ZERO": True, "ORDER": True, "ASM": True},
)  # fmt: skip
CASES = [
    *(case(form, 128, 8, 128) for form in ("int2", "int3", "int4")),
    case("int4", 128, 8, 128, "bf16"),
    case("int8", 0, 8, 128, "bf16"),
    case("int4", 128, 16, 128, rank=64),
    case("int4", 128, 64, 128),
    case("int4", 128, 8, 128, subnormal=True, zero=True),
    case("e4m3", 0, 8, 128, "bf16"),
    case("e2m1", 32, 8, 128),
    case("e2m1", 16, 16, 128, "bf16", even=False),
    case("book", 64, 8, 128),
    hardest("int3", 1, 28672),
    hardest("int4", 16, 28672, 64),
    hardest("int2", 16, 28672, 64),
    *(hardest(form, 64, 28672) for form in ("int2", "int3", "book")),
    DENSE,
]
