"""Runs of one recipe: how far they lie apart, and intervals that ask whether another run would say the same.

Not here: which results are runs of one recipe (`leaderboard/runs.py`). An interval over questions holds what a run's
own flips add, for each question was answered by that run alone; it does not hold what a run does to all questions
together. That part is estimated from several runs, and more questions do not help against it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import stdtr, stdtrit

Interval = tuple[float, float]

CONFIDENCE = 0.95


@dataclass(frozen=True, kw_only=True)
class Runs:
    """How far runs of one recipe lie apart.

    `count` runs; `between` is the standard deviation of a run's score, in the score's unit, beyond what the flips of
    single questions explain. One run shows none.
    """

    count: int = 1
    between: float = 0.0

    @property
    def variance(self) -> float:
        """What runs add to the variance of the mean over them."""
        return self.between**2 / self.count

    @property
    def freedom(self) -> int:
        """Degrees of freedom of `between`."""
        return self.count - 1

    @property
    def half(self) -> float:
        """What runs alone add to either side of the 95 % interval of the mean over them."""
        if not self.between:
            return 0.0
        return float(stdtrit(self.freedom, 0.5 + CONFIDENCE / 2)) * math.sqrt(self.variance)


ONE = Runs()


def between_runs(values: ArrayLike, errors: ArrayLike) -> Runs:
    """The spread of `values` [runs] of one quantity; `errors` [runs, clusters] are each run's parts of its error.

    Source: the moment estimator of a two-way layout, runs crossed with questions, cut off at zero.

    Raises ValueError if there is not one row of errors for each run.
    """
    found, parts = np.asarray(values, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if found.ndim != 1 or parts.ndim != 2 or len(parts) != len(found) or not len(found):
        raise ValueError(f"values of shape {found.shape} need errors [runs, clusters], not {parts.shape}")
    if len(found) == 1:
        return ONE
    flips = float(((parts - parts.mean(axis=0)) ** 2).sum()) / (len(found) - 1)
    return Runs(count=len(found), between=math.sqrt(max(0.0, float(found.var(ddof=1)) - flips)))


def plain_spread(values: ArrayLike) -> Runs:
    """The spread of a quantity of which only the value of each run is known: all of it counts as between runs."""
    found = np.asarray(values, dtype=np.float64)
    return between_runs(found, np.zeros((len(found), 1)))


def with_runs(value: float, interval: Interval, runs: Runs) -> Interval:
    """A 95 % interval over questions, each side widened in squares by what runs add.

    By simulation (tests/evals/test_runs.py) it covers 94 to 98 % from three runs on, and no less than 92 % with two.
    Source: Zou and Donner, Statistics in Medicine 2008; with Student's quantile, because few runs tell little.
    """
    low, high = interval
    if not runs.half:
        return interval
    return value - math.hypot(value - low, runs.half), value + math.hypot(high - value, runs.half)


def two_sided(value: float, variance: float, runs: Runs) -> float:
    """p of a mean over runs being zero by Student's t, `variance` being that over questions; 0 if runs add nothing.

    Degrees of freedom by Satterthwaite, Biometrics Bulletin 1946.
    """
    if not runs.variance:
        return 0.0
    total = variance + runs.variance
    freedom = total**2 * runs.freedom / runs.variance**2
    return float(2 * stdtr(freedom, -abs(value) / math.sqrt(total)))
