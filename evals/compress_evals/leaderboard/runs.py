"""Merges results of one recipe with several calibration seeds into one line: the mean over runs and their spread.

Not here: the statistics (`compress_evals.runs`, `stats.paired_runs`). Results are runs of one recipe if they were
measured on the same kind of device in the same dtype, and their recipes differ in `calibration.seed` and in nothing
else. If two of them have the same seed, none are merged, because someone made them separately for a reason.
For headline scores and differences, where the answers to single questions are known, the variance that questions
explain is not counted as spread between runs. For all other figures (KL, strata, gaps) the whole spread is counted.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from itertools import chain, count
from typing import Any

import numpy as np

from compress.errors import RecipeError
from compress.recipe import parse
from compress_evals.comparison import worst_family
from compress_evals.fidelity import Estimate, Fidelity
from compress_evals.leaderboard.collect import Board, Entry
from compress_evals.results import (
    Comparison,
    GapChange,
    Metric,
    ModelFacts,
    Results,
    Speed,
    TaskComparison,
    TaskResult,
    TierScore,
    versus,
)
from compress_evals.runs import Runs, plain_spread, with_runs
from compress_evals.stats import holm, paired_runs

SEEDS = 1 << 63  # number of seeds that `compress.recipe.Calibration` accepts


@dataclass(frozen=True, kw_only=True)
class Seeded:
    """A result, its calibration seed, and a key of its recipe without the seed, headline metrics, device and dtype."""

    entry: Entry
    seed: int
    recipe: str


def together(board: Board) -> Board:
    """The board with the runs of each recipe merged into one entry, at the position of its first run."""
    seeded = [found for entry in board.compressed if (found := _seeded(entry)) is not None]
    groups: dict[str, list[Seeded]] = {}
    for found in seeded:
        groups.setdefault(found.recipe, []).append(found)
    several = [group for group in groups.values() if len(group) > 1 and len({run.seed for run in group}) == len(group)]
    taken = {board.dense.name, *(entry.name for entry in board.compressed)}
    first: dict[int, Entry] = {}
    for group in several:
        merged = first[id(group[0].entry)] = _merged(board, group, taken)
        taken |= {merged.name, *(run.name for run in merged.runs)}
    rest = {id(run.entry) for group in several for run in group[1:]}
    entries = [first.get(id(entry), entry) for entry in board.compressed if id(entry) not in rest]
    return replace(board, compressed=tuple(entries))


def side_by_side(one: Entry, other: Entry) -> list[tuple[Entry, Entry]]:
    """Pairs of runs of two entries: those with the same seed, or each run with the other entry if that has no runs.

    Empty if both have runs and share no seed.
    """
    if not other.runs:
        return [(run, other) for run in one.runs or (one,)]
    if not one.runs:
        return [(one, run) for run in other.runs]
    seeds = {found.seed: found.entry for run in other.runs if (found := _seeded(run)) is not None}
    pairs = [(run, seeds.get(found.seed)) for run in one.runs if (found := _seeded(run)) is not None]
    return [(run, beside) for run, beside in pairs if beside is not None]


def _seeded(entry: Entry) -> Seeded | None:
    """A result with its calibration seed; None if the recipe gives no seed or cannot be read.

    Recipes are untrusted input: a key may be of any type, and an integer may be too long to be converted to text.
    """
    try:
        data = parse(entry.results.model.recipe or "", "recipe")
    except RecipeError:
        return None
    calibration = data.get("calibration") if isinstance(data, Mapping) else None
    seed = calibration.get("seed") if isinstance(calibration, Mapping) else None
    if not isinstance(data, Mapping) or not isinstance(calibration, Mapping) or type(seed) is not int:
        return None
    rest = {**data, "calibration": {key: value for key, value in calibration.items() if key != "seed"}}
    headlines = {name: task.headline for name, task in entry.results.tasks.items()}
    engine = entry.results.engine
    try:
        alike = json.dumps([rest, headlines, engine.device, engine.dtype], sort_keys=True, default=str)
    except (TypeError, ValueError):
        return None
    return Seeded(entry=entry, seed=seed, recipe=alike) if 0 <= seed < SEEDS else None


def _merged(board: Board, group: Sequence[Seeded], taken: Set[str]) -> Entry:
    """The runs merged into one entry."""
    group = sorted(group, key=lambda run: run.seed)
    name, names = _called(group, taken)
    runs = tuple(replace(run.entry, name=its) for run, its in zip(group, names, strict=True))
    return Entry(
        name=name,
        place=runs[0].place,
        results=_results(board, name, runs, [run.seed for run in group]),
        scores={task: np.mean([run.scores[task] for run in runs], axis=0) for task in runs[0].scores},
        runs=runs,
    )


def _called(group: Sequence[Seeded], taken: Set[str]) -> tuple[str, list[str]]:
    """Unique names for the merged line and for its runs.

    If the names of the runs are equal except for the seed, the line gets that common name, and each run the name of the
    line with its seed. Otherwise the runs keep their names, and the line is named after the first. The number of runs
    is appended to the name of the line if it would not be unique.
    """
    own = [run.entry.name for run in group]
    stems = {re.sub(r"-seed=\d+(?![\w.])", "", name) for name in own}
    alike = len(stems) == 1
    stem = (stems.pop() if alike else "") or own[0]
    several, others = f"{stem} ({len(group)} runs)", taken - set(own)
    tries = (
        (name, [f"{name}, seed {run.seed}" for run in group] if alike else own)
        for name in chain([stem, several], (f"{several} {i}" for i in count(2)))
    )
    return next(
        (name, names) for name, names in tries if name not in (others if alike else taken) and others.isdisjoint(names)
    )


def _results(board: Board, name: str, runs: Sequence[Entry], seeds: Sequence[int]) -> Results:
    found = [run.results for run in runs]
    pairs = {task: _task(board, runs, task) for task in found[0].tasks}
    tasks = {task: result for task, (result, _) in pairs.items()}
    adjusted = holm([pair.paired.p for _, pair in pairs.values()])
    compared = {
        task: pair.model_copy(update={"p_holm": p})
        for (task, (_, pair)), p in zip(pairs.items(), adjusted, strict=True)
    }
    noted = [note for result in found for note in result.notes]
    return found[0].model_copy(
        update={
            "model": _facts(name, [result.model for result in found]),
            "tasks": tasks,
            "seconds": sum(result.seconds for result in found),
            "notes": tuple(dict.fromkeys(noted)),
            "vs": _comparison(board, [versus(result) for result in found], tasks, compared, seeds),
        }
    )


def _facts(name: str, models: Sequence[ModelFacts]) -> ModelFacts:
    """The model facts that are equal in all runs; sizes are means, because they may differ by a few bytes."""
    sha = {model.sha for model in models}
    recorded = [model.calibration or {} for model in models]
    shared = {key: value for key, value in recorded[0].items() if all(one.get(key) == value for one in recorded)}
    return models[0].model_copy(
        update={
            "name": name,
            "calibration": shared or None,
            "sha": models[0].sha if len(sha) == 1 else None,
            "bytes_on_disk": _mean([model.bytes_on_disk for model in models], round),
            "bits_per_weight": _mean([model.bits_per_weight for model in models]),
        }
    )


def _shared(measured: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys that all runs measured."""
    return [key for key in measured[0] if all(key in one for one in measured)]


def _mean(values: Sequence[float | None], made: Callable[[float], Any] = float) -> Any:
    known = [value for value in values if value is not None]
    return made(sum(known) / len(known)) if len(known) == len(values) else None


def _task(board: Board, runs: Sequence[Entry], name: str) -> tuple[TaskResult, TaskComparison]:
    found = [run.results.tasks[name] for run in runs]
    compared = [versus(run.results) for run in runs]
    pair, spread = paired_runs(
        board.dense.scores[name], [run.scores[name] for run in runs], board.clusters[name], board.margin,
        compared[0].iters, compared[0].seed,
    )  # fmt: skip
    metrics = {
        key: _metric([task.metrics[key] for task in found], spread if key == found[0].headline else None)
        for key in _shared([task.metrics for task in found])
    }
    tiers = {tier: _tier([task.tiers[tier] for task in found]) for tier in _shared([task.tiers for task in found])}
    said = [comparison.tasks[name] for comparison in compared]
    result = found[0].model_copy(update={"metrics": metrics, "tiers": tiers})
    return result, said[0].model_copy(
        update={
            "paired": pair,
            "disagreement": _mean([task.disagreement for task in said]),
            "agreement": _mean([task.agreement for task in said]),
            "lost": (),
            "gained": (),
        }
    )


def _comparison(
    board: Board,
    compared: Sequence[Comparison],
    tasks: Mapping[str, TaskResult],
    pairs: Mapping[str, TaskComparison],
    seeds: Sequence[int],
) -> Comparison:
    notes = [f"mean of {len(compared)} runs, calibration seeds {', '.join(map(str, seeds))}"]
    notes += [note for comparison in compared for note in comparison.notes]
    return compared[0].model_copy(
        update={
            "tasks": pairs,
            "worst": worst_family(board.dense.results.tasks, tasks),
            "gaps": {gap: _gap([one.gaps[gap] for one in compared]) for gap in _shared([one.gaps for one in compared])},
            "fidelity": _fidelity([comparison.fidelity for comparison in compared]),
            "speed": _speed([comparison.speed for comparison in compared]),
            "notes": tuple(dict.fromkeys(notes)),
        }
    )


def _over(
    values: Sequence[float], lows: Sequence[float], highs: Sequence[float], spread: Runs | None = None
) -> tuple[float, float, float]:
    """The mean, with the mean interval of a single run widened by the spread between runs."""
    value, low, high = (float(np.mean(part)) for part in (values, lows, highs))
    if not np.isfinite([*values, *lows, *highs]).all():
        return value, low, high
    return value, *with_runs(value, (low, high), spread or plain_spread(values))


def _metric(metrics: Sequence[Metric], spread: Runs | None) -> Metric:
    value, low, high = _over([m.value for m in metrics], [m.low for m in metrics], [m.high for m in metrics], spread)
    if all(m.low >= 0 and m.high <= 1 for m in metrics):  # a share
        low, high = max(0.0, low), min(1.0, high)
    return Metric(value=value, low=low, high=high, higher=metrics[0].higher)


def _tier(tiers: Sequence[TierScore]) -> TierScore:
    value, low, high = _over([t.value for t in tiers], [t.low for t in tiers], [t.high for t in tiers])
    return TierScore(n=tiers[0].n, value=value, low=max(0.0, low), high=min(1.0, high))


def _gap(gaps: Sequence[GapChange]) -> GapChange:
    delta, low, high = _over([g.delta for g in gaps], [g.low for g in gaps], [g.high for g in gaps])
    return GapChange(
        dense=gaps[0].dense, compressed=float(np.mean([g.compressed for g in gaps])), delta=delta, low=low, high=high
    )


def _estimate(estimates: Sequence[Estimate], least: float = -math.inf) -> Estimate:
    value, low, high = _over([e.value for e in estimates], [e.low for e in estimates], [e.high for e in estimates])
    return Estimate(value=value, low=max(least, low), high=high)


def _fidelity(found: Sequence[Fidelity | None]) -> Fidelity | None:
    """The means over runs; None unless all were measured on the same text in the same way."""
    known = [one for one in found if one is not None]
    if len(known) != len(found) or len({one.way for one in known}) > 1:
        return None
    return replace(
        known[0],
        kl=_estimate([one.kl for one in known], 0.0),
        kl_p50=float(np.mean([one.kl_p50 for one in known])),
        kl_p99=float(np.mean([one.kl_p99 for one in known])),
        top1=float(np.mean([one.top1 for one in known])),
        compressed_bits_per_byte=float(np.mean([one.compressed_bits_per_byte for one in known])),
        bits_per_byte_difference=_estimate([one.bits_per_byte_difference for one in known]),
        answer_kl=_estimate([one.answer_kl for one in known], 0.0),
        answer_top1=float(np.mean([one.answer_top1 for one in known])),
    )


def _speed(found: Sequence[Speed | None]) -> Speed | None:
    """The means over runs, with the smallest and the largest ratio of all; None unless all were timed alike."""
    known = [one for one in found if one is not None]
    if len(known) != len(found) or len({(one.prompt, one.new) for one in known}) > 1:
        return None
    return known[0].model_copy(
        update={
            "runs": sum(one.runs for one in known),
            "dense": float(np.mean([one.dense for one in known])),
            "compressed": float(np.mean([one.compressed for one in known])),
            "ratio": float(np.mean([one.ratio for one in known])),
            "low": min(one.low for one in known),
            "high": max(one.high for one in known),
        }
    )
