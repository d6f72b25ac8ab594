"""Runs of one recipe: how far they lie apart, and intervals that ask whether another run would say the same.

Not here: which results are runs of one recipe (`leaderboard/runs.py`). An interval over questions holds what a run's
own flips add, for each question was answered by that run alone; it does not hold what a run does to all questions
together. That part is estimated from several runs, and more questions do not help against it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import ndtr, ndtri, stdtrit

Interval = tuple[float, float]

CONFIDENCE = 0.95
Z = float(ndtri(0.5 + CONFIDENCE / 2))
FARTHEST = 16.0  # standard errors; p is 1e-57 there
HALVINGS = 50  # of that: to the last digits


@dataclass(frozen=True, kw_only=True)
class Runs:
    """How far runs of one recipe lie apart.

    `count` runs; `spread` is the standard deviation of their scores, in the score's unit, `flips` what of it the flips
    of single questions explain. One run shows none.
    """

    count: int = 1
    spread: float = 0.0
    flips: float = 0.0

    @property
    def between(self) -> float:
        """The standard deviation of a run's score beyond what flips explain: the moment estimate, cut off at zero."""
        return math.sqrt(max(0.0, self.spread**2 - self.flips**2))

    @property
    def half(self) -> float:
        """What runs add, in squares, to either side of the 95 % interval over questions of the mean over them."""
        return math.sqrt(_added(Z, self.count, self.spread, self.flips))

    @property
    def lasting(self) -> float:
        """What of `half` no number of questions would lessen."""
        return math.sqrt(_added(Z, self.count, self.between, 0.0))


ONE = Runs()


def between_runs(values: ArrayLike, errors: ArrayLike) -> Runs:
    """The spread of `values` [runs] of one quantity; `errors` [runs, clusters] are each run's parts of its error.

    Source: the mean squares of a two-way layout, runs crossed with questions.

    Raises ValueError if there is not one row of errors for each run.
    """
    found, parts = np.asarray(values, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if found.ndim != 1 or parts.ndim != 2 or len(parts) != len(found) or not len(found):
        raise ValueError(f"values of shape {found.shape} need errors [runs, clusters], not {parts.shape}")
    if len(found) == 1:
        return ONE
    found, parts = found - found[0], parts - parts[0]  # equal runs are then exactly so
    flips = float(((parts - parts.mean(axis=0)) ** 2).sum()) / (len(found) - 1)
    return Runs(count=len(found), spread=float(found.std(ddof=1)), flips=math.sqrt(flips))


def plain_spread(values: ArrayLike) -> Runs:
    """The spread of a quantity of which only the value of each run is known: nothing of it is explained."""
    found = np.asarray(values, dtype=np.float64)
    return between_runs(found, np.zeros((len(found), 1)))


def with_runs(value: float, interval: Interval, runs: Runs) -> Interval:
    """A 95 % interval over questions, each side widened in squares by what runs add.

    The part of its width that is flips becomes that of Student's interval of the runs' scores, unless this is narrower:
    to add Student's quantile of `between` alone covers only 86 % with two runs and 91 % with three, for `between` is
    often cut off at zero by chance. This covers 95 to 99 %.
    Source: Zou and Donner, Statistics in Medicine 2008, of the mean squares; the lower bound for the flips is ours.
    """
    low, high = interval
    if not runs.half:
        return interval
    return value - math.hypot(value - low, runs.half), value + math.hypot(high - value, runs.half)


def two_sided(distances: ArrayLike, variances: ArrayLike, runs: Sequence[Sequence[Runs]]) -> NDArray[np.float64]:
    """p of each of some distances being zero, the level at which the interval of `with_runs` reaches zero.

    `variances` are those over questions; each of `runs` [terms][distances] adds what `with_runs` would.
    """
    far, variance = np.abs(np.asarray(distances, dtype=np.float64)), np.asarray(variances, dtype=np.float64)
    terms = [np.array([(one.count, one.spread, one.flips) for one in term]).T for term in runs]
    low, high = np.zeros_like(far), np.full_like(far, FARTHEST)
    for _ in range(HALVINGS if far.size else 0):
        z = (low + high) / 2
        inside = z**2 * variance + sum(_added(z, *term) for term in terms) < far**2
        low, high = np.where(inside, z, low), np.where(inside, high, z)
    p: NDArray[np.float64] = 2 * ndtr(-low)
    return p


def _added(z: Any, count: Any, spread: Any, flips: Any) -> Any:
    """The square of what runs add to an interval over questions, which is `z` standard errors to either side."""
    student = -stdtrit(np.maximum(count - 1, 1), ndtr(-z))
    return np.maximum(0.0, (student * spread) ** 2 - (z * flips) ** 2) / count
