"""The k-th largest of more magnitudes than memory holds, exactly: two passes over them and two small histograms.

The bits of a float32 that is not negative are in the order of its value. The first pass counts the upper 16 of them,
which finds the bin the answer lies in; the second counts the lower 16 of what falls into that bin.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from compress.weights.pattern import drop_count

HALF = 16  # bits


def level(magnitudes: Callable[[], Iterable[Tensor]], rank: int) -> float:
    """The `rank`-th largest (from 1) of the float32 values that `magnitudes()` gives in parts, twice the same."""
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
    """The bits of float32 values as whole numbers in the same order."""
    return part.contiguous().view(torch.int32).flatten()


def find(counts: Tensor, rank: int) -> tuple[int, int]:
    """The bin of the `rank`-th entry from the top, and how many entries lie in the bins above it."""
    from_top = counts.flip(0).cumsum(0)
    place = int(torch.searchsorted(from_top, rank))
    return len(counts) - 1 - place, int(from_top[place] - counts[len(counts) - 1 - place])


def share(size: int, part: float) -> int:
    """How many of `size` entries are a share `part` of them, at least 1."""
    return max(1, drop_count(size, part))
