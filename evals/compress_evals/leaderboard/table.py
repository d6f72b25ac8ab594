"""The table of a board as plain data: one line per model with one cell per family, sorted by the worst family.

Not here: how it is rendered (`columns.py`, `pages.py`, `export.py`). A family of several tasks is compared on all its
questions together, with the questions about one subject still in one cluster, so its verdict is not a vote over the
verdicts of its tasks.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress_evals import stats
from compress_evals.fidelity import Fidelity
from compress_evals.leaderboard.collect import Board, Entry
from compress_evals.leaderboard.methods import Method, method_of
from compress_evals.leaderboard.naming import slugs
from compress_evals.leaderboard.rank import Kept, Standing, standings
from compress_evals.results import Comparison, Speed, TaskComparison
from compress_evals.runs import ONE, Interval, Runs, with_runs
from compress_evals.stats import Paired

SEVERITY = ("fails", "drop", "inconclusive", "matching", "improved")  # worst first


@dataclass(frozen=True, kw_only=True)
class FamilyCell:
    """One family of one model; `low` and `high` are the 95 % interval of its score, the mean over questions.

    `normalised` is the mean over its tasks of (score - chance) / (1 - chance); `kept` is None if the dense score is not
    significantly above chance. `runs` is the spread between the runs of which the cell is the mean.
    """

    family: str
    control: bool
    paired: Paired
    runs: Runs
    low: float
    high: float
    normalised: float
    kept: Kept | None
    disagreement: float | None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line of the table: a compressed model with all its figures; `runs` are the lines of its runs, if several."""

    entry: Entry
    versus: Comparison
    slug: str
    method: Method
    standing: Standing
    families: tuple[FamilyCell, ...]
    runs: tuple[Line, ...] = ()

    @property
    def name(self) -> str:
        """The model's name on its board."""
        return self.entry.name

    @property
    def bytes(self) -> int | None:
        """Bytes on disk."""
        return self.entry.results.model.bytes_on_disk

    @property
    def bits(self) -> float | None:
        """Bits per weight."""
        return self.entry.results.model.bits_per_weight

    @property
    def ratio(self) -> float | None:
        """How many times smaller than dense."""
        return self.versus.dense_bytes / self.bytes if self.versus.dense_bytes and self.bytes else None

    @property
    def speed(self) -> Speed | None:
        """Decoding speed relative to the dense model; None if it was not measured."""
        return self.versus.speed

    @property
    def fidelity(self) -> Fidelity | None:
        """Distances between the next-token distributions; None if they were not measured."""
        return self.versus.fidelity

    @property
    def kl(self) -> str:
        """KL to dense as printed; a lower bound of it is marked."""
        found = self.fidelity
        return "–" if found is None else f"{'≥ ' if found.top else ''}{found.kl.value:.4f}"

    @property
    def verdicts(self) -> dict[str, list[str]]:
        """The families by verdict, worst verdict first."""
        by = {verdict: [c.family for c in self.families if c.paired.verdict == verdict] for verdict in SEVERITY}
        return {verdict: families for verdict, families in by.items() if families}

    def verdict_lists(self) -> list[tuple[str, str]]:
        """Each verdict with its families in words, worst verdict first."""
        if len(self.verdicts) == 1 and len(self.families) > 1:
            return [(verdict, f"all {len(families)} families") for verdict, families in self.verdicts.items()]
        return [(verdict, ", ".join(families)) for verdict, families in self.verdicts.items()]

    @property
    def worst_verdict(self) -> str:
        """The worst verdict of any family that is not a control; "inconclusive" if there is none."""
        counted = [c.paired.verdict for c in self.families if not c.control] or ["inconclusive"]
        return min(counted, key=SEVERITY.index)

    @property
    def _flipping(self) -> list[Paired]:
        return [c.paired for c in self.families if c.paired.binary and not c.control]

    @property
    def flips(self) -> float:
        """The share of questions that flipped, over the families that are right or wrong, except controls."""
        counted = self._flipping
        return sum(p.flips * p.n for p in counted) / max(1, sum(p.n for p in counted))

    @property
    def delta(self) -> float:
        """The mean difference from dense over the questions of `flips`."""
        counted = self._flipping
        return sum(p.delta * p.n for p in counted) / max(1, sum(p.n for p in counted))


def lines(board: Board) -> list[Line]:
    """The lines of a board, sorted by the share that the worst family kept, best first."""
    single = tuple(run for entry in board.compressed for run in entry.runs)
    names = slugs(entry.name for entry in (*board.compressed, *single))
    found = _lines(board, names[: len(board.compressed)])
    runs = iter(_lines(replace(board, compressed=single), names[len(board.compressed) :]))
    found = [replace(line, runs=tuple(_unranked(next(runs)) for _ in line.entry.runs)) for line in found]
    return sorted(found, key=lambda line: (-(line.standing.kept.value if line.standing.kept else -math.inf), line.name))


def _unranked(line: Line) -> Line:
    return replace(line, standing=replace(line.standing, rank=None))


def _lines(board: Board, names: Sequence[str]) -> list[Line]:
    return [
        Line(
            entry=entry,
            versus=versus,
            slug=slug,
            method=method_of(entry.results.model.recipe),
            standing=standing,
            families=tuple(family_cell(board, entry, f, standing) for f in families(board)),
        )
        for entry, slug, standing in zip(board.compressed, names, standings(board), strict=True)
        if (versus := entry.results.vs) is not None
    ]


def families(board: Board) -> list[str]:
    """The families of a board, controls last."""
    tasks = board.dense.results.tasks.values()
    counted = dict.fromkeys(task.family for task in tasks if not task.control)
    return [*counted, *dict.fromkeys(task.family for task in tasks if task.family not in counted)]


def family_cell(board: Board, entry: Entry, family: str, standing: Standing) -> FamilyCell:
    """The cell of one family of one model, over all its tasks together."""
    tasks = {name: task for name, task in board.dense.results.tasks.items() if task.family == family}
    compared = {name: entry.results.vs.tasks[name] for name in tasks} if entry.results.vs else {}
    clusters = [cluster for name in tasks for cluster in board.clusters[name]]
    paired, runs = _paired(board, entry, compared, clusters)
    low, high = _interval(entry, list(tasks), clusters, runs)
    above = [(entry.scores[name].mean() - task.chance) / (1 - task.chance) for name, task in tasks.items()]
    return FamilyCell(
        family=family,
        control=all(task.control for task in tasks.values()),
        paired=paired,
        runs=runs,
        low=low,
        high=high,
        normalised=float(np.mean(above)),
        kept=standing.families.get(family),
        disagreement=_disagreement(compared),
    )


def _paired(
    board: Board, entry: Entry, compared: Mapping[str, TaskComparison], clusters: Sequence[str]
) -> tuple[Paired, Runs]:
    if len(compared) == 1 and not entry.runs:
        return next(iter(compared.values())).paired, ONE
    before = _joined(board.dense, compared)
    after = [_joined(run, compared) for run in entry.runs or (entry,)]
    versus = entry.results.vs
    iters, seed = (versus.iters, versus.seed) if versus else (10000, 0)
    return stats.paired_runs(before, after, clusters, board.margin, iters, seed)


def _interval(entry: Entry, tasks: Sequence[str], clusters: Sequence[str], runs: Runs) -> Interval:
    if len(tasks) == 1:
        metric = entry.results.tasks[tasks[0]].score
        return metric.low, metric.high
    if not entry.runs:
        return stats.mean_interval(_joined(entry, tasks), clusters, seed=entry.results.seed)
    found = [stats.mean_interval(_joined(run, tasks), clusters, seed=run.results.seed) for run in entry.runs]
    over_questions = float(np.mean([low for low, _ in found])), float(np.mean([high for _, high in found]))
    low, high = with_runs(float(_joined(entry, tasks).mean()), over_questions, runs)
    return max(0.0, low), min(1.0, high)  # a headline score is a share


def _joined(entry: Entry, tasks: Iterable[str]) -> stats.Floats:
    return np.concatenate([entry.scores[name] for name in tasks])


def _disagreement(compared: Mapping[str, TaskComparison]) -> float | None:
    known = [(task.disagreement, task.paired.n) for task in compared.values() if task.disagreement is not None]
    return sum(d * n for d, n in known) / sum(n for _, n in known) if known and len(known) == len(compared) else None
