"""Returning freed memory to the system, and measuring how much the process has used.

glibc keeps freed memory in its arenas: after a block of a few hundred MB the process would stay that large, and the
peak of a run would be the sum of its largest moments instead of the largest of them.
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

LARGE = 1 << 20  # bytes; an allocation this large gets a mapping of its own, which is unmapped when it is freed
PASSING = 1 << 22  # the same inside `passing`; with 8 MB, peaks were a tenth higher
TRIM = 1 << 26  # free bytes allowed at the end of the heap: what a forward pass of a narrow model allocates and frees
SPREAD = 1 << 23  # growth of the process, in bytes, at which the heap returns free pages; 16 MB: as with 8 MB above
SMALL = 1 << 18  # bytes; smaller tensors stay in the heap, because they would waste much of a mapped page
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def libc(name: str) -> Any:
    """A function of the C library, or None if it has none of this name or the system is not Linux."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def release_early() -> None:
    """Make glibc return large allocations to the system as soon as they are freed, for this whole process.

    By default glibc raises its threshold up to 32 MB and keeps what is smaller in its heap. Only commands call this,
    because a library should leave malloc settings to its host.
    """
    if (mallopt := libc("mallopt")) is not None:
        HEAP.early = True
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, LARGE)


class Heap:
    """Serves short-lived allocations, such as those of a forward pass, from the heap once `release_early` was called.

    If each activation had a mapping of its own, the kernel would clear its pages every time, which on a narrow model
    takes as long as the products. Best-fit allocation, however, spreads over all free memory, so the heap returns its
    pages whenever the process has grown by SPREAD. Tensors that outlive the computation must not lie in between: see
    `lasting`.
    """

    def __init__(self) -> None:
        self.early = self.inside = False
        self.resident = 0  # resident size after the first computation since pages were returned; 0 before it

    @contextmanager
    def passing(self, watch: bool = True) -> Iterator[None]:
        """Inside, everything allocated must be freed soon or made `lasting`.

        `watch` is for the largest kind of computation, which repeats with the same sizes: after it, pages are returned
        if the process has grown. Nothing changes if gradients are enabled, because they keep activations alive.
        """
        mallopt = libc("mallopt") if self.early and not self.inside and not torch.is_grad_enabled() else None
        if mallopt is None:
            yield
            return
        self.inside = True
        mallopt(M_MMAP_THRESHOLD, PASSING)
        mallopt(M_TRIM_THRESHOLD, TRIM)  # never reset: otherwise memory that the next computation needs is returned
        try:
            yield
        finally:
            self.inside = False
            mallopt(M_MMAP_THRESHOLD, LARGE)
            if watch:
                self.watch(resident_bytes())

    def watch(self, now: int) -> None:
        """Return free pages if the process, whose size is `now` bytes, has grown by more than SPREAD."""
        if not self.resident:
            self.resident = now
        elif now > self.resident + SPREAD:
            give_back()


HEAP = Heap()  # a single one, because malloc's settings belong to the process
passing = HEAP.passing


def give_back() -> None:
    """Return the free pages of the heap to the system."""
    HEAP.resident = 0
    if (trim := libc("malloc_trim")) is not None:
        trim(0)


def lasting(tensor: Tensor) -> Tensor:
    """A copy of the tensor in a mapping of its own, which is unmapped when the tensor is freed.

    A tensor that is small, not contiguous or not on the CPU is returned as it is, as is every tensor if
    `release_early` was not called. Raises MemoryError if the mapping cannot be created.
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
    """Copies of the tensors in host memory, page-locked if they come from a GPU; waits for all work on `device`."""
    copies = {name: torch.empty(t.shape, dtype=t.dtype, pin_memory=t.is_cuda) for name, t in tensors.items()}
    for name, copy in copies.items():
        copy.copy_(tensors[name], non_blocking=True)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return copies


def apart(device: torch.device) -> AbstractContextManager[Any]:
    """Inside, this thread's GPU work runs on a stream of its own; the tensors it starts from must be complete."""
    return torch.cuda.stream(side(device)) if device.type == "cuda" else nullcontext()


@cache
def side(device: torch.device) -> Any:
    """A device's second stream, always the same, because the allocator keeps memory for the stream that used it."""
    return torch.cuda.Stream(device)


def resident_bytes() -> int:
    """The current resident size of this process in bytes; 0 if the system does not report it."""
    try:
        return int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1]) * mmap.PAGESIZE
    except OSError:
        return 0


def peak_bytes() -> int:
    """The largest resident size of this process so far, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_peak_bytes(device: torch.device) -> int:
    """The largest GPU memory that this process's tensors have taken so far, in bytes; 0 for another device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
