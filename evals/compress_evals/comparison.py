"""Compares a compressed model's results with those of its dense original, and accepts or rejects the loss.

Not here: the statistics themselves (`stats.py`). Two results are compared question by question or not at all: results
with different questions, batch sizes, context lengths or lm-eval versions are refused, because each of these alone
flips answers. Differences that a comparison may legitimately have (dtype, device, torch) are recorded as notes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from compress.errors import ArtifactError
from compress_evals import stats
from compress_evals.fidelity import Fidelity
from compress_evals.metrics.answers import normalise
from compress_evals.metrics.summaries import agreement
from compress_evals.results import (
    Comparison,
    Example,
    GapChange,
    Results,
    Row,
    Speed,
    TaskComparison,
    TaskResult,
    Worst,
)
from compress_evals.suite import Gap, Task, find

ASKED_ALIKE = ("task_hash", "shots", "version")  # of a task; the version covers what no hash does, such as the scoring
MUST_AGREE = ("suite", "lm_eval", "batch_size", "max_length", "bos", "chat_template")
NOTED = ("torch", "transformers", "device", "dtype")
SUMMARIES = "summaries"  # the family whose texts are compared with the dense model's own

Flipped = tuple[tuple[Example, ...], tuple[Example, ...]]
NONE: Flipped = ((), ())


def compare(
    dense: Results,
    compressed: Results,
    fidelity: Fidelity | None = None,
    margin: float = 0.05,
    seed: int = 0,
    iters: int = 10000,
    examples: Mapping[str, Flipped] | None = None,
    speed: Speed | None = None,
) -> Comparison:
    """The paired comparison of the headline metric of every task.

    `margin` is the fraction of the dense score that may be lost; `iters` and `seed` set up the bootstrap; `examples`
    holds examples of lost and gained answers by task. Raises ArtifactError unless both results come from the same
    questions and settings.
    """
    check_comparable(dense, compressed)
    pairs = {task: _pair(dense, compressed, task, margin, iters, seed) for task in dense.tasks}
    adjusted = stats.holm([pair.p for pair in pairs.values()])
    return Comparison(
        dense=dense.model.name,
        compressed=compressed.model.name,
        dense_bytes=dense.model.bytes_on_disk,
        margin=margin,
        seed=seed,
        iters=iters,
        tasks={
            task: TaskComparison(
                title=dense.tasks[task].title,
                family=dense.tasks[task].family,
                control=dense.tasks[task].control,
                p_holm=p,
                paired=pair,
                disagreement=disagreement(dense.rows[task], compressed.rows[task]),
                agreement=agreement_of_texts(dense, compressed, task),
                lost=(examples or {}).get(task, NONE)[0],
                gained=(examples or {}).get(task, NONE)[1],
            )
            for (task, pair), p in zip(pairs.items(), adjusted, strict=True)
        },
        worst=worst_family(dense.tasks, compressed.tasks),
        gaps={
            gap.name: gap_change(dense, compressed, gap, iters, seed)
            for gap in find(dense.engine.suite).gaps
            if {gap.open, gap.closed} <= dense.tasks.keys()
        },
        fidelity=fidelity,
        speed=speed,
        notes=(*_broken(dense, compressed, fidelity), *_notes(dense, compressed)),
    )


def check_comparable(dense: Results, compressed: Results) -> None:
    """Raise ArtifactError, naming the difference, unless both results come from the same questions and settings."""
    pair = f"{dense.model.name} and {compressed.model.name}"
    for field in MUST_AGREE:
        ours, theirs = getattr(dense.engine, field), getattr(compressed.engine, field)
        if ours != theirs:
            raise ArtifactError(f"{pair} were measured with different {field}: {ours} and {theirs}")
    if dense.tasks.keys() != compressed.tasks.keys():
        different = sorted(dense.tasks.keys() ^ compressed.tasks.keys())
        raise ArtifactError(f"{pair} were not asked the same tasks; only one has {', '.join(different)}")
    for task, result in dense.tasks.items():
        if any(getattr(result, field) != getattr(compressed.tasks[task], field) for field in ASKED_ALIKE):
            raise ArtifactError(
                f"{pair} were asked different questions in {task}; use the same limit, seed and version"
            )
        if len(dense.rows.get(task, ())) != result.n or len(compressed.rows.get(task, ())) != result.n:
            raise ArtifactError(f"{pair}: the questions of {task} are not loaded; read both results with load()")


def disagreement(dense: Sequence[Row], compressed: Sequence[Row]) -> float | None:
    """The share of questions that the two models answered differently, right or wrong; None if an answer is unknown.

    Two different wrong answers count, although accuracy does not see them. Answers are compared after normalisation; an
    answer that normalises to nothing, such as the letter A or a full stop, is compared as it is.
    Source: Dutta et al., "Accuracy is not all you need", NeurIPS 2024, where it is called flips for choices.
    """
    texts = [[normalise(text) or text.strip() for text in pair] for pair in said_by_both(dense, compressed)]
    return sum(a != b for a, b in texts) / len(texts) if texts else None


def agreement_of_texts(dense: Results, compressed: Results, task: str) -> float | None:
    """The mean agreement (ROUGE-L) of the compressed model's summaries with the dense model's; None for other tasks."""
    if dense.tasks[task].family != SUMMARIES:
        return None
    texts = said_by_both(dense.rows[task], compressed.rows[task])
    return float(np.mean([agreement(a, b) for a, b in texts])) if texts else None


def said_by_both(dense: Sequence[Row], compressed: Sequence[Row]) -> list[tuple[str, str]]:
    """Both models' answers to every question; empty if any answer is unknown."""
    pairs = [(a.said, b.said) for a, b in zip(dense, compressed, strict=True)]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    return known if len(known) == len(pairs) else []


def gap_change(dense: Results, compressed: Results, gap: Gap, iters: int, seed: int) -> GapChange:
    """The change in the benefit of a passage (open-book minus closed-book score).

    It is measured over the questions asked both with the passage and without it, which are matched by the part of
    their ids after the colon.
    """
    found, clusters = [], []
    for results in (dense, compressed):
        opened, closed = (
            {row.id.partition(":")[2]: row for row in results.rows[task]} for task in (gap.open, gap.closed)
        )
        both = sorted(opened.keys() & closed.keys())
        metric = results.tasks[gap.open].headline, results.tasks[gap.closed].headline
        found.append([opened[i].scores[metric[0]] - closed[i].scores[metric[1]] for i in both])
        clusters = [opened[i].cluster for i in both]
    pair = stats.paired(found[0], found[1], clusters, iters=iters, seed=seed)
    return GapChange(dense=pair.dense, compressed=pair.compressed, delta=pair.delta, low=pair.low, high=pair.high)


def retained(dense: Mapping[str, TaskResult], compressed: Mapping[str, TaskResult]) -> dict[str, float]:
    """For every family, the mean over its tasks of the compressed score divided by the dense score, both above chance.

    Tasks where the dense score is not reliably above chance do not count, because dividing by a headroom near zero
    would let a single question make a family the worst. Controls do not count either.
    """
    kept: dict[str, list[float]] = {}
    for task, result in dense.items():
        if result.headroom and not result.control:
            share = (compressed[task].score.value - result.chance) / result.headroom
            kept.setdefault(result.family, []).append(share)
    return {family: float(np.mean(shares)) for family, shares in kept.items()}


def worst_family(dense: Mapping[str, TaskResult], compressed: Mapping[str, TaskResult]) -> Worst | None:
    """The family that kept the smallest share; None if the dense model is above chance in none."""
    kept = retained(dense, compressed)
    worst = min(kept, key=kept.__getitem__, default=None)
    return None if worst is None else Worst(family=worst, retained=kept[worst])


def covered(task: Task | TaskComparison, family: str | None) -> bool:
    """Whether a condition on `family` applies to a task; with None it applies to all tasks except controls."""
    return task.family == family if family is not None else not task.control


def accept(comparison: Comparison, max_drop: float, confidence: float, family: str | None = None) -> list[str]:
    """The tasks that may have lost more than `max_drop` (absolute, 0.05 = 5 points), as readable lines; empty if none.

    A task passes if the one-sided lower confidence bound of its difference, at `confidence`, is not below -max_drop, so
    a measurement too small to exclude that loss does not pass. With `family` only the tasks of that family are checked,
    otherwise all tasks except controls. If there is no such task, the condition does not pass.
    Raises ValueError unless `confidence` is at least 0.5 and below 1.
    """
    if not 0.5 <= confidence < 1:
        raise ValueError(f"confidence must be from 0.5 to below 1, not {confidence}")
    failures = []
    asked = {name: task for name, task in comparison.tasks.items() if covered(task, family)}
    if not asked:
        return [f"{family or 'every family'}: not asked, so a loss cannot be excluded"]
    for name, task in asked.items():
        bound = stats.lower_bound(task.paired, confidence, comparison.iters, comparison.seed)
        if bound < -max_drop:
            failures.append(
                f"{name}: {100 * task.paired.delta:+.1f} points; the {100 * confidence:g} % lower bound is a loss of "
                f"{-100 * bound:.1f} points; at most {100 * max_drop:.1f} is allowed"
            )
    return failures


def _pair(dense: Results, compressed: Results, task: str, margin: float, iters: int, seed: int) -> stats.Paired:
    headline = dense.tasks[task].headline
    before, after = ([row.scores[headline] for row in results.rows[task]] for results in (dense, compressed))
    return stats.paired(before, after, [row.cluster for row in dense.rows[task]], margin, iters, seed)


def _broken(dense: Results, compressed: Results, fidelity: Fidelity | None) -> tuple[str, ...]:
    """Notes on models whose bits per byte are not finite: a numerical fault that scores alone cannot show."""
    if fidelity is None:
        return ()
    losses = (dense, fidelity.dense_bits_per_byte), (compressed, fidelity.compressed_bits_per_byte)
    return tuple(
        f"{results.model.name} produces non-finite logits, so its scores are meaningless"
        for results, loss in losses
        if not math.isfinite(loss)
    )


def _notes(dense: Results, compressed: Results) -> tuple[str, ...]:
    pairs = ((field, getattr(dense.engine, field), getattr(compressed.engine, field)) for field in NOTED)
    notes = [f"{field}: dense {ours}, compressed {theirs}" for field, ours, theirs in pairs if ours != theirs]
    return (*notes, *dict.fromkeys((*dense.notes, *compressed.notes)))
