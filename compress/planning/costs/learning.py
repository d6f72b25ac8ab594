"""What learning a block by its output costs: a copy of it, what is learned of each matrix, forwards and backwards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from compress.planning.costs.work import F32
from compress.planning.sizes import SitePlan

STATES = 6  # of each number learned: itself, its gradient, two of Adam, the best so far and, for a moment, the next
BACKWARD = 2.4  # times what a forward takes
HIDDEN, INNER = 14, 3  # values of a token that a backward needs, in hidden states and inputs of the last matrix
LOOKED_UP = 900  # passes of looking entries up in a book of thousands, out of the cache, and of their gradient
ERRORS = 4  # float32 hidden states of a batch while its error is taken


@dataclass(frozen=True, kw_only=True)
class Learned:
    """What is learned of one matrix: `numbers`; `held` bytes beside them from a forward to its backward; `passes` over
    its entries, and `calls` of small operations, in a step."""

    numbers: float
    held: float
    passes: float
    calls: float = 60

    @property
    def nbytes(self) -> float:
        """All at once."""
        return STATES * F32 * self.numbers + self.held


def divided(step: Any, plan: SitePlan) -> Learned:
    """FlexRound: a divisor for each weight, and the steps."""
    del step
    entries = prod(plan.shape)
    return Learned(numbers=entries + plan.shape[0] + plan.reals, held=3 * F32 * entries, passes=120)


def thinly_divided(step: Any, plan: SitePlan) -> Learned:
    """LRQ: divisors of low rank, and the steps."""
    numbers = sum(plan.shape) * (step.rank + 1) + plan.reals
    return Learned(numbers=numbers, held=4 * F32 * prod(plan.shape), passes=130)


def tuned(step: Any, plan: SitePlan) -> Learned:
    """Fine-tuning: the real numbers that the form holds; its matrix is made anew in each step."""
    del step
    return Learned(numbers=plan.reals, held=2 * F32 * prod(plan.shape), passes=90 + LOOKED_UP * plan.books)


LEARNED: dict[str, Callable[[Any, SitePlan], Learned]] = {
    "flexround": divided, "lrq": thinly_divided, "finetune": tuned,
}  # fmt: skip
