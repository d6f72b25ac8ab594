"""What all products share: they compute y^T = W x^T, so that decoded weights are the first operand of every product.

Also contains the end of a program. If several programs split the inputs, the last one to arrive adds their partial
sums in the order of their numbers, so that the same inputs always give the same bits; then it adds the bias and stores.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def load_x(p_first, o_row, o_k, left, K, EVEN: tl.constexpr):
    """A tile of x from the row at `p_first` on, transposed to [k, m]; zero beyond the `left` rows and the K inputs.

    The caller passes a pointer to the first row, because its offset may exceed 2**31. Within a tile, 32-bit offsets
    suffice and take fewer instructions.
    """
    mask = (o_row < left)[None, :]
    if not EVEN:
        mask = mask & (o_k < K)[:, None]
    return tl.load(p_first + o_row[None, :] * K + o_k[:, None], mask=mask, other=0.0, eviction_policy="evict_last")


@triton.jit
def group(k, K, GROUP: tl.constexpr, EVEN: tl.constexpr):
    """The group of input k; GROUP 0 is one group per row. EVEN says that no block reaches beyond K.

    Inputs beyond K get the last group, so that no load of scales needs a mask; their products are zero.
    """
    if GROUP == 0:
        return 0
    elif EVEN:
        return k // GROUP
    else:
        return tl.minimum(k // GROUP, (K - 1) // GROUP)


@triton.jit
def add_low_rank(acc, p_t, p_u, o_n, o_m, N, M, RANK: tl.constexpr):
    """acc [n, m] plus the low-rank term U t^T, with t [M, RANK] = x V^T and U [N, RANK]; RANK is a multiple of 16.

    Only programs of split 0 add it. To be called at the end of a program, after scaling and before `finish`. U is cast
    to the dtype of t; the sum is float32. RANK 0 adds nothing.
    """
    if RANK:
        if tl.program_id(2) == 0:
            for r in tl.static_range(0, RANK, 16):
                o_r = r + tl.arange(0, 16)
                b_u = tl.load(p_u + o_n[:, None] * RANK + o_r[None, :], mask=(o_n < N)[:, None], other=0.0)
                b_t = tl.load(p_t + o_m[None, :] * RANK + o_r[:, None], mask=(o_m < M)[None, :], other=0.0)
                acc = tl.dot(b_u.to(b_t.dtype), b_t, acc, input_precision="ieee")
    return acc


@triton.jit
def finish(acc, p_bias, p_y, p_work, p_count, o_n, o_m, N, M, BIAS: tl.constexpr, SPLITS: tl.constexpr):
    """Store acc [n, m] transposed into y [M, N]; with several SPLITS, the last program to arrive adds their sums.

    `p_work` has room for SPLITS x M x N floats, fewer than 2**31, of any value. `p_count` holds a zero for every tile
    and is zero again afterwards.
    """
    m_y = (o_n < N)[:, None] & (o_m < M)[None, :]
    o_y = o_m.to(tl.int64)[None, :] * N + o_n[:, None]
    last = True
    if SPLITS > 1:
        p_tile = p_count + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0)
        tl.store(p_work + tl.program_id(2) * M * N + o_y, acc, mask=m_y)
        tl.debug_barrier()
        last = tl.atomic_add(p_tile, 1, sem="acq_rel", scope="gpu") == SPLITS - 1
    if last:
        if SPLITS > 1:
            acc = tl.zeros_like(acc)
            for i in range(SPLITS):
                acc += tl.load(p_work + i * M * N + o_y, mask=m_y, other=0.0, cache_modifier=".cg")
            tl.store(p_count + tl.program_id(1) * tl.num_programs(0) + tl.program_id(0), 0)
        if BIAS:
            acc += tl.load(p_bias + o_n, mask=o_n < N, other=0.0).to(tl.float32)[:, None]
        tl.store(p_y + o_y, acc.to(p_y.dtype.element_ty), mask=m_y)
