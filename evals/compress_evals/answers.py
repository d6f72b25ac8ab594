"""The answers of one model to one task, computed through lm-eval or read from the cache.

Not here: aggregating the answers into scores (`run.py`). lm-eval is called through `evaluate`, one task at a time, not
through `simple_evaluate`: the latter does the same work, but on every call it first collects information about the
environment with a dozen subprocesses (0.8 s here, more with a GPU) and reseeds the caller's random number generators.
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
    """One row per question; `truncated` counts the prompts that were cut to fit the context, `seconds` is wall time."""

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
    """The answers to one task, from the cache if they are there; new answers are cached as soon as they are computed.

    Nothing is cached without a `cache` or for a subject without an identity.
    """
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
    """Everything that determines a model's answers to a task; used as the cache key."""
    return {
        "model": subject.identity,
        "tokenizer": exam.tokenizer_sha,
        "task": asked.task.name,
        "questions": asked.sha256,
        "engine": engine(subject, exam, batch_size, cache).model_dump(),
        "software": software(),
    }


def stored(cache: Cache, decided_by: dict[str, Any], asked: Questions) -> Answers | None:
    """The cached answers to a task; None if there are none.

    An entry that is malformed, or whose rows do not match its own count and hash, is reported as damaged and also
    gives None.
    """
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
    """Evaluate a model on all chosen questions of a task through lm-eval, without the cache."""
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
    asked.loaded._instances = None  # frees lm-eval's second copy of all prompts and answers
    rows = tuple(row(sample, asked.loaded) for sample in raw["samples"][task])
    cut = truncated(asked, exam, scorer.max_length)
    return Answers(rows=rows, truncated=cut, seconds=round(time.perf_counter() - began, 2))


def row(sample: dict[str, Any], loaded: Any) -> Row:
    """The parts of one lm-eval sample that results keep."""
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
    """The model's answer as text: the generated text, the most likely choice, or the target if it is greedy-decoded.

    None if only the likelihood of the target is known and greedy decoding would give something else. An empty string
    if any choice has a likelihood that is not finite, because then no choice can be called the most likely.
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
    """The number of questions that exceed the context of `context` tokens.

    lm-eval cuts the beginning of such prompts with only a warning. A text scored by rolling likelihood is read in
    windows instead and is never cut.
    """
    if asked.loaded.OUTPUT_TYPE == "loglikelihood_rolling":
        return 0
    return sum(needed > context for needed in lengths(asked, exam.tokenizer))
