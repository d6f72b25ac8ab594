"""Detects whether a generated text has degenerated, by its variety and repetition, without a reference.

Not here: whether it is right (`answers.py`). Likelihood scores cannot detect this failure, because there the model
is fed the right text.
"""

from __future__ import annotations

import re

LOOP_PHRASE = 4  # words in the longest phrase that is searched for
LOOP_TIMES = 4  # repeats in a row, which no right answer to these tasks has
FEWEST_WORDS = 3  # different words; the shortest real answers, such as `My answer is no.`, have no fewer
EARLY = 10  # words; hardly any requested text has fewer
PHRASE = 4  # words of the phrases that a long text must not keep repeating
# Thai and Lao, Burmese, Khmer, Japanese, Chinese
_WITHOUT_SPACES = r"\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff"
_WORDS = re.compile(rf"[{_WITHOUT_SPACES}]|(?:(?![{_WITHOUT_SPACES}_])\w)+")
_UNITS = re.compile(r"\w+|[^\w\s]")
_STUTTER = re.compile(r"(\w{1,4}?)\1{7,}")


def units(text: str) -> list[str]:
    """The words and punctuation marks of a text, in lower case."""
    return _UNITS.findall(text.lower())


def distinct(text: str, n: int) -> float:
    """Distinct-n: the number of different n-grams over the number of n-grams; 1 for a text without n-grams."""
    grams = _grams(units(text), n)
    return len(set(grams)) / len(grams) if grams else 1.0


def longest_loop(text: str, phrase: int = LOOP_PHRASE) -> int:
    """The largest number of times that a phrase of up to `phrase` words occurs in a row; 0 for an empty text."""
    words, longest = units(text), 0
    for size in range(1, min(phrase, len(words)) + 1):
        for start in range(len(words) - size + 1):
            times = 1
            while words[start : start + size] == words[start + times * size : start + (times + 1) * size]:
                times += 1
            longest = max(longest, times)
    return longest


def degenerate(text: str) -> bool:
    """Whether the text is stuck in a loop: a phrase four times in a row, or a syllable eight times within a word."""
    return longest_loop(text) >= LOOP_TIMES or _STUTTER.search(text) is not None


def words(text: str) -> list[str]:
    """The words of a text in lower case; in a script written without spaces, every character counts as one word."""
    return _WORDS.findall(text.lower())


def says_something(text: str) -> bool:
    """Whether the text has at least three different words, unlike an empty text, punctuation or one repeated word."""
    return len(set(words(text))) >= FEWEST_WORDS


def ends_early(text: str) -> bool:
    """Whether the text has fewer than ten words, as from a model that stops at once."""
    return len(words(text)) < EARLY


def longest_repeat(text: str) -> int:
    """The number of words of the longest phrase that occurs twice, overlapping or not; 0 if no word does."""
    said = words(text)
    short, long = 0, len(said)  # bisection: if a phrase of n words occurs twice, so does one of n - 1
    while short < long:
        middle = (short + long + 1) // 2
        grams = _grams(said, middle)
        short, long = (middle, long) if len(set(grams)) < len(grams) else (short, middle - 1)
    return short


def repetitive(text: str) -> bool:
    """Whether fewer than half of the phrases of four words are different, as in a long text that is stuck in a loop.

    Punctuation is ignored, because Markdown rules and tables repeat it. `degenerate` is the test for one-line answers.
    """
    grams = _grams(words(text), PHRASE)
    return len(set(grams)) < len(grams) / 2


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
