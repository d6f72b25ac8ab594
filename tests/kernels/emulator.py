"""Emulates the few PTX instructions that the inline assembly uses, on numpy arrays of 32-bit registers.

`lop3` evaluates its truth table, `prmt` selects bytes; the packed float instructions compute each half in float64 and
round once. An unknown instruction fails the test.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

U32 = np.uint32
Registers = Any  # arrays of uint32


def halves(x: Registers) -> list[Any]:
    return [(x & U32(0xFFFF)).astype(np.uint16), (x >> U32(16)).astype(np.uint16)]


def joined(low: Any, high: Any) -> Registers:
    return low.astype(U32) | (high.astype(U32) << U32(16))


def from_bits(kind: str, bits: Any) -> Any:
    """16-bit floats as float64."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    return (bits.astype(U32) << U32(16)).view(np.float32).astype(np.float64)


def to_bits(kind: str, values: Any) -> Any:
    """float64 rounded once to 16-bit floats."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().view(np.uint16)


def packed(kind: str, function: Callable[..., Any], *registers: Registers) -> Registers:
    lanes = zip(*(halves(register) for register in registers), strict=True)
    return joined(*(to_bits(kind, function(*(from_bits(kind, half) for half in lane))) for lane in lanes))


def lop3(a: Registers, b: Registers, c: Registers, table: int) -> Registers:
    result = np.zeros_like(a)
    for row in range(8):
        if table >> row & 1:
            result |= (a if row & 4 else ~a) & (b if row & 2 else ~b) & (c if row & 1 else ~c)
    return result


def prmt(a: Registers, b: Registers, selector: Registers) -> Registers:
    source = np.stack([(x >> U32(8 * i)) & U32(255) for x in (a, b) for i in range(4)])
    result = np.zeros_like(a)
    for place in range(4):
        chosen = selector >> U32(4 * place) & U32(15)
        byte = np.take_along_axis(source, (chosen & U32(7))[None].astype(np.int64), 0)[0]
        sign = np.where(byte >> U32(7), U32(255), U32(0)).astype(U32)  # the sign of the byte, eight times
        result |= np.where(chosen & U32(8), sign, byte) << U32(8 * place)
    return result


PLAIN: dict[str, Callable[..., Registers]] = {
    "prmt.b32": prmt,
    "mov.b32": lambda a: a,
    "shl.b32": lambda a, b: a << b,
    "shr.u32": lambda a, b: a >> b,
    "mul.lo.u32": lambda a, b: a * b,
    "and.b32": lambda a, b: a & b,
    "or.b32": lambda a, b: a | b,
    "xor.b32": lambda a, b: a ^ b,
    "not.b32": lambda a: ~a,
    "popc.b32": lambda a: np.unpackbits(a.view(np.uint8).reshape(-1, 4), axis=1).sum(1, dtype=U32),
    "sub.f16x2": lambda a, b: packed("f16", lambda x, y: x - y, a, b),
    "mul.f16x2": lambda a, b: packed("f16", lambda x, y: x * y, a, b),
    "fma.rn.f16x2": lambda a, b, c: packed("f16", lambda x, y, z: x * y + z, a, b, c),
    "fma.rn.bf16x2": lambda a, b, c: packed("bf16", lambda x, y, z: x * y + z, a, b, c),
}


def run(asm: str, outputs: int, inputs: list[Registers]) -> list[Registers]:
    """The values of $0, $1, ... after running inline assembly whose inputs follow its outputs."""
    values: dict[str, Registers] = {f"${outputs + i}": x.astype(U32) for i, x in enumerate(inputs)}
    size = len(inputs[0])
    for line in asm.strip().removeprefix("{").removesuffix("}").split(";"):
        if not line.strip() or line.strip().startswith(".reg"):
            continue
        name, _, rest = line.strip().partition(" ")
        target, *sources = (part.strip() for part in rest.split(","))
        if name == "lop3.b32":
            *sources, table = sources
            values[target] = lop3(*(operand(values, source, size) for source in sources), int(table, 0))
        else:
            values[target] = PLAIN[name](*(operand(values, source, size) for source in sources))
    return [values[f"${i}"] for i in range(outputs)]


def operand(values: dict[str, Registers], text: str, size: int) -> Registers:
    return values[text] if text in values else np.full(size, int(text, 0), dtype=U32)


def every_word() -> tuple[Registers, list[Any]]:
    """Registers whose low and high halves each take all 65,536 values, and these halves."""
    low = np.arange(1 << 16, dtype=U32)
    high = np.random.default_rng(0).permutation(low)
    return low | (high << U32(16)), [low.astype(np.uint16), high.astype(np.uint16)]
