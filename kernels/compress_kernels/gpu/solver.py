"""The kernels of `compress_kernels.solver`, with launches and cases.

They do error feedback through a block of columns, n:m selection, exchanges, swaps and Gram matrices.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_kernels.gpu import launch
from compress_kernels.gpu.aot import Case
from compress_kernels.solver import STRIP, Choice, Queue, Steps

ROWS = 32  # outputs per program of `sweep`, one warp: a matrix with 4096 outputs keeps 128 multiprocessors busy
GROUPS = 128  # groups of scores per program of `keep_nm`, for groups of four
SIDE = 128  # side of the tiles of a Gram
TOKENS = 64  # tokens per step of a Gram
UNROLLED = tl.constexpr(8)  # columns whose errors are applied to a strip per iteration of the unrolled loop
INF = tl.constexpr(float("inf"))
NEAREST = tl.constexpr(12582912.0)  # 1.5 * 2**23: adding and subtracting it rounds to the nearest integer, ties to even


@triton.jit
def select(b_w, b_d, b_dead, b_keep, j, N: tl.constexpr, M: tl.constexpr, S: tl.constexpr):
    """The mask of a strip after choosing N of the M columns from j on, by (w / d)^2."""
    o_s = tl.arange(0, S)
    b_score = tl.math.div_rn(b_w, tl.zeros_like(b_w) + b_d[:, None])
    b_score = tl.where((b_dead != 0)[:, None], 0.0, b_score * b_score)
    b_rank = tl.zeros_like(b_keep)
    for k in range(j, j + M):
        b_k = tl.sum(tl.where((o_s == k)[:, None], b_score, 0.0), 0)[None, :]
        b_rank += ((b_k > b_score) | ((b_k == b_score) & (k > o_s)[:, None])).to(tl.int32)
    mine = (o_s >= j) & (o_s < j + M)
    return tl.where(mine[:, None], (b_rank < N).to(tl.int32), b_keep)


@triton.jit
def _sweep_kernel(
    p_w, p_u, p_e, p_keep, p_dead, p_scale, p_zero, p_group, p_codes, B, R, U,
    BITS: tl.constexpr, ZERO: tl.constexpr, MASK: tl.constexpr, N: tl.constexpr, M: tl.constexpr, ROWS: tl.constexpr,
    S: tl.constexpr,
):  # fmt: skip
    """Each program takes ROWS of the R outputs through all B columns, S at a time; U is the row stride of the factor.

    A strip of S columns stays in registers, where a column is selected by a masked sum. The updates from all earlier
    strips are one product with their stored errors. BITS 0: no quantization. MASK 0: no mask, 1: a given mask, 2: keep
    N of M.
    """
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    m_r = o_r < R
    o_s = tl.arange(0, S)
    for i_s in range(0, tl.cdiv(B, S)):
        o_c = i_s * S + o_s
        b_w = tl.load(p_w + o_c[:, None] * R + o_r[None, :], mask=(o_c < B)[:, None] & m_r[None, :], other=0.0)
        b_d = tl.load(p_u + o_c * (U + 1), mask=o_c < B, other=1.0)
        # This loop is a matrix product, but with the layout of `tl.dot` every column takes twice as long.
        for t in tl.range(0, i_s * S, loop_unroll_factor=UNROLLED):
            b_u = tl.load(p_u + t * U + o_c, mask=o_c < B, other=0.0)
            b_w -= b_u[:, None] * tl.load(p_e + t * R + o_r, mask=m_r, other=0.0)[None, :]
        if MASK == 2:
            b_keep = tl.full((S, ROWS), 1, tl.int32)
            b_dead = tl.load(p_dead + o_c, mask=o_c < B, other=0)
        for j in range(0, S):
            c = i_s * S + j
            now = (o_s == j)[:, None]
            m_c = m_r & (c < B)
            if MASK == 2:
                if j % M == 0:
                    b_keep = select(b_w, b_d, b_dead, b_keep, j, N, M, S)
                b_on = tl.sum(tl.where(now, b_keep, 0), 0)
                tl.store(p_keep + c * R + o_r, b_on.to(tl.uint8), mask=m_c)
            if MASK == 1:
                b_on = tl.load(p_keep + c * R + o_r, mask=m_c, other=1).to(tl.int32)
            b_v = tl.sum(tl.where(now, b_w, 0.0), 0)
            d = tl.load(p_u + c * (U + 1), mask=c < B, other=1.0)
            if BITS:
                i_g = tl.load(p_group + c, mask=c < B, other=0)
                b_s = tl.load(p_scale + i_g * R + o_r, mask=m_r, other=1.0)
                b_z = tl.zeros((ROWS,), tl.float32) + 2.0 ** (BITS - 1)
                if ZERO:
                    b_z = tl.load(p_zero + i_g * R + o_r, mask=m_r, other=0.0)
                b_code = (tl.math.div_rn(b_v, b_s) + NEAREST) - NEAREST
                b_code = tl.minimum(tl.maximum(b_code + b_z, 0.0), 2.0**BITS - 1)
                if MASK:
                    b_code = tl.where(b_on != 0, b_code, b_z)
                tl.store(p_codes + c * R + o_r, b_code.to(tl.int32).to(tl.uint8), mask=m_c)
                b_q = (b_code - b_z) * b_s
            else:
                b_q = b_v * b_on.to(tl.float32) if MASK else b_v
            b_e = tl.math.div_rn(b_v - b_q, tl.zeros_like(b_v) + d)
            b_u = tl.load(p_u + c * U + o_c, mask=(o_s > j) & (o_c < B) & (c < B), other=0.0)
            b_w -= b_u[:, None] * b_e[None, :]
            tl.store(p_w + c * R + o_r, b_q, mask=m_c)
            tl.store(p_e + c * R + o_r, b_e, mask=m_c)
        tl.debug_barrier()  # the next strip reads what other threads stored


def sweep(
    w_BO: Tensor, u_BB: Tensor, e_BO: Tensor, keep_BO: Tensor | None, steps: Steps | None, choice: Choice | None
) -> Tensor | None:
    """`solver.sweep`."""
    columns, outputs = w_BO.shape
    codes_BO = None if steps is None else torch.empty_like(w_BO, dtype=torch.uint8)
    keep = w_BO if keep_BO is None else keep_BO.view(torch.uint8)
    dead_B = w_BO.new_zeros(columns, dtype=torch.bool) if choice is None or choice.dead_B is None else choice.dead_B
    scale, zero, group = (w_BO, None, w_BO) if steps is None else (steps.scale_GO, steps.zero_GO, steps.group_B)
    launch.run(
        _sweep_kernel, (-(-outputs // ROWS),),
        w_BO, u_BB, e_BO, keep, dead_B.view(torch.uint8), scale, w_BO if zero is None else zero, group,
        w_BO if codes_BO is None else codes_BO, columns, outputs, u_BB.stride(0),
        BITS=0 if steps is None else steps.bits, ZERO=zero is not None,
        MASK=2 if choice else 0 if keep_BO is None else 1,
        N=choice.n if choice else 0, M=choice.m if choice else 1, ROWS=ROWS, S=STRIP, num_warps=1, num_stages=1,
    )  # fmt: skip
    return codes_BO


@triton.jit
def _keep_nm_kernel(p_score, p_keep, ROWS, N, M: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """Each program ranks the scores of BLOCK groups, each score against all others of its group."""
    o_n = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    o_m = tl.arange(0, WIDTH)
    mask = (o_n < ROWS)[:, None] & (o_m < M)[None, :]
    b_own = tl.load(p_score + o_n[:, None] * M + o_m[None, :], mask=mask, other=0.0)
    b_rank = tl.zeros((BLOCK, WIDTH), tl.int32)
    for k in range(0, M):
        b_k = tl.load(p_score + o_n * M + k, mask=o_n < ROWS, other=0.0)[:, None]
        b_rank += ((b_k > b_own) | ((b_k == b_own) & (k > o_m)[None, :])).to(tl.int32)
    tl.store(p_keep + o_n[:, None] * M + o_m[None, :], (b_rank < N).to(tl.uint8), mask=mask)


def keep_nm(score_NM: Tensor, n: int) -> Tensor:
    """`solver.keep_nm`."""
    rows, m = score_NM.shape
    keep_NM = torch.empty_like(score_NM, dtype=torch.bool)
    width = triton.next_power_of_2(m)
    block = max(1, GROUPS * 4 // width)
    grid = (-(-rows // block),)
    launch.run(_keep_nm_kernel, grid, score_NM, keep_NM.view(torch.uint8), rows, n, M=m, WIDTH=width, BLOCK=block)
    return keep_NM


@triton.jit
def _add_gram_kernel(p_x, p_sum, T, K, SIDE: tl.constexpr, BT: tl.constexpr, EVEN: tl.constexpr):
    """Programs: tiles of the sum [K, K]; programs below the diagonal do nothing."""
    i_a, i_b = tl.program_id(1), tl.program_id(0)
    if i_a <= i_b:
        o_a, o_b, o_t = i_a * SIDE + tl.arange(0, SIDE), i_b * SIDE + tl.arange(0, SIDE), tl.arange(0, BT)
        m_a, m_b = o_a < K, o_b < K
        acc = tl.zeros((SIDE, SIDE), tl.float32)
        for t in range(0, T, BT):
            p_row = p_x + (t + o_t).to(tl.int64) * K
            m_t = t + o_t < T
            if EVEN:
                b_a = tl.load(p_row[None, :] + o_a[:, None], mask=m_t[None, :], other=0.0)
                b_b = tl.load(p_row[:, None] + o_b[None, :], mask=m_t[:, None], other=0.0)
            else:
                b_a = tl.load(p_row[None, :] + o_a[:, None], mask=m_t[None, :] & m_a[:, None], other=0.0)
                b_b = tl.load(p_row[:, None] + o_b[None, :], mask=m_t[:, None] & m_b[None, :], other=0.0)
            acc = tl.dot(b_a, b_b, acc)
        p_tile = p_sum + o_a.to(tl.int64)[:, None] * K + o_b[None, :]
        m_sum = m_a[:, None] & m_b[None, :]
        tl.store(p_tile, tl.load(p_tile, mask=m_sum, other=0.0) + acc, mask=m_sum)


def add_gram(sum_II: Tensor, x_TI: Tensor) -> None:
    """`solver.add_gram`."""
    tokens, inputs = x_TI.shape
    tiles = -(-inputs // SIDE)
    launch.run(
        _add_gram_kernel,
        (tiles, tiles),
        x_TI,
        sum_II,
        tokens,
        inputs,
        SIDE=SIDE,
        BT=TOKENS,
        EVEN=inputs % SIDE == 0,
        num_warps=8,
        num_stages=3,
    )


@triton.jit
def _mirror_kernel(p_sum, K, SIDE: tl.constexpr):
    """Programs: tiles; programs below the diagonal do nothing, the others write their transpose."""
    i_a, i_b = tl.program_id(1), tl.program_id(0)
    if i_a <= i_b:
        o_a, o_b = i_a * SIDE + tl.arange(0, SIDE), i_b * SIDE + tl.arange(0, SIDE)
        above = (o_a[:, None] < o_b[None, :]) & (o_b < K)[None, :]
        b_sum = tl.load(p_sum + o_a.to(tl.int64)[:, None] * K + o_b[None, :], mask=above, other=0.0)
        tl.store(p_sum + o_b.to(tl.int64)[None, :] * K + o_a[:, None], b_sum, mask=above)


def mirror(sum_II: Tensor) -> None:
    """`solver.mirror`."""
    size = len(sum_II)
    tiles = -(-size // 64)
    launch.run(_mirror_kernel, (tiles, tiles), sum_II, size, SIDE=64)


@triton.jit
def sign(b_x):
    """The sign: -1, 0 or 1."""
    return (b_x > 0).to(tl.int32) - (b_x < 0).to(tl.int32)


@triton.jit
def quietest(p_loud, p_open, p_row, b_at, b_on, M: tl.constexpr, WIDTH: tl.constexpr):
    """(score, index) of the open weight with the lowest score in the group of M of each row's `b_at`.

    The score is infinite if no weight of the group is open.
    """
    o_m = tl.arange(0, WIDTH)[None, :]
    o_b = (b_at // M * M)[:, None] + o_m
    m_b = b_on[:, None] & (o_m < M)
    b_open = tl.load(p_open + p_row[:, None] + o_b, mask=m_b, other=0)
    b_loud = tl.load(p_loud + p_row[:, None] + o_b, mask=m_b & (b_open != 0), other=INF)
    b_least = tl.min(b_loud, 1)
    return b_least, tl.min(tl.where((b_loud == b_least[:, None]) & m_b, o_b, b_at[:, None] + M), 1)


@triton.jit
def _exchange_kernel(
    p_part, p_grow, p_grows, p_drop, p_drops, p_open, p_keep, p_error, threshold, cycles, R, K, D,
    GUARDED: tl.constexpr, M: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each thread takes a row of K inputs through all cycles; D is the length of the queues."""
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_row = o_r.to(tl.int64) * K
    b_on = o_r < R
    b_error = tl.load(p_error + o_r, mask=b_on, other=0.0)
    b_first = sign(b_error)
    b_plus = tl.zeros((ROWS,), tl.int32)
    b_minus = tl.zeros((ROWS,), tl.int32)
    i, left = 0, 1
    while (i < cycles) & (left > 0):
        up = b_error > 0
        b_at = tl.where(up, b_plus, b_minus)
        b_on = b_on & (tl.abs(b_error) > threshold) & (b_at < D)
        o_q = (tl.where(up, 0, R) + o_r).to(tl.int64) * D + b_at
        b_value = tl.load(p_grow + o_q, mask=b_on, other=INF)
        b_grow = tl.load(p_grows + o_q, mask=b_on, other=0)
        if M:
            b_level, b_drop = quietest(p_drop, p_open, o_row, b_grow, b_on, M, WIDTH)
        else:
            b_level = tl.load(p_drop + o_q, mask=b_on, other=INF)
            b_drop = tl.load(p_drops + o_q, mask=b_on, other=0)
        b_on = b_on & (tl.abs(b_value) < INF) & (tl.abs(b_level) < INF)
        b_after = b_error + tl.load(p_part + o_row + b_drop, mask=b_on, other=0.0)
        b_after -= tl.load(p_part + o_row + b_grow, mask=b_on, other=0.0)
        if GUARDED:
            b_on = b_on & (tl.abs(b_after) < tl.abs(b_error))
        elif M:
            b_on = b_on & (sign(b_after) == b_first)
        tl.store(p_keep + o_row + b_grow, tl.full((ROWS,), 1, tl.uint8), mask=b_on)
        tl.store(p_keep + o_row + b_drop, tl.full((ROWS,), 0, tl.uint8), mask=b_on)
        b_plus += (b_on & up).to(tl.int32)
        b_minus += (b_on & (b_error < 0)).to(tl.int32)
        b_error = tl.where(b_on, b_after, b_error)
        if M:
            tl.store(p_open + o_row + b_drop, tl.full((ROWS,), 0, tl.uint8), mask=b_on)
            tl.debug_barrier()  # several threads read which weights of a group are open
        left = tl.max(b_on.to(tl.int32), 0)
        i += 1


def exchange(
    part_OI: Tensor, keep_OI: Tensor, error_O: Tensor, grow: Queue, drop: Queue | Tensor, *, m: int, guarded: bool,
    cycles: int, threshold: float,
) -> Tensor:  # fmt: skip
    """`solver.exchange`."""
    outputs, inputs = part_OI.shape
    keep_OI, open_OI = keep_OI.clone(), keep_OI.clone() if m else keep_OI
    level, which = (drop.value, drop.index) if isinstance(drop, Queue) else (drop, grow.index)
    launch.run(
        _exchange_kernel, (-(-outputs // ROWS),),
        part_OI, grow.value, grow.index, level, which, open_OI.view(torch.uint8), keep_OI.view(torch.uint8), error_O,
        threshold, cycles, outputs, inputs, grow.value.shape[2],
        GUARDED=guarded, M=m, WIDTH=triton.next_power_of_2(max(1, m)), ROWS=ROWS, num_warps=1,
    )  # fmt: skip
    return keep_OI


@triton.jit
def _swap_groups_kernel(
    p_w, p_kept, p_keep, p_c, p_gram, p_loss, p_found, p_change, R, K, start, stop, gain,
    M: tl.constexpr, WIDTH: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Each program takes ROWS of the R rows of K inputs through the groups of M from `start` to `stop`.

    When a group is reached, the effect of the block's earlier swaps is added to its c, from the Gram and the stored
    changes.
    """
    o_r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    o_m = tl.arange(0, WIDTH)
    m_r, m_m = o_r < R, o_m < M
    mask = m_r[:, None] & m_m[None, :]
    b_loss = tl.load(p_loss + o_r, mask=m_r, other=0.0)
    b_found = tl.zeros((ROWS,), tl.int32)
    for at in range(start, stop, M):
        o_c = (at + o_m).to(tl.int64)  # squares of many inputs pass 2**31
        o_w = o_r.to(tl.int64)[:, None] * K + o_c[None, :]
        b_w = tl.load(p_w + o_w, mask=mask, other=0.0)
        b_kept = tl.load(p_kept + o_w, mask=mask, other=0.0)
        b_on = tl.load(p_keep + o_w, mask=mask, other=0) != 0
        b_c = tl.load(p_c + o_w, mask=mask, other=0.0)
        for k in range(start, at):
            b_was = tl.load(p_change + (k - start) * R + o_r, mask=m_r, other=0.0)
            b_c += b_was[:, None] * tl.load(p_gram + (o_c * 0 + k) * K + o_c, mask=m_m, other=0.0)[None, :]
        b_d = tl.load(p_gram + o_c * (K + 1), mask=m_m, other=0.0)[None, :]
        b_g = tl.load(p_gram + o_c[:, None] * K + o_c[None, :], mask=m_m[:, None] & m_m[None, :], other=0.0)
        b_up = tl.where(mask & (b_on == 0), b_w * (b_w * b_d - 2 * b_c), INF)
        b_down = tl.where(mask & b_on, b_kept * (b_kept * b_d + 2 * b_c), INF)
        b_pair = b_up[:, :, None] + b_down[:, None, :]
        b_pair -= (2 * b_w)[:, :, None] * b_kept[:, None, :] * b_g[None, :, :]
        b_gain, b_place = tl.min(tl.reshape(b_pair, (ROWS, WIDTH * WIDTH)), 1, return_indices=True)
        b_swap = m_r & (b_gain < -gain * tl.maximum(b_loss, 0.0))
        b_grown = b_swap[:, None] & (o_m[None, :] == (b_place // WIDTH)[:, None])
        b_cut = b_swap[:, None] & (o_m[None, :] == (b_place % WIDTH)[:, None])
        b_change = tl.where(b_grown, -b_w, tl.where(b_cut, b_kept, 0.0))
        tl.store(p_kept + o_w, tl.where(b_grown, b_w, 0.0), mask=b_grown | b_cut)
        tl.store(p_keep + o_w, b_grown.to(tl.uint8), mask=b_grown | b_cut)
        tl.store(p_change + (at - start + o_m)[None, :] * R + o_r[:, None], b_change, mask=mask)
        b_loss += tl.where(b_swap, b_gain, 0.0)
        b_found += b_swap.to(tl.int32)
        tl.debug_barrier()  # other threads read the changes
    tl.store(p_loss + o_r, b_loss, mask=m_r)
    tl.store(p_found + o_r, b_found, mask=m_r)


def swap_groups(
    w_OI: Tensor, kept_OI: Tensor, keep_OI: Tensor, c_OI: Tensor, gram_II: Tensor, loss_O: Tensor, block: slice, m: int,
    gain: float,
) -> Tensor:  # fmt: skip
    """`solver.swap_groups`."""
    outputs, inputs = w_OI.shape
    found_O = torch.empty_like(loss_O, dtype=torch.int32)
    changes = w_OI.new_empty(block.stop - block.start, outputs)
    launch.run(
        _swap_groups_kernel, (-(-outputs // ROWS),),
        w_OI, kept_OI, keep_OI.view(torch.uint8), c_OI, gram_II, loss_O, found_O, changes, outputs, inputs,
        block.start, block.stop, gain, M=m, WIDTH=triton.next_power_of_2(m), ROWS=ROWS, num_warps=1, num_stages=1,
    )  # fmt: skip
    return found_O


def sweep_case(bits: int, mask: int, n: int = 2, m: int = 4) -> Case:
    """One configuration of `sweep` to compile."""
    floats = dict.fromkeys(("p_w", "p_u", "p_e", "p_scale", "p_zero"), "*fp32")
    return Case(
        name=f"sweep int{bits} mask{mask}",
        kernel=_sweep_kernel,
        types=floats | dict.fromkeys(("p_keep", "p_dead", "p_codes"), "*u8") | {"p_group": "*i32"}
        | dict.fromkeys("BRU", "i32"),
        constants={"BITS": bits, "ZERO": True, "MASK": mask, "N": n, "M": m, "ROWS": ROWS, "S": STRIP},
        weights=UNROLLED.value * STRIP * ROWS,
        warps=1,
        stages=1,
    )  # fmt: skip


def exchange_case(m: int) -> Case:
    """One configuration of `exchange` to compile."""
    return Case(
        name=f"exchange of {m}",
        kernel=_exchange_kernel,
        types=dict.fromkeys(("p_part", "p_grow", "p_drop", "p_error"), "*fp32")
        | dict.fromkeys(("p_grows", "p_drops"), "*i32") | dict.fromkeys(("p_open", "p_keep"), "*u8")
        | {"threshold": "fp32", "cycles": "i32"} | dict.fromkeys("RKD", "i32"),
        constants={"GUARDED": True, "M": m, "WIDTH": max(1, m), "ROWS": ROWS},
        warps=1,
    )  # fmt: skip


def swap_case(m: int) -> Case:
    """One configuration of `swap_groups` to compile."""
    return Case(
        name=f"swap of {m}",
        kernel=_swap_groups_kernel,
        types=dict.fromkeys(("p_w", "p_kept", "p_c", "p_gram", "p_loss", "p_change"), "*fp32")
        | {"p_keep": "*u8", "p_found": "*i32", "gain": "fp32"} | dict.fromkeys(("R", "K", "start", "stop"), "i32"),
        constants={"M": m, "WIDTH": m, "ROWS": ROWS},
        warps=1,
        stages=1,
    )  # fmt: skip


def keep_case(m: int) -> Case:
    """One configuration of `keep_nm` to compile."""
    return Case(
        name=f"keep of {m}",
        kernel=_keep_nm_kernel,
        types={"p_score": "*fp32", "p_keep": "*u8", "ROWS": "i32", "N": "i32"},
        constants={"M": m, "WIDTH": m, "BLOCK": GROUPS * 4 // m},
    )


def gram_case(kind: str) -> Case:
    """One configuration of `add_gram` to compile."""
    return Case(
        name=f"gram {kind}",
        kernel=_add_gram_kernel,
        types={"p_x": f"*{kind}", "p_sum": "*fp32", "T": "i32", "K": "i32"},
        constants={"SIDE": SIDE, "BT": TOKENS, "EVEN": True},
        weights=SIDE * TOKENS,
        warps=8,
        stages=3,
    )


CASES = [
    sweep_case(4, 0),
    sweep_case(4, 2),
    sweep_case(0, 1),
    keep_case(4),
    exchange_case(0),
    exchange_case(4),
    swap_case(4),
    gram_case("bf16"),
    Case(
        name="mirror",
        kernel=_mirror_kernel,
        types={"p_sum": "*fp32", "K": "i32"},
        constants={"SIDE": 64},
    ),
]
