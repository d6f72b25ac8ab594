"""Decodes tiles of 16-bit words into the floats that a matrix product takes.

Each function has two branches that must agree bit for bit: inline assembly, which decodes two lanes per instruction,
for GPUs; and plain Triton, for the interpreter and as the specification of the assembly. The assembly strings are also
tested in an emulator.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress_kernels.gpu import asm

KINDS = ("fp16", "bf16")
# Asm texts by bits, kind and plane in flat tuples, because a kernel can index constants but not call Python.
INTEGER = tl.constexpr(
    tuple(asm.integer(b, j % (16 // b), kind) for b in (1, 2, 4, 8) for kind in KINDS for j in range(16))
)
SIGNED = tl.constexpr(tuple(asm.signed(j, kind) for kind in KINDS for j in range(2)))
SUBNORMAL = tl.constexpr(tuple(asm.subnormal(b, j) for b in (2, 3, 4) for j in range(16)))
SMALL = tl.constexpr(
    tuple(
        asm.small(f, j % (16 // (1 + sum(asm.SMALL[f]))), kind) for f in asm.SMALL for kind in KINDS for j in range(4)
    )
)
LOOKED_UP = tl.constexpr(asm.looked_up())
LOOKED_UP_OF = tl.constexpr("=r,=r,=r,=r,r" + ",r" * 16)
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
    """Plane J (0 to 15) of three-bit codes, minus 4; `b_low` has words of the lower two bits, `b_high` of the third."""
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


@triton.jit
def signed(b_q, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Byte J of int16 words as a number from -128 to 127, in DTYPE."""
    if ASM:
        AT: tl.constexpr = (DTYPE == tl.bfloat16) * 2 + J
        bits = tl.inline_asm_elementwise(SIGNED[AT], "=r,r", [b_q], dtype=tl.int16, is_pure=True, pack=2)
        return bits.to(DTYPE, bitcast=True)
    else:
        return ((((b_q >> (8 * J)) & 255) ^ 128).to(tl.float32) - 128).to(DTYPE)


@triton.jit
def subnormal(b_q, b_high, J: tl.constexpr, BITS: tl.constexpr, ASM: tl.constexpr):
    """Plane J of codes of BITS bits (2, 3, 4) as float16 `code * 2**(place - 24)`, with place = BITS * J modulo 8.

    Codes of three bits have the place of their lower two bits; `b_high` holds the third bit and is not read otherwise.
    """
    LOW: tl.constexpr = 2 if BITS == 3 else BITS
    if ASM:
        AT: tl.constexpr = (BITS - 2) * 16 + J
        if BITS == 3:
            words = tl.inline_asm_elementwise(
                SUBNORMAL[AT], "=r,r,r", [b_q, b_high], dtype=tl.int16, is_pure=True, pack=2
            )
        else:
            words = tl.inline_asm_elementwise(SUBNORMAL[AT], "=r,r", [b_q], dtype=tl.int16, is_pure=True, pack=2)
        return words.to(tl.float16, bitcast=True)
    else:
        code = (b_q >> (LOW * J % 16)) & ((1 << LOW) - 1)
        if BITS == 3:
            code = code | (((b_high >> J) & 1) << 2)
        return (code << (LOW * J % 8)).to(tl.float16, bitcast=True)


@triton.jit
def small(b_q, J: tl.constexpr, FORM: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Plane J of small floats: e4m3, e5m2 or e2m1, without NaN and infinities, as DTYPE."""
    BITS: tl.constexpr = 4 if FORM == "e2m1" else 8
    if ASM:
        KIND: tl.constexpr = (0 if FORM == "e4m3" else 2 if FORM == "e5m2" else 4) + (DTYPE == tl.bfloat16)
        bits = tl.inline_asm_elementwise(SMALL[KIND * 4 + J], "=r,r", [b_q], dtype=tl.int16, is_pure=True, pack=2)
        return bits.to(DTYPE, bitcast=True)
    else:
        MANTISSA: tl.constexpr = 3 if FORM == "e4m3" else 2 if FORM == "e5m2" else 1
        TIMES: tl.constexpr = 2.0**120 if FORM == "e4m3" else 2.0**112 if FORM == "e5m2" else 2.0**126
        code = ((b_q >> (BITS * J)) & ((1 << BITS) - 1)).to(tl.int32)
        size = ((code & ((1 << (BITS - 1)) - 1)) << (23 - MANTISSA)).to(tl.float32, bitcast=True) * TIMES
        return tl.where((code >> (BITS - 1)) != 0, -size, size).to(DTYPE)


@triton.jit
def load_book(p_book, FORM: tl.constexpr, DTYPE: tl.constexpr):
    """The bytes of a book's entries in DTYPE, as eight registers: the lower bytes, then the upper bytes."""
    if FORM == "book":
        p = p_book + 8 * (DTYPE == tl.bfloat16)
        return (tl.load(p), tl.load(p + 1), tl.load(p + 2), tl.load(p + 3),
                tl.load(p + 4), tl.load(p + 5), tl.load(p + 6), tl.load(p + 7))  # fmt: skip
    else:
        return (0, 0, 0, 0, 0, 0, 0, 0)


@triton.jit
def looked_up(b_q, book, p_book, J: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Plane J of four-bit codes, looked up in `book`; `p_book` holds the float32 entries after the bytes."""
    if ASM:
        planes = tl.inline_asm_elementwise(
            LOOKED_UP, LOOKED_UP_OF,
            [b_q, book[0], book[1], book[2], book[3], book[4], book[5], book[6], book[7]],
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16), is_pure=True, pack=2,
        )  # fmt: skip
        return planes[J].to(DTYPE, bitcast=True)
    else:
        at = ((b_q >> (4 * J)) & 15).to(tl.int32)
        return tl.load(p_book + 16 + at).to(tl.float32, bitcast=True).to(DTYPE)


@triton.jit
def plane(
    b_q, b_more, b_high, book, p_book, J: tl.constexpr, FORM: tl.constexpr, BITS: tl.constexpr, SUBNORMAL: tl.constexpr,
    DTYPE: tl.constexpr, ASM: tl.constexpr,
):  # fmt: skip
    """Plane J of the words of any form of weight, unscaled; `b_more` and `b_high` are read for three bits only."""
    if BITS == 3:
        b_low = b_q if J < 8 else b_more
        if SUBNORMAL:
            return subnormal(b_low, b_high, J, BITS, ASM)
        else:
            return three(b_low, b_high, J, DTYPE, ASM)
    elif SUBNORMAL:
        return subnormal(b_q, b_q, J, BITS, ASM)
    elif FORM == "book":
        return looked_up(b_q, book, p_book, J, DTYPE, ASM)
    elif FORM == "int8":
        return signed(b_q, J, DTYPE, ASM)
    elif FORM == "int4" or FORM == "int2":
        return integer(b_q, J, BITS, DTYPE, ASM)
    else:
        return small(b_q, J, FORM, DTYPE, ASM)
