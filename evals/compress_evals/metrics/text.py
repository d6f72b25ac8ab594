"""Whether a generated text has collapsed: variety and repetition, without a reference.

Not here: whether it is right (`answers.py`). Scores by likelihood never see this failure, because the model
is fed the right text there.
"""

from __future__ import annotations

import re

LOOP_PHRASE = 4  # words in the longest phrase looked for
LOOP_TIMES = 4  # repeats in a row that no answer asked here has
FEWEST_WORDS = 3  # different words that the shortest real answer has, such as `My answer is no.`
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


def words(text: str) -> list[str]:
    """The words of a text in lower case; a sign of a script that is written without spaces is one word."""
    return _WORDS.findall(text.lower())


def says_something(text: str) -> bool:
    """Whether the text has at least three different words: silence, marks and one word over and over have not."""
    return len(set(words(text))) >= FEWEST_WORDS


def longest_repeat(text: str) -> int:
    """The words of the longest phrase that is said twice, overlapping or not; 0 if no word is."""
    said = words(text)
    short, long = 0, len(said)  # a phrase of n words that is said twice has one of n - 1 words in it
    while short < long:
        middle = (short + long + 1) // 2
        grams = _grams(said, middle)
        short, long = (middle, long) if len(set(grams)) < len(grams) else (short, middle - 1)
    return short


def repetitive(text: str) -> bool:
    """Whether less than half of the phrases of four words are different: what a long text is when it is stuck.

    Marks are left out, which rules and tables of Markdown repeat; `degenerate` is for answers of one line.
    """
    grams = _grams(words(text), PHRASE)
    return len(set(grams)) < len(grams) / 2


def _grams(words: list[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
