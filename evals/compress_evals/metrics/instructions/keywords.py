"""Checks of words and letters that a response must contain, must not contain, or must contain a number of times."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compress_evals.metrics.instructions.relation import meets


def existence(response: str, *, keywords: Sequence[str]) -> bool:
    """Whether every keyword occurs, in any case, also within longer words."""
    said = response.lower()
    return all(keyword.strip().lower() in said for keyword in keywords)


def frequency(response: str, *, keyword: str, frequency: int, relation: str) -> bool:
    """Whether the keyword occurs the required number of times, in any case, also within longer words."""
    return meets(response.lower().count(keyword.strip().lower()), relation, frequency)


def forbidden_words(response: str, *, forbidden_words: Sequence[str]) -> bool:
    """Whether none of the words occurs as a whole word, in any case."""
    return not any(re.search(rf"\b{re.escape(word)}\b", response, re.IGNORECASE) for word in forbidden_words)


def letter_frequency(response: str, *, letter: str, let_frequency: int, let_relation: str) -> bool:
    """Whether the letter, or other character, occurs the required number of times, in any case."""
    return meets(response.lower().count(letter.strip().lower()), let_relation, let_frequency)
