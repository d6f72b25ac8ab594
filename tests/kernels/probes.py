"""Kernels with a single operation each, for comparing the interpreter with torch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def product(p_a, p_b, p_c, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(p_c + o, tl.dot(tl.load(p_a + o), tl.load(p_b + o)))


@triton.jit
def cast(p_x, p_y, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_y + o, tl.load(p_x + o).to(p_y.dtype.element_ty))


@triton.jit
def add(p_x, p_y, p_z, N: tl.constexpr):
    o = tl.arange(0, N)
    tl.store(p_z + o, tl.load(p_x + o) + tl.load(p_y + o))


@triton.jit
def count(p_y, n):
    total = 0.0
    for _ in range(0, n):
        total += 1.0
    tl.store(p_y, total)
