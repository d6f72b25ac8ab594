"""How much of the dense score each model kept, how sure that is, and which models cannot be told apart.

What a family kept is the mean over its tasks of (compressed - chance) / (dense - chance); controls and tasks where
dense is not surely above chance do not count. Models are ordered by the family that kept least, not by the mean: an
average hides the one thing that broke. Ranks are significance groups of that number (`stats.significance_groups`, which
is given the number as a sum over clusters): two models share one unless the better is surely better.

Every such number is nearly linear in the answers, so its error is that of a mean: question i of task t adds
(c_i - R d_i - (1 - R) chance) / (dense_t - chance), R being what t kept. Summed by cluster, over all tasks that ask
about the same thing, these give intervals and paired differences in closed form (the delta method); dense is uncertain
too.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compress_evals.leaderboard.collect import Board, Entry
from compress_evals.runs import CONFIDENCE, ONE, Runs, between_runs, with_runs
from compress_evals.stats import Floats, quantile, significance_groups

Numbers = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A share of the dense score with its 95 % interval; `errors` are the clusters' parts of its error, adding to 0.

    `runs` is how far the runs lie apart that it is the mean of.
    """

    value: float
    low: float
    high: float
    errors: Floats
    runs: Runs = ONE


@dataclass(frozen=True, kw_only=True)
class Standing:
    """What one model kept of each family, of the worst and on average; empty if dense had nothing to lose.

    `rank` is that of its significance group, which all of a group share; None without a worst family.
    """

    families: Mapping[str, Kept]
    worst: str | None
    mean: Kept | None
    rank: int | None = None

    @property
    def kept(self) -> Kept | None:
        """Of the worst family."""
        return None if self.worst is None else self.families[self.worst]


def standings(board: Board) -> list[Standing]:
    """The standing of every compressed model of a board, in its order."""
    index = _cluster_index(board)
    found = [_standing(board, entry, index) for entry in board.compressed]
    ranked = [(i, kept) for i, standing in enumerate(found) if (kept := standing.kept) is not None]
    shares = [kept for _, kept in ranked]
    ranks = significance_groups(_columns(shares, 2 * len(board.clusters)), runs=[kept.runs for kept in shares])
    numbers = {i: rank for (i, _), rank in zip(ranked, ranks, strict=True)}
    return [replace(standing, rank=numbers.get(i)) for i, standing in enumerate(found)]


def _columns(found: Sequence[Kept], pseudo: int) -> list[Floats]:
    """What each model kept as a sum over clusters, for `significance_groups`.

    The last `pseudo` errors, of one question more lost and one more gained, are the same for all and would cancel in a
    difference: each model has half of them, in squares, to itself. Without them four answers, all one model's, would
    be a surely better model (p = 0.046, the exact one 0.125).
    """
    columns = []
    for i, kept in enumerate(found):
        own = np.zeros(2 * len(found))
        own[2 * i : 2 * i + 2] = np.array([1.0, -1.0]) * math.sqrt(float((kept.errors[-pseudo:] ** 2).sum())) / 2
        errors = np.r_[kept.errors[:-pseudo], own]
        columns.append(kept.value / len(errors) + errors)
    return columns


def _standing(board: Board, entry: Entry, index: Mapping[str, Numbers]) -> Standing:
    if not entry.runs:
        kept = _families(board, entry, index)
        return _judged(kept, _mean(list(kept.values())) if kept else None)
    runs = [_standing(board, run, index) for run in entry.runs]
    kept = {family: _over([run.families[family] for run in runs]) for family in runs[0].families}
    return _judged(kept, _over([run.mean for run in runs if run.mean is not None]) if kept else None)


def _judged(kept: Mapping[str, Kept], mean: Kept | None) -> Standing:
    return Standing(families=kept, worst=min(kept, key=lambda family: kept[family].value, default=None), mean=mean)


def _families(board: Board, entry: Entry, index: Mapping[str, Numbers]) -> dict[str, Kept]:
    families: dict[str, list[Kept]] = {}
    for name, task in board.dense.results.tasks.items():
        if not task.control and task.headroom:
            part = _task(board.dense.scores[name], entry.scores[name], task.chance, index[name], len(index[""]))
            families.setdefault(task.family, []).append(part)
    return {family: _mean(parts) for family, parts in families.items()}


def _cluster_index(board: Board) -> dict[str, Numbers]:
    """For each task the number of every question's cluster, one count over all tasks; under "" every number once.

    After the clusters stand two more for every task: see `_task`.
    """
    names = [name for clusters in board.clusters.values() for name in clusters]
    numbers = np.unique(np.asarray(names), return_inverse=True)[1]
    total = int(numbers.max()) + 1
    found, at = {}, 0
    for i, (task, clusters) in enumerate(board.clusters.items()):
        found[task] = np.r_[numbers[at : at + len(clusters)], total + 2 * i, total + 2 * i + 1]
        at += len(clusters)
    found[""] = np.arange(total + 2 * len(board.clusters))
    return found


def _task(dense: Floats, compressed: Floats, chance: float, cluster: Numbers, clusters: int) -> Kept:
    """What one task kept.

    One question more lost and one more gained, each its own cluster, keep an interval without flips from having no
    width (Bonett and Price, 2012, as in `stats.paired`).
    """
    headroom = float(dense.mean()) - chance
    value = (float(compressed.mean()) - chance) / headroom
    parts = (compressed - chance - value * (dense - chance)) / headroom
    sums = np.bincount(cluster, np.r_[parts, -1 / headroom, 1 / headroom], clusters)
    return _with_interval(value, sums / len(dense))


def _mean(parts: Sequence[Kept]) -> Kept:
    value = sum(part.value for part in parts) / len(parts)
    return _with_interval(value, np.sum([part.errors for part in parts], axis=0) / len(parts))


def _over(runs: Sequence[Kept]) -> Kept:
    """The mean over runs."""
    values, errors = np.array([run.value for run in runs]), np.stack([run.errors for run in runs])
    return _with_interval(float(values.mean()), errors.mean(axis=0), between_runs(values, errors))


def _with_interval(value: float, errors: Floats, runs: Runs = ONE) -> Kept:
    half = quantile(CONFIDENCE) * math.sqrt(float((errors**2).sum()))
    low, high = with_runs(value, (value - half, value + half), runs)
    return Kept(value=value, low=low, high=high, errors=errors, runs=runs)
