"""The hash of every file detects every bit flip, truncation and exchange; added and missing files are detected, too."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from compress.artifact import verify
from compress.errors import CompressError

FLIPS = 40  # a file, and so some hundreds an artifact


def refused(folder: Path, tally: Any, what: str) -> None:
    """Assert that `verify` refuses the folder as it now is, in one line."""
    with tally("damage", what):
        with pytest.raises(CompressError) as caught:
            verify(folder)
        assert str(caught.value).isprintable()


@pytest.fixture
def sealed(own_artifact: Path) -> Path:
    """An artifact to damage, as a run wrote it."""
    assert verify(own_artifact)
    return own_artifact


def same(name: str, before: bytes, after: bytes) -> bool:
    """Whether two contents of compress.json say the same: a space may have become another white space."""
    try:
        return name == "compress.json" and bool(json.loads(before) == json.loads(after))
    except ValueError:
        return False


def flip(sealed: Path, tally: Any, places: Callable[[int], list[int]]) -> int:
    """Flip each of these bits of every file, alone; how many were."""
    flips = 0
    for file in sorted(sealed.iterdir()):
        before = file.read_bytes()
        for bit in places(8 * len(before)):
            changed = bytearray(before)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            if not same(file.name, before, changed):
                refused(sealed, tally, "a flipped bit")
                flips += 1
        file.write_bytes(before)
    return flips


@pytest.mark.slow
def test_every_flipped_bit_is_found(sealed: Path, tally: Any) -> None:
    chance = random.Random(0)
    assert flip(sealed, tally, lambda bits: [chance.randrange(bits) for _ in range(FLIPS)]) > 8 * FLIPS


@pytest.mark.slow
def test_many_more_flipped_bits_are_found(sealed: Path, tally: Any) -> None:
    chance = random.Random(1)
    flip(sealed, tally, lambda bits: [chance.randrange(bits) for _ in range(5 * FLIPS)])


@pytest.mark.slow
def test_every_flip_of_a_length_and_of_the_first_bytes_is_found(sealed: Path, tally: Any) -> None:
    flip(sealed, tally, lambda bits: list(range(0, min(bits, 8 * 12), 3)))


def boundaries(file: Path) -> list[int]:
    """Where a file of tensors can be cut: in its length, behind its header, behind each tensor; of others anywhere."""
    size = file.stat().st_size
    found = {0, 1, 7, 8, 9, size // 2, size - 1}
    if file.suffix == ".safetensors":
        length = int.from_bytes(file.read_bytes()[:8], "little")
        header = json.loads(file.read_bytes()[8 : 8 + length])
        ends = [8 + length + told["data_offsets"][1] for name, told in header.items() if name != "__metadata__"]
        found |= {8 + length, *ends}
    return sorted(cut for cut in found if cut < size)


def test_a_cut_at_any_boundary_is_found(sealed: Path, tally: Any) -> None:
    for file in sorted(sealed.iterdir()):
        before = file.read_bytes()
        for cut in boundaries(file):
            file.write_bytes(before[:cut])
            if not same(file.name, before, before[:cut]):  # but for the newline at the end of compress.json
                refused(sealed, tally, "a file cut")
        file.write_bytes(before)


def test_bytes_at_the_end_are_found(sealed: Path, tally: Any) -> None:
    for file in sorted(f for f in sealed.iterdir() if f.name != "compress.json"):
        before = file.read_bytes()
        for more in (b"\n", b"\0", before):
            file.write_bytes(before + more)
            refused(sealed, tally, "something added")
        file.write_bytes(before)


def test_files_that_changed_places_are_found(sealed: Path, tally: Any) -> None:
    files = sorted(sealed.iterdir())
    for one, other in zip(files, files[1:] + files[:1], strict=True):
        first, second = one.read_bytes(), other.read_bytes()
        one.write_bytes(second), other.write_bytes(first)
        refused(sealed, tally, "two files exchanged")
        one.write_bytes(first), other.write_bytes(second)


def test_a_missing_file_is_found(sealed: Path, tally: Any) -> None:
    for file in sorted(sealed.iterdir()):
        before = file.read_bytes()
        file.unlink()
        refused(sealed, tally, "a file missing")
        file.write_bytes(before)


@pytest.mark.parametrize(
    "name", ["special_tokens_map.json", "modeling_x.py", "model.safetensors", "pytorch_model.bin",
    "adapter_config.json", "x/y"]
)  # fmt: skip
def test_a_file_more_is_found(name: str, sealed: Path, tally: Any) -> None:
    (sealed / name).parent.mkdir(exist_ok=True)
    shutil.copy(sealed / "config.json", sealed / name)
    refused(sealed, tally, "something added")


@pytest.mark.parametrize("name", [".gitattributes", ".cache/x"])
def test_what_tools_leave_beside_is_no_part_of_it(name: str, sealed: Path) -> None:
    (sealed / name).parent.mkdir(exist_ok=True)
    (sealed / name).write_text("x")
    assert verify(sealed)


def test_a_seal_cannot_be_taken_off_by_a_flip(sealed: Path) -> None:
    path = sealed / "compress.json"
    path.write_text(path.read_text().replace('"sha256": "', '"sha25v": "'))
    with pytest.raises(CompressError):
        verify(sealed)


def test_a_number_of_the_ledger_is_sealed(sealed: Path, edit_json: Any) -> None:
    edit_json(sealed / "compress.json", lambda told: told["probe"].update(kl=0.0))
    with pytest.raises(CompressError, match="its content does not match its own sha256"):
        verify(sealed)
