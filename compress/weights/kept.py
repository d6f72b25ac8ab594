"""The entries that a mask keeps: counting, extracting and restoring them; on a CPU several times as fast as PyTorch.

On a CPU a mask is processed in parts, so that the indices of the kept entries take little memory.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

PART = 1 << 18  # entries of a mask at a time
WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}  # by bytes: NumPy lacks some of our dtypes


def kept_of(mask: Tensor) -> int:
    """The number of entries that a mask keeps."""
    return int(mask.count_nonzero())


def take(whole: Tensor, mask: Tensor) -> Tensor:
    """The kept entries of a tensor of the mask's shape, flat, in order."""
    if whole.device.type != "cpu":
        return words(whole).masked_select(mask).view(whole.dtype)
    held_N, taken = words(whole).reshape(-1).numpy(), torch.empty(kept_of(mask), dtype=words(whole).dtype)
    at, taken_K = 0, taken.numpy()
    for start, place_K in places(mask):
        taken_K[at : at + len(place_K)] = held_N[start : start + PART].take(place_K)
        at += len(place_K)
    return taken.view(whole.dtype)


def put(whole: Tensor, mask: Tensor, kept: Tensor) -> Tensor:
    """Write `kept`, as returned by `take`, into the kept entries of a contiguous tensor, in place; return it."""
    if whole.device.type != "cpu":
        words(whole).masked_scatter_(mask, words(kept))
        return whole
    whole_N, kept_K = words(whole).view(-1).numpy(), words(kept).reshape(-1).numpy()
    at = 0
    for start, place_K in places(mask):
        whole_N[start : start + PART][place_K] = kept_K[at : at + len(place_K)]
        at += len(place_K)
    return whole


def where(mask: Tensor) -> Tensor:
    """The indices of the kept entries of a flat mask, int64 [kept]."""
    if mask.device.type != "cpu":
        return mask.nonzero()[:, 0]
    return torch.from_numpy(np.flatnonzero(mask.numpy()))


def places(mask: Tensor) -> Iterator[tuple[int, np.ndarray]]:
    """The start of each part of a mask, and the indices of its kept entries within the part."""
    mask_N = mask.reshape(-1).numpy()
    for start in range(0, len(mask_N), PART):
        yield start, np.flatnonzero(mask_N[start : start + PART])


def words(tensor: Tensor) -> Tensor:
    """The same bits as integers."""
    return tensor.detach().view(WORDS[tensor.element_size()])
