"""What passes have in common that store a weight in so many bits, whatever they store."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Annotated, ClassVar

from pydantic import Field

from compress.passes.base import WeightPass

HALVINGS = 50
CODING = 0.2  # bits by which the position of a kept entry exceeds its entropy, with some to spare


@dataclass(frozen=True, kw_only=True)
class Codec(WeightPass):
    """Store a weight in at most `bits` bits an entry; a subclass says how."""

    shared_out = "bits"
    takes: ClassVar[tuple[str, ...]] = ("dense",)
    gives: ClassVar[str] = "quantized"

    bits: Annotated[float, Field(gt=0, le=16, description="a weight, of all that is stored; never more")] = 1.0
    unbiased: Annotated[
        bool, Field(description="enlarge what is stored until its output holds all of the weight's, and errs aside")
    ] = False

    def budget(self, shape: tuple[int, int]) -> int:
        """Bytes for a matrix."""
        return int(self.bits * shape[0] * shape[1] / 8)


def kept_within(bits: float, width: int) -> float:
    """The share p of entries that can be kept in codes of `width` bits and with their positions, in `bits` a weight.

    p (width + spare) + H(p) = bits, with H the entropy of a bit that is 1 with probability p; at most a half.
    """
    low, high = 0.0, 0.5
    for _ in range(HALVINGS):
        p = (low + high) / 2
        entropy = -p * log2(p) - (1 - p) * log2(1 - p)
        low, high = (p, high) if p * (width + CODING) + entropy < bits else (low, p)
    return low
