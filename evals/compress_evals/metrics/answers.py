"""Whether a short answer is right: exact match, containment and token overlap, none of which noise can win.

Not here: reading answers out of models (`tasks/`). An empty answer is never right, and nothing is ever
searched *in the gold answer*: the published scorer that did so gave 100 % to a model that prints `....`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

SHORTEST_CONTAINED = 3  # characters; a shorter answer occurs in almost any text
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT_WORD = re.compile(r"[^\w\s]|_")


def normalise(text: str) -> str:
    """The text in lower case without punctuation, articles and extra spaces (NFKC; TriviaQA's rules)."""
    lowered = unicodedata.normalize("NFKC", text).lower()
    bare = _NOT_WORD.sub(" ", lowered.replace("'", "").replace("’", ""))
    return " ".join(_ARTICLES.sub(" ", bare).split())


def fold(text: str) -> str:
    """The text without accents: `Brasília` becomes `Brasilia`."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction is one of the answers once both are normalised; empty is never right."""
    said = normalise(prediction)
    return bool(said) and any(said == normalise(answer) for answer in answers)


def folded_match(prediction: str, answers: Sequence[str]) -> bool:
    """Exact match where accents do not count: a model may well say `Brasilia`."""
    return exact_match(fold(prediction), [fold(answer) for answer in answers])


def contains(prediction: str, answers: Sequence[str]) -> bool:
    """Whether an answer stands in the prediction as whole words; one below three characters must be all of it."""
    words = f" {normalise(prediction)} "
    normalised = (normalise(answer) for answer in answers)
    return exact_match(prediction, answers) or any(
        len(answer) >= SHORTEST_CONTAINED and f" {answer} " in words for answer in normalised
    )


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best overlap of the prediction's words with those of one answer; 0 if either has none."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(said: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0
