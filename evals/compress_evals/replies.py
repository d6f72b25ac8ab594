"""Parses a judge's reply into a score or a preference, from the requested JSON or from unambiguous text.

Not here: asking (`judge.py`). A reply with two different verdicts, or with none, is rejected, because a guess would
count as a verdict.
"""

from __future__ import annotations

import json
import re
from typing import Any

from compress_evals.endpoint import Unanswered

LOWEST, HIGHEST = 1, 10
_PREFERENCES = {"a": "A", "b": "B", "tie": "tie"}
# `better: A`, also in malformed JSON; it must not match text after `B is better`, such as `. A is short`
_BETTER = re.compile(r"(?i)(?<!\w )\bbetter[\"'*`\s]*[:=][\"'*`\s]*(A|B|tie)\b")
# must not match the first number of a range, as in `score (1-10): 8`
_SCORE = re.compile(r"(?i)score\W{0,6}(\d+(?:\.\d+)?)(?!\.?\d|\s*(?:-|–|to\b)\s*\d)|(\d+(?:\.\d+)?)\s*/\s*10\b")


def read_score(reply: str) -> float:
    """The score in a judge's reply, from JSON or text; raises Unanswered unless it has exactly one, from 1 to 10."""
    found = _field(reply, "score")
    if isinstance(found, bool) or not isinstance(found, (int, float)):
        numbers = {float(one or other) for one, other in _SCORE.findall(reply)}
        if len(numbers) != 1:
            raise Unanswered("no score in the reply")
        [found] = numbers
    if not LOWEST <= found <= HIGHEST:
        raise Unanswered("score out of range")
    return float(found)


def read_preference(reply: str) -> str:
    """`A`, `B` or `tie` in a judge's reply, from JSON or text; raises Unanswered unless it names exactly one."""
    found = _field(reply, "better")
    named = [found] if isinstance(found, str) else _BETTER.findall(reply)
    meant = {_PREFERENCES.get(name.strip().lower()) for name in named or [reply]}
    if len(meant) != 1 or None in meant:
        raise Unanswered("no preference in the reply")
    return str(meant.pop())


def _field(reply: str, name: str) -> Any:
    """The value of a field in the JSON of a reply, which may be inside a fence or other text.

    None if there is none, or if there are two different ones, as when a judge quotes an answer that contains a verdict
    of its own.
    """
    whole = _value(reply.strip(), name)
    parts = [_value(text, name) for text in re.findall(r"\{[^{}]*\}", reply)] if whole is None else [whole]
    found = [value for value in parts if value is not None]
    return found[0] if found and all(value == found[0] for value in found) else None


def _value(text: str, name: str) -> Any:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found.get(name) if isinstance(found, dict) else None
