"""Allocation in a forward pass: temporary memory comes from the heap, long-lived tensors get their own mappings."""

from __future__ import annotations

import ctypes
import errno
import gc
import mmap
import os
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch

from compress.model import memory
from compress.model.memo import all_lasting
from compress.model.memory import LARGE, PASSING, SMALL, SPREAD, Heap, lasting, passing, release_early
from compress.model.travellers import Travellers

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
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # since 3.12: other threads are not in the child
        child = os.fork()
    if not child:
        gc.disable()
        try:
            with torch.no_grad():
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
    for _ in range(4096):
        held.append(block(2 * LARGE))
        if mapped() > before:
            return held
    raise AssertionError("blocks of 2 MB are not mappings of their own")


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


def test_what_gradients_need_does_not_pass_and_an_inner_end_is_none() -> None:
    def act() -> None:
        release_early()
        held, before = filled(), mapped()
        with torch.enable_grad(), passing():
            held.append(block(2 * LARGE))
        assert mapped() == before + 1
        with passing():
            with passing():
                pass
            held.append(block(2 * LARGE))
        assert mapped() == before + 1

    in_a_child(act)


@pytest.mark.usefixtures("early")
def test_the_process_is_watched_after_each_computation_but_those_that_are_smaller(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[int] = []
    monkeypatch.setattr(Heap, "watch", lambda self, now: seen.append(now))
    with torch.no_grad():
        with passing():
            pass
        with passing(watch=False):
            pass
        with pytest.raises(ValueError), passing():
            raise ValueError
    assert len(seen) == 2 and min(seen) > 1 << 20


@pytest.fixture
def early(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if this process had asked for it, but the allocator hears of nothing."""
    monkeypatch.setattr(memory.HEAP, "early", True)
    monkeypatch.setattr(memory, "libc", lambda name: lambda *values: None)


@pytest.mark.usefixtures("early")
def test_hidden_states_and_what_children_gave_last() -> None:
    hidden, ids = torch.randn(2, 16, 1 << 12), torch.zeros(2, 16)
    whole = Travellers(ids, hidden, [], again=lambda ids: [])
    part = Travellers(ids, hidden, [])
    assert whole.hidden_BTD.data_ptr() != hidden.data_ptr()
    assert torch.equal(whole.hidden_BTD, hidden)
    assert part.hidden_BTD is hidden
    given, rest = all_lasting((hidden, (None, hidden)))
    assert len({hidden.data_ptr(), given.data_ptr(), rest[1].data_ptr()}) == 3
    assert torch.equal(given, hidden) and torch.equal(rest[1], hidden) and rest[0] is None


@pytest.mark.usefixtures("early")
def test_memory_that_runs_out_for_what_lasts_is_said_as_for_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: Any, **__: Any) -> Any:
        raise OSError(errno.ENOMEM, "Cannot allocate memory")

    monkeypatch.setattr(mmap, "mmap", refused)
    with pytest.raises(MemoryError, match="Cannot allocate memory"):
        lasting(torch.zeros(SMALL))


def test_a_library_leaves_the_allocator_to_its_host(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(memory, "libc", lambda name: lambda *values: told.append((name, *values)))
    monkeypatch.setattr(memory.HEAP, "early", False)  # a test of the command line may have asked for it
    with passing():
        pass
    assert told == []
    tensor = block(SMALL)
    assert lasting(tensor) is tensor


@pytest.mark.usefixtures("early")
def test_what_lasts_has_the_same_values_and_no_place_in_the_heap() -> None:
    for dtype in (torch.float32, torch.bfloat16, torch.bool, torch.int64):
        made = torch.randn(3, 50, 2000).mul(9).to(dtype)
        kept = lasting(made)
        assert kept.dtype == dtype
        assert torch.equal(kept, made)
        assert kept.data_ptr() != made.data_ptr()
        assert kept.data_ptr() % os.sysconf("SC_PAGESIZE") == 0
        assert not kept._is_view()
        kept.zero_()  # it may be written to
        assert not torch.equal(kept, made)
    for alone in (block(SMALL - 1), block(2 * SMALL)[::2], torch.empty(3, SMALL, device="meta")):
        assert lasting(alone) is alone


def test_the_heap_gives_back_when_it_has_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    trimmed: list[int] = []
    heap, now = Heap(), 0
    monkeypatch.setattr(memory, "HEAP", heap)
    monkeypatch.setattr(memory, "libc", lambda name: lambda pad: trimmed.append(now // SPREAD))
    for now in (10 * SPREAD, 11 * SPREAD, 11 * SPREAD + 1, 17 * SPREAD, 18 * SPREAD, 18 * SPREAD + 1, 9 * SPREAD):
        heap.watch(now)  # the first and the fourth are what the next ones are held to
    assert trimmed == [11, 18]
    memory.give_back()  # whoever does it, the next computation is what others are held to
    for now in (30 * SPREAD, 31 * SPREAD):
        heap.watch(now)
    assert trimmed == [11, 18, 9]


def test_the_process_says_how_large_it_is() -> None:
    before = memory.resident_bytes()
    with mmap.mmap(-1, 1 << 25) as held:  # not of the heap, which may have as much that is free and resident
        held.write(bytes(1 << 25))
        grown = memory.resident_bytes() - before
    assert (1 << 24) < grown < (1 << 26) + (1 << 25)
    assert before < memory.peak_bytes()
