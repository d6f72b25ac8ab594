"""The variance between runs of one recipe, and intervals that generalize to further runs.

Not here: which results are runs of one recipe (`leaderboard/runs.py`). An interval over questions already includes the
variance from flips of single questions in a run. It does not include the effect that a run has on all questions
together. That part is estimated from several runs, and more questions do not reduce it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.optimize import brentq
from scipy.special import digamma, ndtr, ndtri, polygamma, stdtrit

Interval = tuple[float, float]

CONFIDENCE = 0.95
Z = float(ndtri(0.5 + CONFIDENCE / 2))
FARTHEST = 16.0  # standard errors at which the search for p ends; p is 1e-57 there
FEWEST = 20  # ratios from which `Common` is fitted
HALVES, MOST = (1e-3, 1e6), 1e6  # between which half its degrees of freedom are searched; at most so many are used
HALVINGS = 50  # bisection steps from there, down to the last digits


@dataclass(frozen=True, kw_only=True)
class Runs:
    """The spread of the scores of several runs of one recipe.

    `count` is the number of runs. `spread` is the standard deviation of their scores, in the unit of the score, and
    `flips` the standard deviation that flips of single questions explain. Both are 0 for a single run. `borrowed` are
    degrees of freedom from the runs of other recipes (`Common`).
    """

    count: int = 1
    spread: float = 0.0
    flips: float = 0.0
    borrowed: float = 0.0

    @property
    def between(self) -> float:
        """The between-run standard deviation beyond what flips explain: the moment estimate, truncated at zero."""
        return math.sqrt(max(0.0, self.spread**2 - self.flips**2))

    @property
    def half(self) -> float:
        """The half-width that runs add, in quadrature, to the 95 % interval over questions of their mean."""
        return math.sqrt(_added(Z, self.count, self.spread, self.flips, self.borrowed))

    @property
    def lasting(self) -> float:
        """The part of `half` that no number of questions would reduce."""
        return math.sqrt(_added(Z, self.count, self.between, 0.0, self.borrowed))


ONE = Runs()


@dataclass(frozen=True, kw_only=True)
class Common:
    """What many recipes say about the spread between runs of one: its variance, as a multiple of that from flips.

    `ratio` is the typical multiple, `freedom` the degrees of freedom that this knowledge is worth; infinite if recipes
    do not differ in it more than a few runs let expect.
    """

    ratio: float
    freedom: float

    @staticmethod
    def of(found: Sequence[Runs]) -> Common | None:
        """Fitted to the logarithms of all ratios; None for fewer than FEWEST of them.

        Source: Smyth, Statistical Applications in Genetics and Molecular Biology 2004, section 6.2; of the ratio to
        known variances as in Lund et al., ibid. 2012.
        """
        known = [one for one in found if one.count > 1 and one.spread and one.flips]
        if len(known) < FEWEST:
            return None
        degrees = np.array([one.count - 1.0 for one in known]) / 2
        ratios = np.array([(one.spread / one.flips) ** 2 for one in known])
        logs = np.log(ratios) - digamma(degrees) + np.log(degrees)
        excess = float(logs.var(ddof=1) - polygamma(1, degrees).mean())
        if excess <= 0:
            return Common(ratio=math.exp(float(logs.mean())), freedom=math.inf)
        half = float(brentq(lambda x: float(polygamma(1, x)) - excess, *HALVES))
        return Common(ratio=math.exp(float(logs.mean() + digamma(half) - math.log(half))), freedom=2 * half)

    def moderated(self, one: Runs) -> Runs:
        """The spread of one recipe in the light of all, at least its own; unchanged for a single run.

        Two or three runs tell so little about their spread that no difference between recipes would survive the
        correction for many comparisons.
        """
        if one.count < 2 or not one.flips:
            return one
        own, freedom = one.count - 1, min(self.freedom, MOST)
        variance = (freedom * self.ratio * one.flips**2 + own * one.spread**2) / (freedom + own)
        return replace(one, spread=max(one.spread, math.sqrt(variance)), borrowed=freedom)


def between_runs(values: ArrayLike, errors: ArrayLike) -> Runs:
    """The spread of the `values` [runs] of one quantity.

    `errors` [runs, clusters] are the contributions of the clusters to the error of each run. Raises ValueError unless
    there is one row of errors per run. Source: the mean squares of a two-way layout, runs crossed with questions.
    """
    found, parts = np.asarray(values, dtype=np.float64), np.asarray(errors, dtype=np.float64)
    if found.ndim != 1 or parts.ndim != 2 or len(parts) != len(found) or not len(found):
        raise ValueError(f"values of shape {found.shape} need errors [runs, clusters], not {parts.shape}")
    if len(found) == 1:
        return ONE
    found, parts = found - found[0], parts - parts[0]  # so that the spread of equal runs is exactly 0
    flips = float(((parts - parts.mean(axis=0)) ** 2).sum()) / (len(found) - 1)
    return Runs(count=len(found), spread=float(found.std(ddof=1)), flips=math.sqrt(flips))


def plain_spread(values: ArrayLike) -> Runs:
    """The spread of a quantity of which only the value of each run is known, so that questions explain none of it."""
    found = np.asarray(values, dtype=np.float64)
    return between_runs(found, np.zeros((len(found), 1)))


def with_runs(value: float, interval: Interval, runs: Runs) -> Interval:
    """A 95 % interval over questions with each side widened, in quadrature, by the spread of the runs.

    The part of its width that comes from flips is replaced by the width of Student's interval over the runs' scores,
    unless that is narrower. Adding Student's interval for `between` alone would have a coverage of only 86 % with two
    runs and 91 % with three, because `between` is often truncated to zero by chance. The coverage here is 95 to 99 %.
    Source: Zou and Donner, Statistics in Medicine 2008, applied to the mean squares; the lower bound for the flips is
    ours.
    """
    low, high = interval
    if not runs.half:
        return interval
    return value - math.hypot(value - low, runs.half), value + math.hypot(high - value, runs.half)


def two_sided(distances: ArrayLike, variances: ArrayLike, runs: Sequence[Sequence[Runs]]) -> NDArray[np.float64]:
    """The two-sided p value of each distance: the level at which the interval of `with_runs` just reaches zero.

    `variances` are those over questions; each entry of `runs` [terms][distances] widens the interval as in `with_runs`.
    """
    far, variance = np.abs(np.asarray(distances, dtype=np.float64)), np.asarray(variances, dtype=np.float64)
    terms = [np.array([(one.count, one.spread, one.flips, one.borrowed) for one in term]).T for term in runs]
    low, high = np.zeros_like(far), np.full_like(far, FARTHEST)
    for _ in range(HALVINGS if far.size else 0):
        z = (low + high) / 2
        inside = z**2 * variance + sum(_added(z, *term) for term in terms) < far**2
        low, high = np.where(inside, z, low), np.where(inside, high, z)
    p: NDArray[np.float64] = 2 * ndtr(-low)
    return p


def _added(z: Any, count: Any, spread: Any, flips: Any, borrowed: Any) -> Any:
    """The square of the half-width that runs add to an interval of `z` standard errors over questions on each side."""
    student = -stdtrit(np.maximum(count - 1, 1) + borrowed, ndtr(-z))
    return np.maximum(0.0, (student * spread) ** 2 - (z * flips) ** 2) / count
