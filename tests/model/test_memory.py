"""Where the memory of a forward comes from: the heap while a command computes, mappings of their own for what lasts."""

from __future__ import annotations

import ctypes
import os
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.model import memory
from compress.model.memory import LARGE, PASSING, SMALL, SPREAD, Heap, lasting, passing, release_early

pytestmark = pytest.mark.skipif(memory.libc("mallinfo2") is None, reason="another C library, or glibc before 2.33")


class Counts(ctypes.Structure):
    """`struct mallinfo2` of malloc.h."""

    _fields_ = [
        *((name, ctypes.c_size_t) for name in ("arena", "free", "fast", "mapped", "mapped_bytes")),
        *((name, ctypes.c_size_t) for name in ("most", "fast_bytes", "used", "free_bytes", "top")),
    ]


def mapped() -> int:
    """The blocks of malloc that are mappings of their own."""
    asked = memory.libc("mallinfo2")
    asked.restype = Counts
    return int(asked().mapped)


def in_a_child(act: Callable[[], None]) -> None:
    """`act` in a fork of this process, whose allocator may be told anything."""
    child = os.fork()
    if not child:
        try:
            act()
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0


def block(nbytes: int) -> torch.Tensor:
    return torch.empty(nbytes, dtype=torch.uint8)


def filled() -> list[torch.Tensor]:
    """What takes all space of the heap that a block of `2 * LARGE` fits into."""
    held, before = [], mapped()
    while mapped() == before:
        held.append(block(2 * LARGE))
    return held


def test_what_passes_is_served_from_the_heap_and_what_is_large_never() -> None:
    def act() -> None:
        release_early()
        held, before = filled(), mapped()
        outside = block(2 * LARGE)
        assert mapped() == before + 1
        with passing():
            inside = block(2 * LARGE)
            assert mapped() == before + 1
            large = block(PASSING)
            assert mapped() == before + 2
        held.append(block(2 * LARGE))
        assert mapped() == before + 3
        del outside, inside, large
        assert mapped() == before + 1

    in_a_child(act)


def test_a_forward_that_fails_leaves_the_allocator_as_it_was() -> None:
    def act() -> None:
        release_early()
        with pytest.raises(MemoryError), passing():
            raise MemoryError
        held, before = filled(), mapped()
        held.append(block(2 * LARGE))
        assert mapped() == before + 1

    in_a_child(act)


def test_a_library_leaves_the_allocator_to_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(memory, "libc", lambda name: lambda *values: told.append((name, *values)))
    monkeypatch.setattr(memory.HEAP, "early", False)  # a test of the command line may have asked for it
    with passing():
        pass
    assert told == []
    tensor = block(SMALL)
    assert lasting(tensor) is tensor


def test_what_lasts_has_the_same_values_and_no_place_in_the_heap(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory.HEAP, "early", True)
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        made = torch.randn(3, 50, 2000).mul(9).to(dtype)
        kept = lasting(made)
        assert kept.dtype == dtype
        assert torch.equal(kept, made)
        assert kept.data_ptr() != made.data_ptr()
        assert kept.data_ptr() % os.sysconf("SC_PAGESIZE") == 0
        kept.zero_()  # it may be written to
        assert not torch.equal(kept, made)
    for alone in (block(SMALL - 1), block(SMALL)[::2], torch.empty(3, SMALL, device="meta")):
        assert lasting(alone) is alone


def test_the_heap_gives_back_when_it_has_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    given: list[int] = []
    heap, now = Heap(), 10 * SPREAD
    monkeypatch.setattr(memory, "give_back", lambda: given.append(now))
    for grown in (0, 1, SPREAD, SPREAD + 1, 7 * SPREAD, 8 * SPREAD, 8 * SPREAD + 1):  # 7: the first after pages went
        now = 10 * SPREAD + grown
        heap.watch(now)
    assert given == [11 * SPREAD + 1, 18 * SPREAD + 1]


def test_the_process_says_how_large_it_is() -> None:
    before = memory.resident_bytes()
    held = torch.ones(1 << 25, dtype=torch.uint8)
    grown = memory.resident_bytes() - before
    assert (1 << 24) < grown < (1 << 26)
    assert before < memory.peak_bytes()
    del held
