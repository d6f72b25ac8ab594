"""Whether a generated text has collapsed: variety and repetition, without a reference.

Not here: whether it is right (`answers.py`). Scores by likelihood never see this failure, because the model
is fed the right text there.
"""

from __future__ import annotations

import re

LOOP_PHRASE = 4  # words in the longest phrase looked for
LOOP_TIMES = 4  # repeats in a row that no answer asked here has
_UNITS = re.compile(r"\w+|[^\w\s]")
_STUTTER = re.compile(r"(\w{1,4}?)\1{7,}")


def units(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case."""
    return _UNITS.findall(text.lower())


def distinct(text: str, n: int) -> float:
    """The share of n-grams that are different; 1 for a text too short to repeat itself."""
    grams = _grams(units(text), n)
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_loop(text: str, phrase: int = LOOP_PHRASE) -> int:
    """How often a phrase of up to `phrase` words is said in a row, at most; 0 for an empty text."""
    words, longest = units(text), 0
    for size in range(1, min(phrase, len(words)) + 1):
        for start in range(len(words) - size + 1):
            times = 1
            while words[start : start + size] == words[start + times * size : start + (times + 1) * size]:
                times += 1
            longest = max(longest, times)
    return longest


def degenerate(text: str) -> bool:
    """Whether the text is stuck: a phrase four times in a row, or a syllable eight times within a word."""
    return longest_loop(text) >= LOOP_TIMES or _STUTTER.search(text) is not None


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
