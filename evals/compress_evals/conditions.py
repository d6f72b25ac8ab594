"""Acceptance conditions as written on the command line, such as `drop<=0.02@95%`, for all tasks or one family.

Not here: the test itself (`comparison.accept`).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from compress.errors import RecipeError, nearest
from compress_evals.comparison import accept, covered
from compress_evals.questions import Exam
from compress_evals.results import Results
from compress_evals.suite import find

FORM = "'drop<=0.02@95%', or for one family 'closed book:drop<=0.05@90%'"
_WRITTEN = re.compile(
    r"(?:(?P<family>[^:]+):)?\s*drop\s*<=\s*(?P<drop>\d*\.?\d+)\s*@\s*(?P<confidence>\d+(\.\d+)?)\s*%"
)


@dataclass(frozen=True, kw_only=True)
class Condition:
    """The largest absolute loss that each task may have, at `confidence`; `family` None means all but the controls."""

    family: str | None
    max_drop: float
    confidence: float


def parse(text: str, families: Sequence[str]) -> Condition:
    """Parse one condition; raises RecipeError, which shows the accepted form, for anything else."""
    found = _WRITTEN.fullmatch(text.strip())
    if found is None:
        raise RecipeError(f"--accept: {text!r} is not a condition; expected {FORM}")
    family = found["family"].strip() if found["family"] else None
    max_drop, confidence = float(found["drop"]), float(found["confidence"]) / 100
    if not (0 < max_drop <= 1 and 0.5 <= confidence < 1):
        allowed = "a drop must be above 0 and at most 1, a confidence at least 50 and below 100 %"
        raise RecipeError(f"--accept: {text!r}: {allowed}; expected {FORM}")
    if family is not None and family not in families:
        raise RecipeError(f"--accept: there is no family {family!r}{nearest(family, families)}")
    return Condition(family=family, max_drop=max_drop, confidence=confidence)


def parse_all(texts: Sequence[str], suite: str, only: Sequence[str] | None = None) -> list[Condition]:
    """Parse conditions on a suite's families; also raises RecipeError if one applies to none of the tasks in `only`."""
    families = list(dict.fromkeys(task.family for task in find(suite).tasks))
    conditions = [parse(text, families) for text in texts]
    for text, condition in zip(texts, conditions, strict=True):
        if not any(covered(task, condition.family) for task in find(suite).chosen(only)):
            raise RecipeError(f"--accept: {text!r} applies to none of the tasks in --tasks")
    return conditions


def check_asked(conditions: Sequence[Condition], exam: Exam) -> None:
    """Raise RecipeError for a condition on a family none of whose tasks can be asked: no model could meet it."""
    for family in dict.fromkeys(c.family for c in conditions):
        if not any(covered(asked.task, family) for asked in exam.tasks):
            lost = {skip.reason: name for name, skip in exam.skipped.items() if family in (None, skip.family)}
            reasons = "; ".join(f"{name}: {reason}" for reason, name in lost.items())
            raise RecipeError(f"--accept: no task{f' of {family!r}' if family else ''} can be asked: {reasons}")


def broken(results: Results, conditions: Sequence[Condition]) -> list[str]:
    """The conditions that a compared model does not meet, as readable lines; empty for the dense model."""
    if results.vs is None:
        return []
    lines = (line for c in conditions for line in accept(results.vs, c.max_drop, c.confidence, c.family))
    return [f"{results.model.name}: {line}" for line in dict.fromkeys(lines)]
