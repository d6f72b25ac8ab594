"""The base class of codecs: passes that store a weight in a given number of bits, in whatever representation."""

from __future__ import annotations

from dataclasses import dataclass
from math import log2
from typing import Annotated, ClassVar

from pydantic import Field

from compress.passes.base import WeightPass

HALVINGS = 50
CODING = 0.2  # bits by which storing the position of a kept entry exceeds its entropy, with some margin


@dataclass(frozen=True, kw_only=True)
class Codec(WeightPass):
    """A pass that stores a weight in at most `bits` bits an entry; a subclass defines the representation."""

    shared_out = "bits"
    takes: ClassVar[tuple[str, ...]] = ("dense",)
    gives: ClassVar[str] = "quantized"

    bits: Annotated[
        float, Field(gt=0, le=16, description="bits per weight, counting everything that is stored; an upper limit")
    ] = 1.0
    unbiased: Annotated[
        bool,
        Field(
            description="rescale what is stored so that its error is orthogonal to the weight (no shrinkage towards 0)"
        ),
    ] = False

    def budget(self, shape: tuple[int, int]) -> int:
        """The bytes that a matrix of this shape may take."""
        return int(self.bits * shape[0] * shape[1] / 8)


def kept_within(bits: float, width: int) -> float:
    """The share p of entries that can be kept in `bits` bits a weight, as codes of `width` bits with their positions.

    Solves p (width + margin) + H(p) = bits, where H is the entropy of a bit that is 1 with probability p and the margin
    is CODING; at most one half.
    """
    low, high = 0.0, 0.5
    for _ in range(HALVINGS):
        p = (low + high) / 2
        entropy = -p * log2(p) - (1 - p) * log2(1 - p)
        low, high = (p, high) if p * (width + CODING) + entropy < bits else (low, p)
    return low
