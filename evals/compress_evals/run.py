"""Evaluates a model on a suite of tasks and returns its results.

Not here: the questions (`questions.py`), how they are asked (`answers.py`) and the comparison of two results
(`comparison.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from compress.builtin.facts import TIERS
from compress_evals import stats
from compress_evals.answers import Answers, answers
from compress_evals.cache import Cache
from compress_evals.progress import Meter
from compress_evals.questions import Exam, Questions, beginning_with_bos, load_tasks, prepare, within
from compress_evals.results import Metric, Results, Row, TaskResult, TierScore, task_hash
from compress_evals.subject import Subject, engine
from compress_evals.suite import FACTS, find


def evaluate(
    model: Any,
    tokenizer: Any,
    *,
    name: str,
    description: dict[str, Any] | None = None,
    limit: int | None = None,
    batch_size: int = 64,
    seed: int = 0,
    suite: str = FACTS.name,
    only: Sequence[str] | None = None,
    data_dir: Path | None = None,
    online: bool = False,
    on_progress: Callable[[str], None] | None = None,
) -> Results:
    """The results of a causal language model of transformers on a suite, computed on the device where the model is.

    `description` holds facts that cannot be read from the model: `sha`, `bytes_on_disk`, `bits_per_weight`, `recipe`,
    `calibration`, and `parameters` where counting tensors would be wrong. `limit` is the number of questions per task:
    the same ones for every model with the same `seed`, in proportion to the tiers, and a larger limit only adds
    questions. `only` names the tasks of `suite` to ask, by default all; tasks whose data are neither in `data_dir` nor,
    if `online`, on the hub are skipped. Every prompt begins with the BOS token if the tokenizer has one. The model is
    put into eval mode. Nothing is cached, because a live model has no hash.
    """
    exam = prepare(find(suite), tokenizer, only=only, limit=limit, seed=seed, data_dir=data_dir, online=online)
    subject = Subject(name, lambda: model, device=str(model.device), description=description)
    exam = within(exam, subject.known(exam).max_length)
    meter = Meter(on_progress)
    meter.expect(exam.tasks)
    return measure(subject, exam, batch_size, meter=meter)


def measure(
    subject: Subject, exam: Exam, batch_size: int, cache: Cache | None = None, meter: Meter | None = None
) -> Results:
    """The results of a model in an exam; answers in the cache are not computed again."""
    began, meter = time.perf_counter(), meter or Meter()
    found: dict[str, Answers] = {}
    for i, asked in enumerate(exam.tasks, start=1):
        heard = meter.begin(subject.name, asked, i, len(exam.tasks))
        found[asked.task.name] = answers(subject, asked, exam, batch_size, cache, heard)
        meter.finish(asked)
    return Results(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seed=exam.seed,
        limit=exam.limit,
        model=subject.facts(exam, cache),
        engine=engine(subject, exam, batch_size, cache),
        tasks={asked.task.name: task_result(asked, found[asked.task.name], exam.seed) for asked in exam.tasks},
        skipped=exam.skipped,
        seconds=round(time.perf_counter() - began, 2),
        rows={name: answer.rows for name, answer in found.items()},
    )


def task_result(asked: Questions, answer: Answers, seed: int) -> TaskResult:
    """The result of one task, from its answers."""
    task, rows = asked.task, answer.rows
    higher = asked.loaded.higher_is_better()
    metrics = [metric for metric in higher if all(metric in row.scores for row in rows)]
    return TaskResult(
        title=task.title,
        family=task.family,
        headline=task.headline,
        chance=task.chance,
        version=str(asked.loaded.VERSION),
        n=len(rows),
        shots=asked.loaded.config.num_fewshot or 0,
        task_hash=task_hash(rows),
        metrics={metric: mean_of(rows, metric, bool(higher[metric]), seed) for metric in metrics},
        tiers=by_tier(rows, task.headline, seed),
        truncated=answer.truncated,
        seconds=answer.seconds,
        data=asked.data,
        control=task.control,
    )


def mean_of(rows: Sequence[Row], metric: str, higher: bool, seed: int) -> Metric:
    """A metric's mean over questions, with a 95 % interval that accounts for their clusters."""
    scores = [row.scores[metric] for row in rows]
    low, high = stats.mean_interval(scores, [row.cluster for row in rows], seed=seed)
    return Metric(value=sum(scores) / len(scores), low=low, high=high, higher=higher)


def by_tier(rows: Sequence[Row], headline: str, seed: int) -> dict[str, TierScore]:
    """The headline metric of every named tier: first exposure tiers in the order of TIERS, then others by name."""
    names = {row.tier for row in rows} - {""}
    scores = {}
    for tier in [*(tier for tier in TIERS if tier in names), *sorted(names - set(TIERS))]:
        chosen = [row for row in rows if row.tier == tier]
        metric = mean_of(chosen, headline, True, seed)
        scores[tier] = TierScore(n=len(chosen), value=metric.value, low=metric.low, high=metric.high)
    return scores


__all__ = ["beginning_with_bos", "evaluate", "load_tasks", "measure"]
