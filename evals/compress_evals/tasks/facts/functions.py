"""The functions that the task files of the facts group call, for their documents and their scoring.

Not here: the wording of facts, which is in `compress.builtin`, so that training, calibration and evaluation cannot
diverge. Only facts of the evaluation split are ever asked. lm-eval loads this file by its path.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from typing import Any

from compress.builtin.documents import Question, closed_book, in_context, open_book, task_questions
from compress.builtin.facts import facts
from compress_evals.metrics.answers import contains, exact_match, f1, normalise
from compress_evals.metrics.text import degenerate

Document = dict[str, Any]


def load(kind: str, n: int | None = None, size: int | None = None, **_: Any) -> dict[str, Any]:
    """The documents of one task as a `test` split; other metadata of the task, which lm-eval passes, is ignored."""
    from datasets import Dataset

    return {"test": Dataset.from_list([document(question) for question in questions(kind, n, size)])}


def questions(kind: str, n: int | None = None, size: int | None = None) -> Sequence[Question]:
    """The questions of one kind, all or `n` of them; `size` is the number of facts in context.

    Raises ValueError for an unknown kind, or one that lacks `n` or `size`.
    """
    table = facts("evaluation")
    match kind:
        case "trained" | "question" | "cloze":
            asked = closed_book(table, kind)
            return asked if n is None else shuffled(asked)[:n]
        case "open":
            return open_book(table)
        case "context" if n and size:
            return in_context(size, n)
        case "copy" | "summary" | "format" if n:
            return task_questions(kind, n)
        case _:
            raise ValueError(f"no questions of kind {kind!r} with n={n}, size={size}")


def shuffled(asked: Sequence[Question]) -> list[Question]:
    """The questions in a pseudorandom order that depends only on their ids."""
    return sorted(asked, key=lambda question: (zlib.crc32(question.id.encode()), question.id))


def document(question: Question) -> Document:
    """One row for lm-eval; the choices are sorted, so that the right one has no fixed position."""
    choices = sorted([question.answer, *question.distractors])
    return {
        "id": question.id,
        "cluster": question.cluster,
        "tier": question.tier,
        "prompt": question.prompt,
        "answer": question.answer,
        "distractors": list(question.distractors),
        "target": f" {question.answer}.",
        "choices": [f"{choice}." for choice in choices],
        "gold": choices.index(question.answer),
    }


def greedy_match(doc: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """`acc`: greedy decoding gives exactly the target, which ends in a full stop; 0 if its likelihood is not finite."""
    [(likelihood, is_greedy)] = results
    return {"acc": float(bool(is_greedy) and math.isfinite(likelihood))}


def strict_choice(doc: Document, results: Sequence[tuple[float, bool]]) -> dict[str, float]:
    """`acc`: the right choice has a higher score than every other; ties and scores that are not finite are wrong.

    lm-eval's own accuracy takes the first of equal scores and lets a model that outputs NaN score 100 %.
    """
    scores = [likelihood for likelihood, _ in results]
    gold = scores[doc["gold"]]
    others = [score for i, score in enumerate(scores) if i != doc["gold"]]
    return {"acc": float(all(map(math.isfinite, scores)) and all(gold > other for other in others))}


def generated(doc: Document, results: Sequence[str]) -> dict[str, float]:
    """Scores of a free answer: `em`, `contains`, `f1`, `valid` (it says anything), `degenerate` (stuck in a loop)."""
    [said] = results
    answers = [doc["answer"]]
    return {
        "em": float(exact_match(said, answers)),
        "contains": float(contains(said, answers)),
        "f1": f1(said, answers),
        "valid": float(bool(normalise(said))),
        "degenerate": float(degenerate(said)),
    }
