"""PTX that spreads kept values over the places of their group, as text: two 16-bit lanes in each 32-bit register.

A lane mask is 0 or -1 in a half of a register. The bits of a word are stored so that one shift brings two of them to
the tops of the two bytes of a half (`nm.places`), and the sign of a byte, repeated, is a mask: three instructions give
two. Values are sorted by place, the ones of the front half of a group from the first slot on, those of the back half
from the last slot back: so each half needs only the masks of its own places, and a group that keeps fewer has a gap.
"""

from __future__ import annotations

from compress_kernels.gpu.asm import MAGIC, MANTISSA, bits_of, setting, twice

COUNT = "popc.b32 $0,$1;"  # the bits that are set in all 32


def spread(keep: int, of: int, group: int) -> str:
    """Planes $0.. of the elements of a group, from the slots that follow and then the words of masks."""
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
    """Lane masks k0.. from bits `low` on, of the lower and the upper byte of each word."""
    lines = []
    for b in range(half):
        shift = 7 - (low + b)
        source = "t" if shift else word
        if shift:
            lines.append(f"shl.b32 t,{word},{shift};")
        lines += [f"prmt.b32 k{b},{source},{source},0xAA88;", f"prmt.b32 k{b + half},{source},{source},0xBB99;"]
    return lines


def spread_packed(keep: int) -> str:
    """As `spread`, of groups of four, but of words of four codes of 4 bits: the groups of a word all at once.

    Bit 4 g + e of a word of masks is element e of group g, so that a bit, times 15, is a mask of the code of its group.
    """
    word, slots = f"${4 + keep}", [f"${4 + i}" for i in range(keep)]
    lines = ["{ .reg .b32 t,k0,k1,k2,k3,q0;"]
    for e in range(4):
        lines += [f"shr.u32 t,{word},{e};"] if e else [f"mov.b32 t,{word};"]
        lines.append(f"and.b32 t,t,0x11111111; mul.lo.u32 k{e},t,15;")
    return " ".join([*lines, *chosen([0, 1], slots), *chosen([3, 2], slots[::-1]), "}"])


def nibble(plane: int, kind: str, zero: bool) -> str:
    """Code `plane` of the words $1 of codes stored as `code xor zero`, minus the zero: 0 is 0, also where masked.

    The zero is 8, or that which is in $2, a magic number with the zero at the place of the code, and in $3, minus both.
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
    """Outputs of the elements of half a group, outermost first: the next slot where the mask is set, else 0.

    q0, q1, ... are the slots from the next one on; after an element that took one, all move up.
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
            else:  # the last slot: if it was taken, no mask that follows is set
                moved.append(queue[i])
        queue = moved
    return lines


def less(kind: str) -> str:
    """$1 minus $2."""
    if kind == "fp16":
        return "sub.f16x2 $0,$1,$2;"
    return f"{{ .reg .b32 a; mov.b32 a,{twice(bits_of(-1.0, kind))}; fma.rn.bf16x2 $0,$2,a,$1; }}"
