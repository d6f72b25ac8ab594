"""Giving freed memory back to the system.

glibc keeps what was freed in its arenas: after a block of a few hundred MB the process would stay that large, and the
peak of a run would be the sum of its largest moments instead of the largest moment.
"""

from __future__ import annotations

import ctypes
import sys
from functools import cache
from typing import Any


@cache
def _trim() -> Any:
    """glibc's `malloc_trim`, or None where the C library is another."""
    if not sys.platform.startswith("linux"):
        return None
    return getattr(ctypes.CDLL(None), "malloc_trim", None)


def give_back() -> None:
    """Return the free pages of the heap to the system."""
    if (trim := _trim()) is not None:
        trim(0)
