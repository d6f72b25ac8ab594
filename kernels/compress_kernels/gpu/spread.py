"""Decodes tiles of an N:M weight: kept values from their words, and their places from a bitmap.

As in `decode.py`, inline assembly and the plain branch agree bit for bit. Values are passed as their bits in int16, so
that applying a mask is one AND for every format.
"""

from __future__ import annotations

import triton
import triton.language as tl

from compress_kernels.gpu import asm_spread
from compress_kernels.gpu.asm import MAGIC, MANTISSA, setting
from compress_kernels.gpu.decode import KINDS, integer, small

SIZES = (2, 4, 8, 16)
# Asm texts and constraints in flat tuples, by group size, kept values per group (0 to 15) and group of a word (0 to 7)
SPREAD = tl.constexpr(
    tuple(
        asm_spread.spread(keep, of, group) if 0 < keep < of and group < 16 // of else ""
        for of in SIZES for keep in range(16) for group in range(8)
    )
)  # fmt: skip
CONSTRAINTS = tl.constexpr(tuple(",".join(["=&r"] * of + ["r"] * (keep + 1)) for of in SIZES for keep in range(16)))
PACKED = tl.constexpr(tuple(asm_spread.spread_packed(keep) if keep else "" for keep in range(4)))
# By kind and plane: asm texts without and with a zero point; the place of a code in the magic number; the magic number;
# and what is subtracted with 8.
NIBBLE = tl.constexpr(
    tuple(asm_spread.nibble(j, kind, zero) for zero in (False, True) for kind in KINDS for j in range(4))
)
PLACES = tl.constexpr(tuple(setting(4, j, kind)[1] for kind in KINDS for j in range(4)))
MAGICS = tl.constexpr(tuple(MAGIC[kind] for kind in KINDS for j in range(4)))
WHOLES = tl.constexpr(tuple(2.0 ** (MANTISSA[kind] - setting(4, j, kind)[1]) + 8 for kind in KINDS for j in range(4)))
LESS = tl.constexpr(tuple(asm_spread.less(kind) for kind in KINDS))


@triton.jit
def spread(values, b_mask, G: tl.constexpr, KEEP: tl.constexpr, OF: tl.constexpr, ASM: tl.constexpr):
    """The OF planes, int16, of group G of the mask words, from the KEEP slots of the group; 0 where nothing is kept."""
    LOG: tl.constexpr = 0 if OF == 2 else 1 if OF == 4 else 2 if OF == 8 else 3
    AT: tl.constexpr = LOG * 16 + KEEP
    if ASM:
        TEXT: tl.constexpr = SPREAD[AT * 8 + G]
        REGISTERS: tl.constexpr = CONSTRAINTS[AT]
        given = values + (b_mask,)
        if OF == 2:
            return tl.inline_asm_elementwise(TEXT, REGISTERS, given, (tl.int16, tl.int16), True, 2)
        elif OF == 4:
            return tl.inline_asm_elementwise(TEXT, REGISTERS, given, (tl.int16, tl.int16, tl.int16, tl.int16), True, 2)
        elif OF == 8:
            return tl.inline_asm_elementwise(
                TEXT, REGISTERS, given,
                (tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16), True, 2,
            )  # fmt: skip
        else:
            return tl.inline_asm_elementwise(
                TEXT, REGISTERS, given,
                (
                    tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                    tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16,
                ), True, 2,
            )  # fmt: skip
    else:
        return spread_plainly(values, b_mask, G, KEEP, OF)


@triton.jit
def spread_plainly(values, b_mask, G: tl.constexpr, KEEP: tl.constexpr, OF: tl.constexpr):
    """The specification of `spread`: slots count from the first in the front half of a group, else from the last."""
    HALF: tl.constexpr = OF // 2
    front, back = tl.tuple(()), tl.tuple(())
    b_first, b_last = tl.zeros_like(b_mask), tl.full(b_mask.shape, KEEP - 1, tl.int16)
    for e in tl.static_range(HALF):
        b_on, b_off = kept(b_mask, G * HALF + e), kept(b_mask, G * HALF + 8 + HALF - 1 - e)
        front = front + (slot(values, b_first, KEEP) * b_on,)
        back = tl.tuple((slot(values, b_last, KEEP) * b_off,)) + back
        b_first, b_last = b_first + b_on, b_last - b_off
    return front + back


@triton.jit
def slot(values, b_at, KEEP: tl.constexpr):
    """For each entry, the value from the one of KEEP tiles that `b_at` selects."""
    b_slot = values[0]
    for i in tl.static_range(1, KEEP):
        b_slot = tl.where(b_at == i, values[i], b_slot)
    return b_slot


@triton.jit
def kept(b_mask, BIT: tl.constexpr):
    """Bit BIT of each word, 0 or 1."""
    return (b_mask >> BIT) & 1


@triton.jit
def spread_packed(slots, b_mask, KEEP: tl.constexpr, ASM: tl.constexpr):
    """Words of four codes for each of the four elements, from KEEP words of slots; 0 where nothing is kept."""
    if ASM:
        given = slots + (b_mask,)
        return tl.inline_asm_elementwise(
            PACKED[KEEP], CONSTRAINTS[16 + KEEP], given, (tl.int16, tl.int16, tl.int16, tl.int16), True, 2
        )
    else:
        k0, k1 = (b_mask & 0x1111) * 15, ((b_mask >> 1) & 0x1111) * 15
        k2, k3 = ((b_mask >> 2) & 0x1111) * 15, ((b_mask >> 3) & 0x1111) * 15
        first, last = slots[0], slots[KEEP - 1]
        if KEEP == 1:
            return first & k0, first & k1, first & k2, first & k3
        else:
            second = (k0 & slots[1]) | (~k0 & first)
            third = (k3 & slots[KEEP - 2]) | (~k3 & last)
            return first & k0, second & k1, third & k2, last & k3


@triton.jit
def nibbles(words, b_zero, J: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Plane J of each of four words of codes as the bits of DTYPE, minus the zero point.

    The zero point is 8 or, with ZERO, 8 plus `b_zero` of each row.
    """
    return (
        nibble(words[0], b_zero, J, ZERO, DTYPE, ASM), nibble(words[1], b_zero, J, ZERO, DTYPE, ASM),
        nibble(words[2], b_zero, J, ZERO, DTYPE, ASM), nibble(words[3], b_zero, J, ZERO, DTYPE, ASM),
    )  # fmt: skip


@triton.jit
def nibble(b_q, b_zero, J: tl.constexpr, ZERO: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Plane J of words of codes that are stored as `code xor zero`, minus the zero point, as bits."""
    AT: tl.constexpr = (DTYPE == tl.bfloat16) * 4 + J
    if ASM and ZERO:
        b_xor = ((b_zero.to(tl.int16) + 8) << PLACES[AT]) | MAGICS[AT]
        b_less = (-WHOLES[AT] - b_zero.to(tl.float32)).to(DTYPE).to(tl.int16, bitcast=True)
        b_xor, _ = tl.broadcast(b_xor[:, None], b_q)
        b_less, _ = tl.broadcast(b_less[:, None], b_q)
        return tl.inline_asm_elementwise(
            NIBBLE[8 + AT], "=r,r,r,r", [b_q, b_xor, b_less], dtype=tl.int16, is_pure=True, pack=2
        )
    elif ASM:
        return tl.inline_asm_elementwise(NIBBLE[AT], "=r,r", [b_q], dtype=tl.int16, is_pure=True, pack=2)
    else:
        b_at = b_zero.to(tl.int16)[:, None] + 8 if ZERO else 8
        return ((((b_q >> (4 * J)) & 15) ^ b_at) - b_at).to(DTYPE).to(tl.int16, bitcast=True)


@triton.jit
def value(b_q, C: tl.constexpr, FORMAT: tl.constexpr, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """The bits of value C of the words of a format: "half" as stored, "int4" and "int8" minus half the range, "fp8"."""
    if FORMAT == "half":
        return b_q
    elif FORMAT == "fp8":
        return small(b_q, C % 2, "e4m3", DTYPE, ASM).to(tl.int16, bitcast=True)
    else:
        BITS: tl.constexpr = 4 if FORMAT == "int4" else 8
        return integer(b_q, C % (16 // BITS), BITS, DTYPE, ASM).to(tl.int16, bitcast=True)


@triton.jit
def less(b_v, b_z, DTYPE: tl.constexpr, ASM: tl.constexpr):
    """Values minus one number per row, all of DTYPE and as bits; exact for integers up to 256."""
    if ASM:
        AT: tl.constexpr = 1 if DTYPE == tl.bfloat16 else 0
        b_rows, b_v = tl.broadcast(b_z.to(tl.int16, bitcast=True)[:, None], b_v)
        return tl.inline_asm_elementwise(LESS[AT], "=r,r,r", [b_v, b_rows], dtype=tl.int16, is_pure=True, pack=2)
    else:
        b_float = b_v.to(DTYPE, bitcast=True).to(tl.float32) - b_z.to(tl.float32)[:, None]
        return b_float.to(DTYPE).to(tl.int16, bitcast=True)
