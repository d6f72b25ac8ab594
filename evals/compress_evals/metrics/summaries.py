"""What a summary keeps of its source, what it invents and what it only copies; no judge and no model.

Not here: prompts (`tasks/`). A text that says nothing (no word but articles) scores 0 by every measure: not even
silence invents nothing. Names are runs of capitalised words, so these measures are for English, and numbers are
digits: "three" is not one.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from compress_evals.metrics.answers import normalise
from compress_evals.metrics.text import distinct, words

COPIED = 4  # words of a phrase that counts as copied
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_TOKEN = re.compile(r"\w+(?:['’&.-]\w+)*|[.!?:]|\S")
_ENDS = frozenset('.!?:"“‘(')  # after these a capital says nothing
# Capitalised only because they open a sentence (or, `NEW`, a highlight).
_OPENING = (
    "a about after all also although an and another as at before both but by despite during each even every few first "
    "following for from he her here his how however if in instead into it it's its just last later like many meanwhile "
    "more most my new no not now of on once one only or other our over she since so some still such than that the "
    "their then there there's these they this those though three through to two under until up we what when where "
    "which while who why will with without yet you your"
)
_OPENERS = frozenset(_OPENING.split())


def summary_scores(said: str, reference: str, source: str) -> dict[str, float]:
    """All measures of one summary; `rouge_l` is the one that decides.

    `entity_recall`: names and numbers of the reference that are said. `entity_precision`, `number_precision`: names
    and numbers said that the source has, 0 if none is said. `longest_copy`: words of the longest phrase taken from
    the source; `copy_rate`: phrases of four words taken from it. `length_ratio`: words said per word of reference.
    """
    if not normalise(said):
        return dict.fromkeys(_MEASURES, 0.0)
    return {name: measure(said, reference, source) for name, measure in _MEASURES.items()}


def agreement(dense_text: str, compressed_text: str) -> float:
    """ROUGE-L of two models' texts, from 0 to 1: how much of what the one said the other said in the same order.

    The same text agrees, also if it says nothing.
    """
    return 1.0 if compressed_text == dense_text else rouge_l(compressed_text, dense_text)


def rouge_1(said: str, reference: str) -> float:
    """The F measure of the words (stems) in common, from 0 to 1. Source: Lin, "ROUGE", 2004, section 2."""
    mine, wanted = stems(said), stems(reference)
    return _f_measure(sum((Counter(mine) & Counter(wanted)).values()), len(mine), len(wanted))


def rouge_l(said: str, reference: str) -> float:
    """The F measure of the longest common subsequence of words (stems), from 0 to 1.

    Source: Lin, "ROUGE", 2004, section 3.1, with beta 1 as the package `rouge_score` has it.
    """
    mine, wanted = stems(said), stems(reference)
    return _f_measure(common_subsequence(mine, wanted), len(mine), len(wanted))


def stems(text: str) -> list[str]:
    """The words of a text as ROUGE counts them: lower case, letters a to z and digits only, Porter's stems."""
    if not normalise(text):
        return []
    from rouge_score.tokenize import tokenize

    return list(tokenize(text, _stemmer()))


def common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence, all of `right` at a time as the bits of one number.

    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004, figure 2: a zero bit is a match. Answers of
    a thousand words take a millisecond, `rouge_score`'s table half a second.
    """
    places: dict[str, int] = {}
    for i, word in enumerate(right):
        places[word] = places.get(word, 0) | 1 << i
    every = (1 << len(right)) - 1
    row = every
    for word in left:
        matched = row & places.get(word, 0)
        row = ((row + matched) | (row - matched)) & every
    return len(right) - row.bit_count()


def names(text: str) -> set[str]:
    """Runs of capitalised words, in lower case; words that open a sentence only because they must are left out."""
    found, run, opening = set(), list[str](), True
    for token in [*_TOKEN.findall(text), "."]:
        opener = opening and not run and token.lower() in _OPENERS
        if token[0].isupper() and token != "I" and not opener:
            run.append(_bare(token))
        elif run:
            found.add(" ".join(run))
            run = []
        opening = token in _ENDS
    return found


def numbers(text: str) -> set[str]:
    """The numbers written in digits, without the commas between thousands."""
    return {number.replace(",", "") for number in _NUMBER.findall(text)}


def entity_recall(said: str, reference: str) -> float:
    """The share of the reference's names and numbers that are said; 0 if it has none."""
    wanted, counted = names(reference), numbers(reference)
    spoken = _spoken(said)
    kept = sum(f" {name} " in spoken for name in wanted) + len(counted & numbers(said))
    return kept / (len(wanted) + len(counted)) if wanted or counted else 0.0


def entity_precision(said: str, source: str) -> float:
    """The share of the names said that the source has; the rest are invented. 0 if none is said."""
    found, written = names(said), _spoken(source)
    return sum(f" {name} " in written for name in found) / len(found) if found else 0.0


def number_precision(said: str, source: str) -> float:
    """The share of the numbers said that the source has; the rest are invented. 0 if none is said."""
    found = numbers(said)
    return len(found & numbers(source)) / len(found) if found else 0.0


def copy_rate(said: str, source: str) -> float:
    """The share of the phrases of four words that stand in the source; 0 if too little is said for one."""
    mine, theirs = _phrases(words(said), COPIED), set(_phrases(words(source), COPIED))
    return sum(phrase in theirs for phrase in mine) / len(mine) if mine else 0.0


def longest_copy(said: str, source: str) -> int:
    """The words of the longest phrase of the text that stands in the source."""
    mine, theirs = words(said), words(source)
    short, long = 0, min(len(mine), len(theirs))  # whatever is copied, its parts are copied
    while short < long:
        middle = (short + long + 1) // 2
        copied = set(_phrases(mine, middle)) & set(_phrases(theirs, middle))
        short, long = (middle, long) if copied else (short, middle - 1)
    return short


def length_ratio(said: str, reference: str) -> float:
    """Words said per word of the reference; 0 if that has none."""
    wanted = len(words(reference))
    return len(words(said)) / wanted if wanted else 0.0


_MEASURES: dict[str, Callable[[str, str, str], float]] = {
    "rouge_l": lambda said, reference, source: rouge_l(said, reference),
    "rouge_1": lambda said, reference, source: rouge_1(said, reference),
    "entity_recall": lambda said, reference, source: entity_recall(said, reference),
    "entity_precision": lambda said, reference, source: entity_precision(said, source),
    "number_precision": lambda said, reference, source: number_precision(said, source),
    "copy_rate": lambda said, reference, source: copy_rate(said, source),
    "longest_copy": lambda said, reference, source: float(longest_copy(said, source)),
    "distinct_2": lambda said, reference, source: distinct(said, 2) if len(words(said)) > 1 else 0.0,
    "length_ratio": lambda said, reference, source: length_ratio(said, reference),
}


def _f_measure(common: int, said: int, wanted: int) -> float:
    return 2 * common / (said + wanted) if common else 0.0


def _spoken(text: str) -> str:
    """The words and marks of a text in lower case with a space around each, to look for names in."""
    return f" {' '.join(_bare(token) for token in _TOKEN.findall(text))} "


def _bare(token: str) -> str:
    """The word in lower case, without the 's of a possessive."""
    return re.sub(r"['’]s$", "", token).lower()


def _phrases(said: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]


class _Stemmer:
    """Porter's stemmer that remembers: a word is stemmed once, not once an answer."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem: Callable[[str], str] = lru_cache(1 << 16)(PorterStemmer().stem)


@lru_cache(1)
def _stemmer() -> _Stemmer:
    return _Stemmer()
