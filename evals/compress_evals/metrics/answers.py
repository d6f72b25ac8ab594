"""Scores short answers by exact match, containment and token overlap, none of which rewards meaningless output.

Not here: getting answers from models (`tasks/`). An empty answer is never right, and the prediction is never searched
for *in the gold answer*: the published scorer that did so gave 100 % to a model that prints `....`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence

SHORTEST_CONTAINED = 3  # characters; a shorter answer occurs in almost any text
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NOT_WORD = re.compile(r"[^\w\s]|_")


def first_line(said: str) -> str:
    """The first line that is not blank, which counts as a free answer; "" if there is none."""
    return said.strip().partition("\n")[0]


def normalise(text: str) -> str:
    """The text after NFKC, in lower case, without punctuation, articles and extra spaces (TriviaQA's rules)."""
    lowered = unicodedata.normalize("NFKC", text).lower()
    bare = _NOT_WORD.sub(" ", lowered.replace("'", "").replace("’", ""))
    return " ".join(_ARTICLES.sub(" ", bare).split())


def fold(text: str) -> str:
    """The text without accents: `Brasília` becomes `Brasilia`."""
    return "".join(c for c in unicodedata.normalize("NFKD", text) if not unicodedata.combining(c))


def exact_match(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the normalised prediction equals one of the normalised answers; an empty one is never right."""
    said = normalise(prediction)
    return bool(said) and any(said == normalise(answer) for answer in answers)


def folded_match(prediction: str, answers: Sequence[str]) -> bool:
    """Exact match that ignores accents: a model may well say `Brasilia`."""
    return exact_match(fold(prediction), [fold(answer) for answer in answers])


def contains(prediction: str, answers: Sequence[str]) -> bool:
    """Whether the prediction contains an answer as whole words; an answer below three characters must match exactly."""
    words = f" {normalise(prediction)} "
    normalised = (normalise(answer) for answer in answers)
    return exact_match(prediction, answers) or any(
        len(answer) >= SHORTEST_CONTAINED and f" {answer} " in words for answer in normalised
    )


def f1(prediction: str, answers: Sequence[str]) -> float:
    """The best token F1 of the prediction with any of the answers; 0 if either has no words."""
    return max((_f1(normalise(prediction).split(), normalise(answer).split()) for answer in answers), default=0.0)


def _f1(said: list[str], wanted: list[str]) -> float:
    shared = sum((Counter(said) & Counter(wanted)).values())
    return 2 * shared / (len(said) + len(wanted)) if shared else 0.0
