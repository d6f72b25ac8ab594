"""y = x W^T for weights of integer codes in K-plane words, in groups along the inputs: kernel, launch, cases."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from compress_kernels import formats, low_rank
from compress_kernels.gpu import launch
from compress_kernels.gpu.aot import SUMS, Case
from compress_kernels.gpu.decode import KINDS, integer, three
from compress_kernels.gpu.gemm import add_low_rank, finish, load_x
from compress_kernels.wq import Packed


@triton.jit
def _wq_linear_kernel(
    p_x, p_words, p_high, p_scale, p_t, p_u, p_bias, p_y, p_work, p_count, M, N, K, R,
    BITS: tl.constexpr, GROUP: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, SPLITS: tl.constexpr,
    RANK: tl.constexpr, BIAS: tl.constexpr, EVEN: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Programs: tiles of outputs, tiles of rows, splits of the blocks of inputs. GROUP 0 is one group a row."""
    P: tl.constexpr = 32
    PLANES: tl.constexpr = 16 if BITS == 3 else 16 // BITS
    BLOCK: tl.constexpr = P * PLANES
    DTYPE: tl.constexpr = p_x.dtype.element_ty
    PER: tl.constexpr = PLANES if GROUP == 0 or GROUP >= BLOCK else GROUP // P
    o_n = tl.program_id(0) * BN + tl.arange(0, BN)
    o_m = tl.program_id(1) * BM + tl.arange(0, BM)
    o_p = tl.arange(0, P)
    o_tile = o_n[:, None] * P + o_p[None, :]
    acc = tl.zeros((BN, BM), tl.float32)
    for i_b in range(tl.program_id(2), tl.cdiv(K, BLOCK), SPLITS):
        if BITS == 3:
            b_high = tl.load(p_high + i_b * R * P + o_tile, eviction_policy="evict_first")
        else:
            b_q = tl.load(p_words + i_b * R * P + o_tile, eviction_policy="evict_first")
        b_part = acc if GROUP == 0 else tl.zeros((BN, BM), tl.float32)
        for j in tl.static_range(PLANES):
            if BITS == 3:
                if j % 8 == 0:
                    b_q = tl.load(p_words + (2 * i_b + j // 8) * R * P + o_tile, eviction_policy="evict_first")
                b_w = three(b_q, b_high, j, DTYPE, ASM)
            else:
                b_w = integer(b_q, j, BITS, DTYPE, ASM)
            b_x = load_x(p_x, o_m, i_b * BLOCK + j * P + o_p, M, K, EVEN)
            b_part = tl.dot(b_w, b_x, b_part, input_precision="ieee")
            if GROUP != 0 and (j + 1) % PER == 0:
                i_g = (i_b * BLOCK + (j + 1 - PER) * P) // GROUP
                b_s = tl.load(p_scale + i_g * R + o_n, mask=i_g * GROUP < K, other=0.0)  # a block may reach beyond K
                acc += b_part * b_s.to(tl.float32)[:, None]
                b_part = tl.zeros((BN, BM), tl.float32)
        if GROUP == 0:
            acc = b_part
    if GROUP == 0:
        acc *= tl.load(p_scale + o_n).to(tl.float32)[:, None]
    acc = add_low_rank(acc, p_t, p_u, o_n, o_m, N, M, RANK)
    finish(acc, p_bias, p_y, p_work, p_count, o_n, o_m, N, M, BIAS, SPLITS)


def linear(x_MI: Tensor, w: Packed, bias: Tensor | None, config: launch.Config | None = None) -> Tensor:
    """`x @ W.T + bias` of checked, contiguous tensors on one device; x is float16 or bfloat16."""
    m, k = x_MI.shape
    n, width = w.shape[0], formats.block(1 if w.bits == 3 else w.bits)
    chosen = config or launch.heuristic(m, n, -(-k // width), x_MI.device)
    y_MN = x_MI.new_empty(m, n)
    t_MR = x_MI if w.v is None else low_rank.inner(x_MI, w.v)
    work, count = launch.workspace(chosen, m, n, x_MI.device)
    grid = (-(-n // chosen.outputs), -(-m // chosen.rows), chosen.splits)
    _wq_linear_kernel[grid](
        x_MI, w.words, w.words if w.high is None else w.high, w.scale, t_MR, w.scale if w.u is None else w.u,
        w.scale if bias is None else bias, y_MN, work, count,
        m, n, k, w.words.shape[1],
        BITS=w.bits, GROUP=w.group, BM=chosen.rows, BN=chosen.outputs, SPLITS=chosen.splits,
        RANK=0 if w.u is None else w.u.shape[1], BIAS=bias is not None, EVEN=k % width == 0,
        ASM=chosen.inline, num_warps=chosen.warps, num_stages=chosen.stages,
    )  # fmt: skip
    return y_MN


def case(bits: int, group: int, rows: int, outputs: int, kind: str = "fp16", rank: int = 0) -> Case:
    """One configuration to compile."""
    width = formats.block(1 if bits == 3 else bits)
    floats = dict.fromkeys(("p_x", "p_t", "p_u", "p_bias", "p_y"), f"*{kind}")
    words = dict.fromkeys(("p_words", "p_high"), "*i16")
    return Case(
        name=f"wq int{bits} g{group} {kind} {rows}x{outputs}" + f" r{rank}" * (rank > 0),
        kernel=_wq_linear_kernel,
        types=floats | words | SUMS | {"p_scale": "*fp16"} | dict.fromkeys("MNKR", "i32"),
        constants={
            "BITS": bits, "GROUP": group, "BM": rows, "BN": outputs, "SPLITS": 4, "RANK": rank, "BIAS": False,
            "EVEN": True, "ASM": True,
        },
        weights=outputs * width,
    )  # fmt: skip


CASES = [
    *(case(bits, group, 8, 128, kind) for bits, group in ((2, 128), (4, 128), (8, 0)) for kind in KINDS),
    *(case(3, 128, 8, 64, kind) for kind in KINDS),
    case(4, 32, 8, 64),
    case(4, 128, 16, 128),
    case(4, 128, 64, 128),
    case(4, 128, 16, 128, rank=64),
]
