"""The cost of learning a block from its output: a copy, what is learned of each matrix, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from compress.planning.costs.work import F32
from compress.planning.sizes import SitePlan

STATES = 6  # copies of each learned number: itself, gradient, two of Adam, the best so far, briefly the next best
BACKWARD = 2.4  # time of a backward pass, in forward passes
HIDDEN, INNER = 14, 3  # values kept per token for the backward pass: hidden states, and widest inputs
LOOKED_UP = 900  # passes to look entries up in a codebook too large for the cache, and for their gradient
ERRORS = 4  # float32 copies of a batch's hidden states while its error is computed


@dataclass(frozen=True, kw_only=True)
class Learned:
    """The cost of learning one matrix.

    `numbers` is how many numbers are learned, `held` the bytes kept in addition from a forward pass to its backward
    pass; `passes` over the entries and `calls` of small operations are those of one step.
    """

    numbers: float
    held: float
    passes: float
    calls: float = 60

    @property
    def nbytes(self) -> float:
        """The bytes of all of these at the same time."""
        return STATES * F32 * self.numbers + self.held


def divided(step: Any, plan: SitePlan) -> Learned:
    """FlexRound: a divisor for each weight, and the quantization steps."""
    del step
    entries = prod(plan.shape)
    return Learned(numbers=entries + plan.shape[0] + plan.reals, held=3 * F32 * entries, passes=120)


def thinly_divided(step: Any, plan: SitePlan) -> Learned:
    """LRQ: a low-rank matrix of divisors, and the quantization steps."""
    numbers = sum(plan.shape) * (step.rank + 1) + plan.reals
    return Learned(numbers=numbers, held=4 * F32 * prod(plan.shape), passes=130)


def tuned(step: Any, plan: SitePlan) -> Learned:
    """Fine-tuning: the real-valued entries of the expression; its matrix is decoded again in each step."""
    del step
    return Learned(numbers=plan.reals, held=2 * F32 * prod(plan.shape), passes=90 + LOOKED_UP * plan.books)


LEARNED: dict[str, Callable[[Any, SitePlan], Learned]] = {
    "flexround": divided, "lrq": thinly_divided, "finetune": tuned,
}  # fmt: skip
