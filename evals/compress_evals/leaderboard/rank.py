"""How much of the dense score each model kept, with confidence intervals, and which models cannot be told apart.

The share that a family kept is the mean over its tasks of (compressed - chance) / (dense - chance); controls and tasks
where the dense score is not significantly above chance do not count. Models are ordered by their worst family, not by
the mean, because an average hides the one capability that broke. Ranks are significance groups of that share
(`stats.significance_groups`, which receives it as a sum over clusters): two models share a rank unless the better one
is significantly better.

The share kept is a ratio, linearized in the answers (the delta method): question i of task t contributes
(c_i - R d_i - (1 - R) chance) / (dense_t - chance) to its error, where R is the share that t kept. Summed by cluster,
over all tasks that ask about the same thing, these contributions give intervals and paired differences in closed form.
They include the uncertainty of the dense score.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from compress_evals.leaderboard.collect import Board, Entry
from compress_evals.runs import CONFIDENCE, ONE, Common, Runs, between_runs, with_runs
from compress_evals.stats import Floats, quantile, significance_groups

Numbers = NDArray[np.intp]


@dataclass(frozen=True, kw_only=True)
class Kept:
    """A share of the dense score with its 95 % interval; `errors` are the contributions of the clusters, summing to 0.

    `runs` is the spread between the runs of which it is the mean.
    """

    value: float
    low: float
    high: float
    errors: Floats
    runs: Runs = ONE


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The shares that one model kept: of each family, of the worst one, and the mean.

    It is empty if the dense model is significantly above chance in no task. `rank` is the rank of its significance
    group, shared by all models of the group; None without a worst family.
    """

    families: Mapping[str, Kept]
    worst: str | None
    mean: Kept | None
    rank: int | None = None

    @property
    def kept(self) -> Kept | None:
        """The share that the worst family kept; None if there is none."""
        return None if self.worst is None else self.families[self.worst]


def standings(board: Board) -> list[Standing]:
    """The standing of every compressed model of a board, in the order of the board."""
    index = _cluster_index(board)
    found = [_standing(board, entry, index) for entry in board.compressed]
    ranked = [(i, kept) for i, standing in enumerate(found) if (kept := standing.kept) is not None]
    shares = [kept for _, kept in ranked]
    spreads = [kept.runs for kept in shares]
    common = Common.of([kept.runs for standing in found for kept in standing.families.values()])
    spreads = spreads if common is None else [common.moderated(one) for one in spreads]
    ranks = significance_groups(_columns(shares, 2 * len(board.clusters)), runs=spreads)
    numbers = {i: rank for (i, _), rank in zip(ranked, ranks, strict=True)}
    return [replace(standing, rank=numbers.get(i)) for i, standing in enumerate(found)]


def _columns(found: Sequence[Kept], pseudo: int) -> list[Floats]:
    """The share that each model kept as one column of per-cluster terms that sum to it, for `significance_groups`.

    The last `pseudo` errors come from the added pseudo-observations, one more lost and one more gained question per
    task. They are the same for all models and would cancel in a difference, so they are replaced by two entries per
    model that no other model shares, with half of their sum of squares. Without these, four answers, all in favour of
    one model, would make it significantly better (p = 0.046, whereas the exact p is 0.125).
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
    """For each task, the index of every question's cluster, numbered over all tasks; under "", every index once.

    Two further clusters per task, for the pseudo-observations of `_task`, follow the real ones.
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
    """The share that one task kept.

    Two pseudo-observations, one more lost and one more gained question, each a cluster of its own, keep the interval
    from having zero width when there are no flips (Bonett and Price, 2012, as in `stats.paired`).
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
    """The mean over runs, with an interval that includes the spread between them."""
    values, errors = np.array([run.value for run in runs]), np.stack([run.errors for run in runs])
    return _with_interval(float(values.mean()), errors.mean(axis=0), between_runs(values, errors))


def _with_interval(value: float, errors: Floats, runs: Runs = ONE) -> Kept:
    half = quantile(CONFIDENCE) * math.sqrt(float((errors**2).sum()))
    low, high = with_runs(value, (value - half, value + half), runs)
    return Kept(value=value, low=low, high=high, errors=errors, runs=runs)
