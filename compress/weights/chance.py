"""Pseudo-random masks that are determined by their name, so that they need not be stored.

What a reader would question: no generator of torch is used, because its numbers may change with the version and differ
by device. A counter is scrambled by integer operations that never exceed 63 bits, so every machine makes the same mask.
"""

from __future__ import annotations

import re
from decimal import Decimal

import torch
from torch import Tensor

LOW = (1 << 32) - 1
ROUNDS = ((16, 0x7FEB352D), (15, 0x21F0AAAD), (17, 0x31848BAB))  # odd factors below 2**31, from a search for bit mixers
OTHER = 0x5BD1E995  # an arbitrary constant that makes the two keys of a seed differ
AT_ONCE = 1 << 16  # numbers made together, so that they stay in the cache
RULE = re.compile(r"rand(0\.\d{1,24}|1)@(\d{1,10})")


def scrambled(x_N: Tensor) -> Tensor:
    """A permutation of the numbers below 2**32 (int64) that maps neighbours to unrelated numbers."""
    x_N = x_N.clone()  # the rest is in place, which is three times as fast
    for shift, factor in ROUNDS:
        x_N.bitwise_xor_(x_N >> shift).mul_(factor).bitwise_and_(LOW)
    return x_N.bitwise_xor_(x_N >> 15)


def numbers(start: int, stop: int, seed: int, device: torch.device) -> Tensor:
    """The numbers `start` to `stop` of a pseudo-random sequence, uniform below 2**32, int64; `seed` is below 2**32."""
    count_N = torch.arange(start, stop, device=device)
    key, other = torch.tensor(seed & LOW), scrambled(torch.tensor(seed & LOW ^ OTHER))
    once_N = scrambled((count_N & LOW) ^ int(key))
    return scrambled(once_N ^ (count_N >> 32) ^ int(other))


def drawn(share: Tensor | Decimal, shape: tuple[int, int], seed: int, device: torch.device) -> Tensor:
    """A mask [out, in] that keeps each entry with probability `share`, one number for all or a matrix [out, in]."""
    mask_OI = torch.empty(shape, dtype=torch.bool, device=device)
    flat_N = mask_OI.view(-1)
    for start in range(0, len(flat_N), AT_ONCE):
        some = slice(start, min(start + AT_ONCE, len(flat_N)))
        below = int(share * (LOW + 1)) if isinstance(share, Decimal) else share.reshape(-1)[some].double() * (LOW + 1)
        flat_N[some] = numbers(some.start, some.stop, seed, device) < below
    return mask_OI


def rule_name(density: float, seed: int) -> str:
    """The pattern `rand0.1@7`: each entry kept with probability 0.1, by the numbers of seed 7."""
    return f"rand{Decimal(str(density)).normalize():f}@{seed}"


def plausible(pattern: str, entries: int, kept: int) -> bool:
    """Whether the mask that a pattern's name determines may keep `kept` of its entries.

    The tolerance is ten standard deviations and ten entries, which a random mask never exceeds in practice.
    """
    found = RULE.fullmatch(pattern)
    share = float(found[1]) if found else 0.0
    return bool(found) and abs(kept - share * entries) <= 10 * (share * (1 - share) * entries) ** 0.5 + 10


def regenerated(pattern: str, shape: tuple[int, int], device: torch.device) -> Tensor | None:
    """The mask [out, in] that a pattern's name determines, or None if the name alone does not determine one."""
    found = RULE.fullmatch(pattern)
    return drawn(Decimal(found[1]), shape, int(found[2]), device) if found else None
