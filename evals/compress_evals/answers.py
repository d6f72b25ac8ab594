"""The answers of one model to one task: asked through lm-eval, or as they were stored when they were asked before.

Not here: what they are worth (`run.py`). lm-eval is entered by `evaluate`, one task at a time, not by
`simple_evaluate`: the latter does the same after collecting the environment with a dozen subprocesses (0.8 s here,
more with a GPU, on every call) and reseeding the caller's random numbers.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from compress_evals.cache import Cache
from compress_evals.questions import Exam, Questions, lengths, some
from compress_evals.quiet import quiet
from compress_evals.results import Row, task_hash
from compress_evals.subject import Rows, Subject, engine, software


@dataclass(frozen=True, kw_only=True)
class Answers:
    """A row for every question; `truncated` counts prompts cut to fit, `seconds` is what asking took."""

    rows: tuple[Row, ...]
    truncated: int
    seconds: float


def answers(
    subject: Subject,
    asked: Questions,
    exam: Exam,
    batch_size: int,
    cache: Cache | None = None,
    on_rows: Rows | None = None,
) -> Answers:
    """The answers to one task, stored as soon as they are there."""
    if cache is None or subject.identity is None:
        return ask(subject, asked, exam, batch_size, on_rows)
    decided_by = parts(subject, asked, exam, batch_size, cache)
    known = stored(cache, decided_by, asked)
    if known is not None:
        return known
    fresh = ask(subject, asked, exam, batch_size, on_rows)
    content = {
        "n": len(fresh.rows),
        "task_hash": task_hash(fresh.rows),
        "truncated": fresh.truncated,
        "seconds": fresh.seconds,
        "rows": [row.model_dump(exclude_defaults=True) for row in fresh.rows],
    }
    cache.put("answers", decided_by, content)
    return fresh


def parts(subject: Subject, asked: Questions, exam: Exam, batch_size: int, cache: Cache | None) -> dict[str, Any]:
    """All that decides a model's answers to a task."""
    return {
        "model": subject.identity,
        "tokenizer": exam.tokenizer_sha,
        "task": asked.task.name,
        "questions": asked.sha256,
        "engine": engine(subject, exam, batch_size, cache).model_dump(),
        "software": software(),
    }


def stored(cache: Cache, decided_by: dict[str, Any], asked: Questions) -> Answers | None:
    """The answers stored for a task; None if there are none, or not to these questions."""
    content = cache.get("answers", decided_by)
    if content is None:
        return None
    try:
        rows = tuple(Row.model_validate(row) for row in content["rows"])
        found = Answers(rows=rows, truncated=content["truncated"], seconds=content["seconds"])
        whole = len(rows) == content["n"] == len(asked.chosen) and task_hash(rows) == content["task_hash"]
    except (KeyError, TypeError, ValidationError):
        whole = False
    if not whole:
        cache.damaged(cache.path("answers", decided_by))
        return None
    return found


def ask(subject: Subject, asked: Questions, exam: Exam, batch_size: int, on_rows: Rows | None = None) -> Answers:
    """Ask a model all questions of a task."""
    from lm_eval.evaluator import evaluate as lm_evaluate

    began = time.perf_counter()
    scorer, task = subject.scorer(exam, batch_size, on_rows), asked.task.name
    chosen = some(asked.loaded, asked.chosen)
    with quiet():
        raw = lm_evaluate(
            lm=scorer,
            task_dict={"tasks": {task: asked.loaded}, "groups": {}},
            samples=None if chosen is None else {task: chosen},
            bootstrap_iters=0,
            log_samples=True,
            apply_chat_template=exam.chat_template is not None,
        )
    asked.loaded._instances = None  # all prompts and answers once more
    rows = tuple(row(sample, asked.loaded) for sample in raw["samples"][task])
    cut = truncated(asked, exam, scorer.max_length)
    return Answers(rows=rows, truncated=cut, seconds=round(time.perf_counter() - began, 2))


def row(sample: dict[str, Any], loaded: Any) -> Row:
    """What is kept of one of lm-eval's samples."""
    hashes = "".join(sample[part] for part in ("doc_hash", "prompt_hash", "target_hash"))
    return Row(
        id=sample["doc"]["id"],
        cluster=sample["doc"]["cluster"],
        tier=sample["doc"]["tier"],
        hash=hashlib.sha256(hashes.encode()).hexdigest(),
        scores={metric: float(sample[metric]) for metric in sample["metrics"]},
        said=said(sample["filtered_resps"], sample["doc"], loaded),
    )


def said(responses: Sequence[Any], document: dict[str, Any], loaded: Any) -> str | None:
    """What a model said: the text generated, the likeliest choice, or the target where it would say just that.

    None where only the likelihood of a target is known, and the model would say something else. A choice among
    scores that are not finite is no choice: nothing was said.
    """
    if isinstance(responses[0], str):
        return responses[0]
    if loaded.OUTPUT_TYPE == "multiple_choice":
        scores = [likelihood for likelihood, _ in responses]
        choices = loaded.doc_to_choice(document)
        finite = all(map(math.isfinite, scores))
        return str(choices[scores.index(max(scores[: len(choices)]))]).strip() if finite else ""
    if loaded.OUTPUT_TYPE == "loglikelihood":
        likelihood, is_greedy = responses[0]
        return str(loaded.doc_to_target(document)).strip() if is_greedy and math.isfinite(likelihood) else None
    return None


def truncated(asked: Questions, exam: Exam, context: int) -> int:
    """How many questions do not fit into a model's context: lm-eval cuts their beginning with only a warning.

    A text scored by itself is read in windows instead, and never cut.
    """
    if asked.loaded.OUTPUT_TYPE == "loglikelihood_rolling":
        return 0
    return sum(needed > context for needed in lengths(asked, exam.tokenizer))
