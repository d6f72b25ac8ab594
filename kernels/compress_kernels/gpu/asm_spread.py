"""PTX that spreads kept values over the places of their group, as text, with two 16-bit lanes per 32-bit register.

A lane mask is 0 or -1 in one half of a register. The bits of a mask word are stored (`nm.places`) so that one shift
moves two of them to the top bits of the two bytes of a half. Replicating the sign of a byte then gives a mask, so that
three instructions make two masks. Values are sorted by place: those of the front half of a group fill its slots from
the first on, those of the back half from the last slot backwards. Each half therefore needs only the masks of its own
places, and a group that keeps fewer values has a gap.
"""

from __future__ import annotations

from compress_kernels.gpu.asm import MAGIC, MANTISSA, bits_of, setting, twice

COUNT = "popc.b32 $0,$1;"  # the number of set bits of 32


def spread(keep: int, of: int, group: int) -> str:
    """Asm that sets $0.. to the planes of the elements of a group, from its slots and then the mask words."""
    half, word = of // 2, f"${of + keep}"
    slots = [f"${of + i}" for i in range(keep)]
    names = ",".join(f"k{e}" for e in range(of)) + "," + ",".join(f"q{i}" for i in range(keep))
    return (
        f"{{ .reg .b32 t,{names}; "
        + " ".join(masks(half, group * half, word))
        + " "
        + " ".join(chosen(list(range(half)), slots))
        + " "
        + " ".join(chosen(list(reversed(range(half, of))), slots[::-1]))
        + " }"
    )


def masks(half: int, low: int, word: str) -> list[str]:
    """Instructions that make lane masks k0.. from the bits from `low` on of the two bytes of each mask word."""
    lines = []
    for b in range(half):
        shift = 7 - (low + b)
        source = "t" if shift else word
        if shift:
            lines.append(f"shl.b32 t,{word},{shift};")
        lines += [f"prmt.b32 k{b},{source},{source},0xAA88;", f"prmt.b32 k{b + half},{source},{source},0xBB99;"]
    return lines


def spread_packed(keep: int) -> str:
    """As `spread` for groups of four, but for words of four 4-bit codes: all groups of a mask word at once.

    Bit 4 g + e of a mask word belongs to element e of group g, so that the bit times 15 is a mask for the code of its
    group.
    """
    word, slots = f"${4 + keep}", [f"${4 + i}" for i in range(keep)]
    lines = ["{ .reg .b32 t,k0,k1,k2,k3,q0;"]
    for e in range(4):
        lines += [f"shr.u32 t,{word},{e};"] if e else [f"mov.b32 t,{word};"]
        lines.append(f"and.b32 t,t,0x11111111; mul.lo.u32 k{e},t,15;")
    return " ".join([*lines, *chosen([0, 1], slots), *chosen([3, 2], slots[::-1]), "}"])


def nibble(plane: int, kind: str, zero: bool) -> str:
    """Asm for code `plane` of the words $1, stored as `code xor zero`, minus the zero point; a masked code gives 0.

    The zero point is 8 or, with `zero`, given in two registers: $2 is a magic number with the zero point at the place
    of the code, and $3 is minus the sum of the magic number, scaled as the code is, and the zero point.
    """
    shift, place = setting(4, plane, kind)
    moved = f"shr.u32 t,$1,{shift};" if shift else "mov.b32 t,$1;"
    magic = "$2" if zero else twice(MAGIC[kind] ^ (8 << place))
    scale, whole = 0.5**place, 2.0 ** MANTISSA[kind]
    taken = "$3" if zero else twice(bits_of(-(whole * scale + 8), kind))
    return (
        f"{{ .reg .b32 t,a,c; {moved} lop3.b32 t,t,{twice(15 << place)},{magic},0x6A; "
        f"mov.b32 a,{twice(bits_of(scale, kind))}; mov.b32 c,{taken}; fma.rn.{kind.replace('fp', 'f')}x2 $0,t,a,c; }}"
    )


def chosen(elements: list[int], slots: list[str]) -> list[str]:
    """Instructions for the elements of half a group, outermost first: the next slot if the mask is set, else 0.

    q0, q1, ... are the remaining slots; after an element has taken one, all move up.
    """
    lines = []
    queue = slots[: len(elements)]
    for done, e in enumerate(elements, 1):
        lines.append(f"and.b32 ${e},{queue[0]},k{e};")
        moved = []
        for i in range(min(len(queue), len(elements) - done)):
            if i + 1 < len(queue):
                lines.append(f"lop3.b32 q{i},k{e},{queue[i + 1]},{queue[i]},0xCA;")
                moved.append(f"q{i}")
            else:  # the last slot: if it was taken, no later mask is set
                moved.append(queue[i])
        queue = moved
    return lines


def less(kind: str) -> str:
    """Asm for $1 minus $2."""
    if kind == "fp16":
        return "sub.f16x2 $0,$1,$2;"
    return f"{{ .reg .b32 a; mov.b32 a,{twice(bits_of(-1.0, kind))}; fma.rn.bf16x2 $0,$2,a,$1; }}"
