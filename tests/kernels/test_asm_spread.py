"""The inline assembly of N:M weights against its specification, bit for bit, in an emulator of its instructions."""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from compress_kernels import nm
from compress_kernels.gpu import asm, asm_spread

KINDS = {"fp16": torch.float16, "bf16": torch.bfloat16}
CASES = [(keep, of, group) for of in nm.SIZES for keep in range(1, of) for group in range(16 // of)]


@pytest.fixture(scope="module")
def emulator(load_helper: Any) -> ModuleType:
    return load_helper("emulator")  # type: ignore[no-any-return]


def spread(words: Any, slots: list[Any], keep: int, of: int, group: int) -> list[Any]:
    """Element by element: the front half of a group counts its slots from the first, the back half from the last."""
    bit = nm.places(of, "half", torch.device("cpu"))[group].tolist()
    on = [(words >> b & 1).astype(bool) for b in bit]
    planes = []
    for e in range(of):
        others = on[:e] if e < of // 2 else on[e + 1 :]
        taken = np.sum([words != words, *others], axis=0)
        at = taken if e < of // 2 else keep - 1 - taken
        chosen = np.select([at == i for i in range(keep)], slots, 0)
        planes.append(np.where(on[e], chosen, 0))
    return planes


@pytest.mark.slow
@pytest.mark.parametrize(("keep", "of", "group"), CASES)
def test_kept_values_reach_their_places(emulator: ModuleType, keep: int, of: int, group: int) -> None:
    words, lanes = emulator.every_word()
    bit = nm.places(of, "half", torch.device("cpu"))[group].tolist()
    allowed = [sum((lane.astype(int) >> b & 1) for b in bit) <= keep for lane in lanes]
    random = np.random.default_rng(0)
    slots = [random.integers(0, 1 << 32, size=words.size, dtype=np.uint32) for _ in range(keep)]

    got = emulator.run(asm_spread.spread(keep, of, group), of, [*slots, words])

    for lane, ok in enumerate(allowed):
        values = [emulator.halves(slot)[lane] for slot in slots]
        for plane, want in zip(got, spread(lanes[lane].astype(int), values, keep, of, group), strict=True):
            np.testing.assert_array_equal(emulator.halves(plane)[lane][ok], want[ok])


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_kept_codes_reach_their_places_while_packed(emulator: ModuleType, keep: int) -> None:
    words, lanes = emulator.every_word()
    random = np.random.default_rng(0)
    slots = [random.integers(0, 1 << 32, size=words.size, dtype=np.uint32) for _ in range(keep)]

    got = emulator.run(asm_spread.spread_packed(keep), 4, [*slots, words])

    for lane in range(2):
        for group in range(4):
            on = [(lanes[lane].astype(int) >> (4 * group + e) & 1).astype(bool) for e in range(4)]
            few = sum(x.astype(int) for x in on) <= keep
            codes = [emulator.halves(slot)[lane].astype(int) >> (4 * group) & 15 for slot in slots]
            for e, plane in enumerate(got):
                others = on[:e] if e < 2 else on[e + 1 :]
                taken = sum((x.astype(int) for x in others), np.zeros(words.size, int))
                want = np.select([(taken if e < 2 else keep - 1 - taken) == i for i in range(keep)], codes, 0)
                code = emulator.halves(plane)[lane].astype(int) >> (4 * group) & 15
                np.testing.assert_array_equal(code[few], np.where(on[e], want, 0)[few])


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("plane", range(4))
def test_codes_stored_with_their_zero(emulator: ModuleType, plane: int, kind: str) -> None:
    words, lanes = emulator.every_word()
    name = kind.replace("fp", "f")
    place = asm.setting(4, plane, kind)[1]
    zero = np.random.default_rng(0).integers(0, 16, size=words.size)
    magic = asm.MAGIC[kind] | zero << place
    less = emulator.to_bits(name, -(2.0 ** asm.MANTISSA[kind] / 2**place + zero))
    operands = [emulator.joined(x.astype(np.uint16), x.astype(np.uint16)) for x in (magic, less)]

    (plain,) = emulator.run(asm_spread.nibble(plane, kind, False), 1, [words])
    (shifted,) = emulator.run(asm_spread.nibble(plane, kind, True), 1, [words, *operands])

    for lane, one, other in zip(lanes, emulator.halves(plain), emulator.halves(shifted), strict=True):
        code = lane.astype(int) >> (4 * plane) & 15
        np.testing.assert_array_equal(emulator.from_bits(name, one), (code ^ 8) - 8)
        np.testing.assert_array_equal(emulator.from_bits(name, other), (code ^ zero) - zero)


@pytest.mark.parametrize("kind", KINDS)
def test_whole_zeros_are_subtracted_exactly(emulator: ModuleType, kind: str) -> None:
    code = np.repeat(np.arange(-128.0, 128), 256)
    zero = np.tile(np.arange(-128.0, 128), 256)
    name = kind.replace("fp", "f")
    twice = [emulator.joined(bits, bits) for bits in (emulator.to_bits(name, code), emulator.to_bits(name, zero))]

    (got,) = emulator.run(asm_spread.less(kind), 1, twice)

    for half in emulator.halves(got):
        np.testing.assert_array_equal(emulator.from_bits(name, half), code - zero)


def test_bits_are_counted(emulator: ModuleType) -> None:
    words, _ = emulator.every_word()

    (got,) = emulator.run(asm_spread.COUNT, 1, [words])

    np.testing.assert_array_equal(got, [int(word).bit_count() for word in words])
