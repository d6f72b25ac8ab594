"""Checks of the language and the letter case of a response.

The language is detected by `langdetect`, whose sampling is seeded, so that the same response always gets the same
verdict. A response whose language cannot be detected counts as being in none; the published checker counts it as being
in the one that was asked for. `langdetect` is unreliable on capitals and calls short English texts in capitals German;
this is kept, because it is the published definition.
"""

from __future__ import annotations

import re

from compress_evals.metrics.instructions.relation import meets

_WORD = re.compile(r"[^\W_]+(?:[-./&][^\W_]+)*")


def response_language(response: str, *, language: str) -> bool:
    """Whether the whole response is detected as the language with that ISO 639-1 code."""
    return detected(response) == language


def english_capital(response: str) -> bool:
    """Whether the response is English and has no lower-case letter."""
    return response.isupper() and detected(response) == "en"


def english_lowercase(response: str) -> bool:
    """Whether the response is English and has no capital letter."""
    return response.islower() and detected(response) == "en"


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """Whether the required number of words is all capitals.

    Words joined by `-`, `.`, `/` or `&` count as one; an apostrophe separates two, as in `DON'T`.
    """
    capitals = sum(word.isupper() for word in _WORD.findall(response))
    return meets(capitals, capital_relation, capital_frequency)


def detected(text: str) -> str | None:
    """The most likely language of a text; None if it has no letters to detect it by."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return str(detect(text))
    except LangDetectException:
        return None
