"""The PTX of every decoding step in inline assembly, as text, with two 16-bit lanes in each 32-bit register.

It is text so that a test can run each string in an emulator on all possible words. Magic numbers: setting the bits of a
code at place p of the mantissa of 1024 (float16, ten bits) or of 128 (bfloat16, seven) gives that number plus the code
times 2**p; one fused multiply-add removes both the number and the power of two, exactly.
"""

from __future__ import annotations

import struct

MANTISSA = {"fp16": 10, "bf16": 7}
MAGIC = {"fp16": 0x6400, "bf16": 0x4300}  # 1024 and 128


def twice(half: int) -> str:
    """A 16-bit constant in both lanes."""
    return f"0x{half & 0xFFFF:04X}{half & 0xFFFF:04X}"


def bits_of(value: float, kind: str) -> int:
    """The bit pattern of a number that `kind` represents exactly."""
    if kind == "fp16":
        return int(struct.unpack("<H", struct.pack("<e", value))[0])
    return int(struct.unpack("<I", struct.pack("<f", value))[0]) >> 16


def setting(bits: int, plane: int, kind: str) -> tuple[int, int]:
    """(shift, place): how far to shift a word right, and at which bit of the mantissa the code then begins.

    Raises ValueError if the code does not fit the mantissa of `kind`.
    """
    at = bits * plane
    for shift in (0, 8, at):
        if 0 <= at - shift and at - shift + bits <= MANTISSA[kind]:
            return shift, at - shift
    raise ValueError(f"{bits} bits do not fit the mantissa of {kind}")


def integer(bits: int, plane: int, kind: str) -> str:
    """Asm for code `plane` of the words $1, with 1, 2, 4 or 8 bits, minus 2**(bits - 1)."""
    if bits == 8 and kind == "bf16":
        return eight(plane)
    shift, place = setting(bits, plane, kind)
    moved = f"shr.u32 t,$1,{shift};" if shift else "mov.b32 t,$1;"
    mask = twice(((1 << bits) - 1) << place)
    return (
        "{ .reg .b32 t,a,c; "
        + moved
        + f" lop3.b32 t,t,{mask},{twice(MAGIC[kind])},0xEA; "
        + undo(place, kind, 1 << (bits - 1))
    )


def undo(place: int, kind: str, less: int) -> str:
    """The end of an asm, which sets $0 to the code minus `less` from the magic number in t."""
    scale, magic = 0.5**place, 2.0 ** MANTISSA[kind]
    taken = -(magic * scale + less)
    return (
        f"mov.b32 a,{twice(bits_of(scale, kind))}; mov.b32 c,{twice(bits_of(taken, kind))}; "
        f"fma.rn.{kind.replace('fp', 'f')}x2 $0,t,a,c; }}"
    )


def three(plane: int, kind: str) -> str:
    """Asm for code `plane` of three bits minus 4; two bits are in the words $1 (plane modulo 8), the third in $2."""
    shift, place = setting(2, plane % 8, kind)
    if place + 3 > MANTISSA[kind]:
        shift, place = 2 * (plane % 8), 0
    low = f"shr.u32 t,$1,{shift};" if shift else "mov.b32 t,$1;"
    up = plane - (place + 2)
    high = f"shr.u32 u,$2,{up};" if up > 0 else f"shl.b32 u,$2,{-up};"
    return (
        "{ .reg .b32 t,u,a,c; " + low + " " + high
        + f" lop3.b32 t,t,{twice(3 << place)},{twice(MAGIC[kind])},0xEA; lop3.b32 t,u,{twice(4 << place)},t,0xEA; "
        + undo(place, kind, 4)
    )  # fmt: skip


def eight(plane: int) -> str:
    """Asm for code `plane` of eight bits minus 128, in bf16, whose mantissa is too short for eight bits.

    Computes 128 plus the lower seven bits, minus 128 or 256 depending on the eighth bit, which in `code ^ 128` is the
    sign of `code - 128`. All steps are exact.
    """
    moved = "shr.u32 t,$1,8;" if plane else "mov.b32 t,$1;"
    return (
        "{ .reg .b32 t,u,a; " + moved + f" xor.b32 t,t,{twice(0x80)}; lop3.b32 u,t,{twice(0x80)},{twice(0x4300)},0xEA; "
        f"lop3.b32 t,t,{twice(0x7F)},{twice(0x4300)},0xEA; mov.b32 a,{twice(0xBF80)}; fma.rn.bf16x2 $0,u,a,t; }}"
    )


def sign(plane: int, kind: str) -> str:
    """Asm for 1 where bit `plane` of the words $1 is set, else -1: its complement becomes the sign bit of a one."""
    one = twice(bits_of(1.0, kind))
    return f"{{ .reg .b32 t; shl.b32 t,$1,{15 - plane}; lop3.b32 $0,t,{twice(0x8000)},{one},0xAE; }}"


def signed(plane: int, kind: str) -> str:
    """Asm for byte `plane` of the words $1 as a number from -128 to 127; words of eight bits hold `code ^ 128`."""
    moved = "shr.u32 t,$1,8;" if plane else "mov.b32 t,$1;"
    if kind == "fp16":  # the exclusive or restores the code, in the mantissa of 1024
        flipped = f" lop3.b32 t,t,{twice(0xFF)},{twice(MAGIC[kind] | 0x80)},0x6A; "
        return "{ .reg .b32 t,a,c; " + moved + flipped + undo(0, kind, 128)
    return (
        "{ .reg .b32 t,u,a; " + moved + f" lop3.b32 u,t,{twice(0x80)},{twice(0x4300)},0xEA; "
        f"lop3.b32 t,t,{twice(0x7F)},{twice(0x4300)},0xEA; mov.b32 a,{twice(0xBF80)}; fma.rn.bf16x2 $0,u,a,t; }}"
    )


def subnormal(bits: int, plane: int) -> str:
    """Asm for code `plane` as the float16 number `code * 2**(place - 24)`, with place = bits * plane modulo 8.

    For two or four bits, the bits of the code in the word already are those of this subnormal number, so one AND
    suffices. The factor 2**place is divided out of x. A code of three bits has two bits in the words $1, which set the
    place, and the third, above them, in the words $2.
    """
    low = 2 if bits == 3 else bits
    shift, place = divmod(low * plane % 16, 8)
    moved, start = ("shr.u32 t,$1,8; ", "t") if shift else ("", "$1")
    if bits != 3:
        return f"{{ .reg .b32 t; {moved}and.b32 $0,{start},{twice(((1 << bits) - 1) << place)}; }}"
    up = plane - (place + 2)
    high = f"shr.u32 u,$2,{up};" if up > 0 else f"shl.b32 u,$2,{-up};"
    return (
        f"{{ .reg .b32 t,u; {moved}{high} and.b32 t,{start},{twice(3 << place)}; "
        f"lop3.b32 $0,u,{twice(4 << place)},t,0xEA; }}"
    )


SMALL = {"e4m3": (4, 3), "e5m2": (5, 2), "e2m1": (2, 1)}  # bits of exponent and mantissa, after the sign bit
BIAS = {"fp16": 15, "bf16": 127}


def rescale(form: str, kind: str) -> float:
    """The power of two by which to multiply a small float's bits when they are read as a wider float's."""
    return float(2.0 ** (BIAS[kind] - (2 ** (SMALL[form][0] - 1) - 1)))


def small(form: str, plane: int, kind: str) -> str:
    """Asm for small float `plane` of the words $1: sign and rest are moved into place, then multiplied exactly.

    The multiplication turns subnormal numbers into normal ones before a tensor core reads them. e5m2 has the exponents
    of float16 and needs no multiplication in it.
    """
    exponent, mantissa = SMALL[form]
    bits, right = 1 + exponent + mantissa, MANTISSA[kind] - mantissa
    up, move = 16 - bits * (plane + 1), bits * plane - right
    sign = f"shl.b32 t,$1,{up};" if up else "mov.b32 t,$1;"
    if rescale(form, kind) == 1:
        return f"{{ .reg .b32 t; {sign} and.b32 $0,t,{twice(0xFF00)}; }}"
    rest = f"shr.u32 u,$1,{move};" if move > 0 else f"shl.b32 u,$1,{-move};" if move else "mov.b32 u,$1;"
    mask = twice(((1 << (bits - 1)) - 1) << right)
    times = f"mov.b32 u,{twice(bits_of(rescale(form, kind), kind))};"
    product = "mul.f16x2 $0,t,u;" if kind == "fp16" else f"mov.b32 v,{twice(0x8000)}; fma.rn.bf16x2 $0,t,u,v;"
    return (
        f"{{ .reg .b32 t,u,v; {sign} {rest} and.b32 u,u,{mask}; lop3.b32 t,t,{twice(0x8000)},u,0xEA; "
        f"{times} {product} }}"
    )


def looked_up() -> str:
    """Asm that looks planes 0 to 3 of the words $4 up in a book of 16 entries; results are in $0 to $3.

    The book is in eight registers $5, $7, ... $19 (a register pair each, for two lanes): the lower bytes of its
    entries, then the upper bytes. A byte permutation looks four codes up in eight bytes; the fourth bit of a code,
    spread over a byte, selects between the halves of the book; then the bytes are joined. This reads no memory, because
    a warp that reads a table at 32 places would wait for about as many cache lines.
    """
    low0, low1, low2, low3, up0, up1, up2, up3 = (f"${5 + 2 * i}" for i in range(8))

    def word(select: str, mask: str, first: str, second: str) -> str:
        """Look up the four codes of one half: planes 0 and 1 go to `first`, 2 and 3 to `second`."""
        return (
            f"prmt.b32 a,{low0},{low1},{select}; prmt.b32 b,{low2},{low3},{select}; lop3.b32 a,{mask},b,a,0xCA; "
            f"prmt.b32 b,{up0},{up1},{select}; prmt.b32 c,{up2},{up3},{select}; lop3.b32 b,{mask},c,b,0xCA; "
            f"prmt.b32 {first},a,b,0x5140; prmt.b32 {second},a,b,0x7362; "
        )

    return (
        "{ .reg .b32 a,b,c,d,e,f,g,s,t,u,m,n; and.b32 s,$4,0x77777777; shr.u32 u,s,16; shl.b32 t,$4,4; "
        "prmt.b32 m,t,$4,0xD9C8; prmt.b32 n,t,$4,0xFBEA; "
        + word("s", "m", "d", "e") + word("u", "n", "f", "g")
        + "prmt.b32 $0,d,f,0x5410; prmt.b32 $1,d,f,0x7632; prmt.b32 $2,e,g,0x5410; prmt.b32 $3,e,g,0x7632; }"
    )  # fmt: skip
