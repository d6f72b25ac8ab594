"""Inline assembly against its specification, bit for bit, on every 16-bit word, in an emulator of its instructions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest

from compress_kernels.gpu import asm

KINDS = ("fp16", "bf16")


@pytest.fixture(scope="module")
def emulator(load_helper: Any) -> ModuleType:
    return load_helper("emulator")  # type: ignore[no-any-return]


def decoded(emulator: ModuleType, kind: str, register: Any) -> list[Any]:
    return [emulator.from_bits(kind.replace("fp", "f"), half) for half in emulator.halves(register)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "plane"), [(b, j) for b in (1, 2, 4, 8) for j in range(16 // b)])
def test_integer_codes(emulator: ModuleType, bits: int, plane: int, kind: str) -> None:
    words, lanes = emulator.every_word()

    (got,) = emulator.run(asm.integer(bits, plane, kind), 1, [words])

    for value, lane in zip(decoded(emulator, kind, got), lanes, strict=True):
        code = (lane.astype(int) >> (bits * plane)) & (2**bits - 1)
        np.testing.assert_array_equal(value, code - 2 ** (bits - 1))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plane", range(16))
def test_codes_of_three_bits(emulator: ModuleType, plane: int, kind: str) -> None:
    low, low_lanes = emulator.every_word()
    high = np.random.default_rng(1).permutation(low)

    (got,) = emulator.run(asm.three(plane, kind), 1, [low, high])

    for value, two, one in zip(decoded(emulator, kind, got), low_lanes, emulator.halves(high), strict=True):
        code = (two.astype(int) >> (2 * (plane % 8)) & 3) | (one.astype(int) >> plane & 1) << 2
        np.testing.assert_array_equal(value, code - 4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plane", range(16))
def test_signs(emulator: ModuleType, plane: int, kind: str) -> None:
    words, lanes = emulator.every_word()

    (got,) = emulator.run(asm.sign(plane, kind), 1, [words])

    for value, lane in zip(decoded(emulator, kind, got), lanes, strict=True):
        np.testing.assert_array_equal(value, 2 * (lane.astype(int) >> plane & 1) - 1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plane", [0, 1])
def test_bytes_with_a_sign(emulator: ModuleType, plane: int, kind: str) -> None:
    words, lanes = emulator.every_word()

    (got,) = emulator.run(asm.signed(plane, kind), 1, [words])

    for value, lane in zip(decoded(emulator, kind, got), lanes, strict=True):
        np.testing.assert_array_equal(value, ((lane >> (8 * plane)) & 255).astype(np.int8))


@pytest.mark.parametrize(("bits", "plane"), [(b, j) for b, planes in ((2, 8), (3, 16), (4, 4)) for j in range(planes)])
def test_codes_as_subnormal_numbers(emulator: ModuleType, bits: int, plane: int) -> None:
    low, low_lanes = emulator.every_word()
    high = np.random.default_rng(1).permutation(low)

    (got,) = emulator.run(asm.subnormal(bits, plane), 1, [low, high] if bits == 3 else [low])

    each = 2 if bits == 3 else bits
    place = each * plane % 8
    for value, word, top in zip(decoded(emulator, "fp16", got), low_lanes, emulator.halves(high), strict=True):
        code = word.astype(int) >> (each * plane % 16) & (2**each - 1)
        code += ((top.astype(int) >> plane & 1) << 2) * (bits == 3)
        np.testing.assert_array_equal(value, code * 2.0 ** (place - 24))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("form", "plane"), [(f, j) for f in asm.SMALL for j in range(16 // (1 + sum(asm.SMALL[f])))])
def test_small_floats(emulator: ModuleType, form: str, plane: int, kind: str) -> None:
    exponent, mantissa = asm.SMALL[form]
    words, lanes = emulator.every_word()

    (got,) = emulator.run(asm.small(form, plane, kind), 1, [words])

    for value, lane in zip(decoded(emulator, kind, got), lanes, strict=True):
        bits = 1 + exponent + mantissa
        code = lane.astype(int) >> (bits * plane) & (2**bits - 1)
        power, rest = code >> mantissa & (2**exponent - 1), code & (2**mantissa - 1)
        size = (rest + (power > 0) * 2**mantissa) * 2.0 ** (np.maximum(power, 1) - mantissa - 2 ** (exponent - 1) + 1)
        finite = np.isfinite(value)  # the largest exponent of e5m2 is no number, and refused
        want = np.copysign(size, 0.5 - (code >> (bits - 1)))
        np.testing.assert_array_equal(value[finite], want[finite])
        np.testing.assert_array_equal(np.signbit(value), np.signbit(want))
        assert finite.all() or (form == "e5m2" and not (power[~finite] < 2**exponent - 1).any())


def test_entries_of_a_book(emulator: ModuleType) -> None:
    words, lanes = emulator.every_word()
    entries = np.random.default_rng(2).permutation(1 << 16)[:16].astype(np.uint16)  # any bits
    table = np.stack((entries & 255, entries >> 8)).astype(np.uint8).reshape(-1).view("<u4")
    registers = [np.full_like(words, part) for part in table for _ in range(2)]

    planes = emulator.run(asm.looked_up(), 4, [words, *registers])

    for plane, got in enumerate(planes):
        for value, lane in zip(emulator.halves(got), lanes, strict=True):
            np.testing.assert_array_equal(value, entries[lane >> (4 * plane) & 15])
