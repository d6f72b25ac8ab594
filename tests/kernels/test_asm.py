"""Inline assembly against what it stands for, bit for bit, on every 16-bit word, in an emulator of its instructions."""

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
