"""The language of a response, and its case.

Languages are told by `langdetect`, whose draws are seeded: the same response gets the same verdict. A response in
which no language can be told is in none; the published checker counts it as in the one that was asked for.
Capitals are hard for `langdetect`, which calls short English ones German: that is the published definition.
"""

from __future__ import annotations

import re

from compress_evals.metrics.instructions.relation import meets

_WORD = re.compile(r"[^\W_]+(?:[-./&][^\W_]+)*")


def response_language(response: str, *, language: str) -> bool:
    """The whole response is in the language of that ISO 639-1 code."""
    return detected(response) == language


def english_capital(response: str) -> bool:
    """English, and no letter is small."""
    return response.isupper() and detected(response) == "en"


def english_lowercase(response: str) -> bool:
    """English, and no letter is a capital."""
    return response.islower() and detected(response) == "en"


def capital_word_frequency(response: str, *, capital_frequency: int, capital_relation: str) -> bool:
    """So many words are all capitals; joined words are one, and an apostrophe parts two (`DON'T`)."""
    capitals = sum(word.isupper() for word in _WORD.findall(response))
    return meets(capitals, capital_relation, capital_frequency)


def detected(text: str) -> str | None:
    """The likeliest language of a text, None if it has no letters to tell it by."""
    from langdetect import DetectorFactory, LangDetectException, detect

    DetectorFactory.seed = 0
    try:
        return str(detect(text))
    except LangDetectException:
        return None
