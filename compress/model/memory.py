"""Giving freed memory back to the system.

glibc keeps what was freed in its arenas: after a block of a few hundred MB the process would stay that large, and the
peak of a run would be the sum of its largest moments instead of the largest moment. And how large the process has been.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes; from here on an allocation is a mapping of its own, gone when it is freed
PASSING = 1 << 22  # the same while something computes that drops what it makes; with 8 MB peaks were a tenth higher
TRIM = 1 << 26  # bytes that may be free at the end of the heap: what a forward of a narrow model makes and drops
SPREAD = 1 << 23  # bytes by which the process may have grown before the heap gives its free pages back; 16 MB: as above
SMALL = 1 << 18  # bytes; what is smaller may last in the heap, and would waste much of a page
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def libc(name: str) -> Any:
    """A function of glibc, or None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def release_early() -> None:
    """Let large blocks go back as soon as they are freed, for this whole process: glibc would raise its threshold to
    32 MB and keep what is below in its heap. For a command; a library leaves this to its host.
    """
    if (mallopt := libc("mallopt")) is not None:
        HEAP.early = True
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, LARGE)


class Heap:
    """What serves computations that drop all they make, such as a forward: the heap, where `release_early` was called.

    A mapping of its own for each activation would be cleared by the kernel page by page, which on a narrow model takes
    as long as its products. Best fit, though, spreads over all that is free, so the heap gives its pages back whenever
    the process has grown by SPREAD. What outlives the computation must not lie between: see `lasting`.
    """

    def __init__(self) -> None:
        self.early = self.inside = False
        self.resident = 0  # after the first computation since pages went back; 0 before it

    @contextmanager
    def passing(self, watch: bool = True) -> Iterator[None]:
        """Inside, what is allocated is freed soon, or made `lasting`; `watch` the largest kind, each like the last.

        Where gradients are wanted nothing changes, since what they need stays.
        """
        mallopt = libc("mallopt") if self.early and not self.inside and not torch.is_grad_enabled() else None
        if mallopt is None:
            yield
            return
        self.inside = True
        mallopt(M_MMAP_THRESHOLD, PASSING)
        mallopt(M_TRIM_THRESHOLD, TRIM)  # it stays: what follows would give back what the next computation needs
        try:
            yield
        finally:
            self.inside = False
            mallopt(M_MMAP_THRESHOLD, LARGE)
            if watch:
                self.watch(resident_bytes())

    def watch(self, now: int) -> None:
        """Give back if the process, `now` so large, has grown by more than SPREAD."""
        if not self.resident:
            self.resident = now
        elif now > self.resident + SPREAD:
            give_back()


HEAP = Heap()  # the settings of malloc are those of the process, so there is one
passing = HEAP.passing


def give_back() -> None:
    """Return the free pages of the heap to the system."""
    HEAP.resident = 0
    if (trim := libc("malloc_trim")) is not None:
        trim(0)


def lasting(tensor: Tensor) -> Tensor:
    """The same values in a mapping of their own, which goes back when the tensor is freed, where `passing` matters.

    A tensor that is small, not contiguous or not on the CPU is returned as it is. Raises MemoryError.
    """
    if not HEAP.early or tensor.device.type != "cpu" or tensor.nbytes < SMALL or not tensor.is_contiguous():
        return tensor
    try:
        place = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        raise MemoryError(str(error)) from error
    storage = torch.frombuffer(place, dtype=tensor.dtype).untyped_storage()
    return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride()).copy_(tensor)  # no view


def staged(tensors: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copies in the host's memory, from a GPU in page-locked pages; then all that `device` was given to do is done."""
    copies = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for name, t in tensors.items()}
    for name, copy in copies.items():
        copy.copy_(tensors[name], non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return copies


def apart(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, this thread's work on a GPU goes beside that of others; what it begins with must be complete."""
    return torch.cuda.stream(side(device)) if device.type == "cuda" else nullcontext()


@cache
def side(device: torch.device) -> Any:
    """The stream beside the usual one: always the same, since memory that was used on one is kept for it."""
    return torch.cuda.Stream(device)


def resident_bytes() -> int:
    """The resident size of this process now; 0 where the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_peak_bytes(device: torch.device) -> int:
    """The most that tensors of this process have taken of a GPU so far; 0 for another device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
