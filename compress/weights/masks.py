"""How a mask is stored: not at all if its pattern's name determines it, by gaps if few are kept, else a bit each.

A gap is the number of dropped entries before a kept one, row after row. Its low bits are stored directly, all with the
same width; the rest in unary, as that many zeros and a one. For entries kept at random this takes at most an eighth of
a bit more than their entropy, and both streams are read without a loop.
Source: Rice, JPL publication 79-22, 1979 (the code).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.weights.bits import pack_bits, packed_size, unpack_bits
from compress.weights.chance import RULE, regenerated
from compress.weights.kept import kept_of, where

BY_NAME = "name"
WIDEST = 24  # low bits of a gap at most
Form = str | int | None  # BY_NAME, the number of low bits of a gap, or None for a bitmap


def form_of(mask_OI: Tensor, pattern: str) -> Form:
    """The form in which a mask takes the fewest bytes; by name only if the name really determines this mask."""
    said_OI = regenerated(pattern, (mask_OI.shape[0], mask_OI.shape[1]), mask_OI.device)
    if said_OI is not None and torch.equal(said_OI, mask_OI):
        return BY_NAME
    kept = kept_of(mask_OI)
    return None if 2 * kept >= mask_OI.numel() else best_width(gaps(mask_OI), mask_OI.numel())


def best_width(gap_K: Tensor, entries: int) -> int | None:
    """The number of low bits with which these gaps take the fewest bytes; None if a bitmap of `entries` is as small."""
    least, best = packed_size(entries, 1), None
    for width in range(1, WIDEST + 1):
        if packed_size(len(gap_K), width + 1) >= least:  # too large even without any zero in the unary part
            break
        size = coded_size(gap_K, width)
        if size < least:
            least, best = size, width
    return best


def gaps(mask_OI: Tensor) -> Tensor:
    """The number of entries dropped before each kept one, int64 [kept]."""
    place_K = where(mask_OI.reshape(-1))
    return torch.diff(place_K, prepend=place_K.new_full((1,), -1)) - 1


def coded_size(gap_K: Tensor, width: int) -> int:
    """Bytes of the two streams."""
    return packed_size(len(gap_K), width) + packed_size(len(gap_K) + int((gap_K >> width).sum()), 1)


def mask_bytes(mask_OI: Tensor, form: Form) -> int:
    """Bytes of a mask as it is stored."""
    if form is None:
        return packed_size(mask_OI.numel(), 1)
    return coded_size(gaps(mask_OI), form) if isinstance(form, int) else 0


def likely_bytes(kept: int, entries: int, pattern: str) -> int:
    """Bytes of a mask that is not made yet: exact unless fewer than half are kept, then those of a random mask.

    The gaps of a random mask are geometric: if a share p is kept, a gap is at least n with probability (1 - p)**n. So
    the high part of a gap with w low bits is q / (1 - q) on average, with q = (1 - p)**(2**w).
    """
    if RULE.fullmatch(pattern) or not kept:
        return 0
    bitmap = packed_size(entries, 1)
    if 2 * kept >= entries:
        return bitmap
    tails = [(1 - kept / entries) ** (2**width) for width in range(1, WIDEST + 1)]
    coded = [packed_size(kept, w) + packed_size(kept + round(kept * q / (1 - q)), 1) for w, q in enumerate(tails, 1)]
    return min(bitmap, *coded)


def pack_mask(mask_OI: Tensor, form: Form) -> Tensor | None:
    """The stored mask, flat uint8; None if nothing is stored."""
    if form is None:
        return pack_bits(mask_OI, 1)
    if not isinstance(form, int):
        return None
    gap_K = gaps(mask_OI)
    end_K = ((gap_K >> form) + 1).cumsum(0) - 1
    unary = torch.zeros(int(end_K[-1]) + 1 if len(end_K) else 0, dtype=torch.bool, device=mask_OI.device)
    unary[end_K] = True
    return torch.cat((pack_bits(gap_K & (2**form - 1), form), pack_bits(unary, 1)))


def unpack_mask(packed: Tensor, form: Any, shape: tuple[int, int], kept: int) -> Tensor:
    """The mask [out, in] from its stored form, which is not by name; raises ArtifactError if it does not fit."""
    entries = shape[0] * shape[1]
    if form is None:
        return unpack_bits(packed, 1, entries).bool().view(shape)
    if not isinstance(form, int) or not 1 <= form <= WIDEST or not 0 <= kept <= entries:
        raise ArtifactError(f"a mask of {kept} entries in the form {form!r}; allowed: 1 to {WIDEST} low bits, or none")
    split = packed_size(kept, form)
    low_K, unary = unpack_bits(packed[:split], form, kept).long(), packed[split:]
    end_K = where(unpack_bits(unary, 1, 8 * len(unary)))
    if len(end_K) != kept or len(unary) != packed_size(int(end_K[-1]) + 1 if kept else 0, 1):
        raise ArtifactError(f"a mask has {len(end_K)} gaps in {len(packed)} bytes, expected {kept}")
    high_K = torch.diff(end_K, prepend=end_K.new_full((1,), -1)) - 1
    place_K = ((high_K << form) + low_K + 1).cumsum(0) - 1
    if kept and int(place_K[-1]) >= entries:
        raise ArtifactError(f"a mask keeps entry {int(place_K[-1])} of {entries}")
    mask_N = torch.zeros(entries, dtype=torch.bool, device=packed.device)
    mask_N[place_K] = True
    return mask_N.view(shape)
