"""Finds the k-th largest of more magnitudes than memory holds, exactly, with two passes and two small histograms.

The bit patterns of non-negative float32 values, read as integers, are in the order of the values. The first pass makes
a histogram of the upper 16 bits, which finds the bin that holds the answer; the second makes one of the lower 16 bits
of the values in that bin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from compress.weights.pattern import drop_count

HALF = 16  # bits


def level(magnitudes: Callable[[], Iterable[Tensor]], rank: int) -> float:
    """The `rank`-th largest (from 1) of the float32 values that `magnitudes()` yields in parts.

    It is called twice and must yield the same values both times.
    """
    upper = torch.zeros(1 << (HALF - 1), dtype=torch.long)
    for part in magnitudes():
        upper += torch.bincount(keys(part) >> HALF, minlength=len(upper))
    bin_, above = find(upper, rank)
    lower = torch.zeros(1 << HALF, dtype=torch.long)
    for part in magnitudes():
        key = keys(part)
        lower += torch.bincount(key[key >> HALF == bin_] & (len(lower) - 1), minlength=len(lower))
    last, _ = find(lower, rank - above)
    return float(torch.tensor((bin_ << HALF) + last, dtype=torch.int32).view(torch.float32))


def keys(part: Tensor) -> Tensor:
    """The bits of non-negative float32 values as integers, which are in the same order."""
    return part.contiguous().view(torch.int32).flatten()


def find(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the `rank`-th entry from the top, and how many entries lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    return len(counts) - 1 - place, int(from_top[place] - counts[len(counts) - 1 - place])


def share(size: int, part: float) -> int:
    """How many entries the share `part` of `size` entries is, at least 1."""
    return max(1, drop_count(size, part))
