"""Giving freed memory back to the system.

glibc keeps what was freed in its arenas: after a block of a few hundred MB the process would stay that large, and the
peak of a run would be the sum of its largest moments instead of the largest moment. And how large the process has been.
"""

from __future__ import annotations

import ctypes
import resource
import sys
from functools import cache
from typing import Any

import torch

LARGE = 1 << 20  # bytes; from here on an allocation is a mapping of its own, gone when it is freed
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
    32 MB and keep what is below in its heap. For a command; a library leaves this to its host.
    """
    if (mallopt := libc("mallopt")) is not None:
        mallopt(M_MMAP_THRESHOLD, LARGE)
        mallopt(M_TRIM_THRESHOLD, LARGE)


def peak_bytes() -> int:
    """The largest resident size of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def gpu_peak_bytes(device: torch.device) -> int:
    """The most that tensors of this process have taken of a GPU so far; 0 for another device."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
