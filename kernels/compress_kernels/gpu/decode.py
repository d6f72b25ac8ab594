"""Decoding of tiles of 16-bit words into the floats that a matrix product takes.

Each function has two branches that must agree bit for bit: inline assembly, two lanes an instruction, for GPUs; plain
Triton, for the interpreter and as the specification of the first. The strings are tested in an emulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress_kernels.gpu import asm

KINDS = ("fp16", "bf16")
# texts by bits, kind and plane, end to end: a kernel can index constants, but not call Python
INTEGER = tl.constexpr(
    tuple(asm.integer(b, j % (16 // b), kind) for b in (1, 2, 4, 8) for kind in KINDS for j in range(16))
)
THREE = tl.constexpr(tuple(asm.three(j, kind) for kind in KINDS for j in range(16)))

SIGN = tl.constexpr(tuple(asm.sign(j, kind) for kind in KINDS for j in range(16)))


@triton.jit
def integer(b_q, J: tl.constexpr, BITS: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Plane J of int16 words of codes of BITS bits (1, 2, 4, 8), minus 2**(BITS - 1), as DTYPE."""
    if ASM:
        LOG: tl.constexpr = 0 if BITS == 1 else 1 if BITS == 2 else 2 if BITS == 4 else 3
        AT: tl.constexpr = (2 * LOG + (DTYPE == tl.bfloat16)) * 16 + J
        bits = tl.inline_asm_elementwise(INTEGER[AT], "=r,r", [b_q], dtype=tl.int16, is_pure=True, pack=2)
        return bits.to(DTYPE, bitcast=True)
    else:
        return (((b_q >> (BITS * J)) & ((1 << BITS) - 1)).to(tl.float32) - (1 << (BITS - 1))).to(DTYPE)


@triton.jit
def three(b_low, b_high, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Plane J (0 to 15) of codes of three bits, minus 4: the words of the lower two bits, and of the third."""
    if ASM:
        AT: tl.constexpr = (DTYPE == tl.bfloat16) * 16 + J
        bits = tl.inline_asm_elementwise(THREE[AT], "=r,r,r", [b_low, b_high], dtype=tl.int16, is_pure=True, pack=2)
        return bits.to(DTYPE, bitcast=True)
    else:
        code = ((b_low >> (2 * (J % 8))) & 3) | (((b_high >> J) & 1) << 2)
        return (code.to(tl.float32) - 4).to(DTYPE)


@triton.jit
def sign(b_q, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """1 where bit J of int16 words is set, else -1, as DTYPE."""
    if ASM:
        AT: tl.constexpr = (DTYPE == tl.bfloat16) * 16 + J
        bits = tl.inline_asm_elementwise(SIGN[AT], "=r,r", [b_q], dtype=tl.int16, is_pure=True, pack=2)
        return bits.to(DTYPE, bitcast=True)
    else:
        return (((b_q >> J) & 1).to(tl.float32) * 2 - 1).to(DTYPE)
