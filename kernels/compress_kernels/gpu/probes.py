"""Kernels that each answer one question about a new GPU; `bench/first.py` runs them."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from compress_kernels.gpu import launch


@triton.jit
def _bits_product_kernel(p_a, p_b, p_y, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """One tile of a b^T, where a and b are 16-bit words read as float16."""
    o_m, o_n, o_k = tl.arange(0, BM), tl.arange(0, BN), tl.arange(0, BK)
    b_a = tl.load(p_a + o_m[:, None] * BK + o_k[None, :]).to(tl.float16, bitcast=True)
    b_b = tl.load(p_b + o_n[None, :] * BK + o_k[:, None]).to(tl.float16, bitcast=True)
    tl.store(p_y + o_m[:, None] * BN + o_n[None, :], tl.dot(b_a, b_b, out_dtype=tl.float32))


def bits_product(a_MK: Tensor, b_NK: Tensor) -> Tensor:
    """`a @ b.T` in float32 for int16 words that are the bits of float16 numbers; [M, K] and [N, K] are one tile."""
    y_MN = torch.full((a_MK.shape[0], b_NK.shape[0]), torch.nan, dtype=torch.float32, device=a_MK.device)
    launch.run(
        _bits_product_kernel, (1,), a_MK, b_NK, y_MN, BM=a_MK.shape[0], BN=b_NK.shape[0], BK=a_MK.shape[1], num_warps=4
    )
    return y_MN
