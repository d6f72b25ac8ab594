"""Giving freed memory back to the system.

glibc keeps what was freed in its arenas: after a block of a few hundred MB the process would stay that large, and the
peak of a run would be the sum of its largest moments instead of the largest moment. And how large the process has been.
"""

from __future__ import annotations

import ctypes
import mmap
import resource
import sys
from functools import cache
from typing import Any

import torch
from torch import Tensor

LARGE = 1 << 20  # bytes; from here on an allocation is a mapping of its own, gone when it is freed
TRIM = LARGE
FEW = 1 << 18  # bytes; less may live in the heap
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h


@cache
def libc(name: str) -> Any:
    """A function of glibc, or None where the C library is another."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform.startswith("linux") else None


def give_back() -> None:
    """Return the free pages of the heap to the system."""
    if (trim := libc("malloc_trim")) is not None:
        trim(0)


def release_early() -> None:
    """Let large blocks go back as soon as they are freed, for this whole process: glibc would raise its threshold to
    32 MB by itself, and keep twice that free. For a command; a library leaves this to its host.

    What a forward makes and drops is mostly smaller: new pages for each would cost as much as the products of a model
    of 512 columns. So the heap serves it again and again, and what stays must not lie between: see `lasting`.
    """
    if (mallopt := libc("mallopt")) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, TRIM)


def lasting(tensor: Tensor) -> Tensor:
    """The same values in a mapping of their own, which goes back when the tensor is freed; small ones as they are.

    For what outlives the forward that made it: left in the heap, it would hold apart the space of forwards to come.
    """
    if tensor.device.type != "cpu" or tensor.nbytes < FEW or not tensor.is_contiguous():
        return tensor
    place = mmap.mmap(-1, tensor.nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(place, dtype=tensor.dtype, count=tensor.numel()).view(tensor.shape).copy_(tensor)


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_peak_bytes(device: torch.device) -> int:
    """The most that tensors of this process have taken of a GPU so far; 0 for another device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
