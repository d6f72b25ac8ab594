"""Measures what a summary keeps of its source, what it invents and what it only copies, without a judge or a model.

Not here: prompts (`tasks/`). A text that says nothing (no words except articles) scores 0 by every measure, so that an
empty summary does not get credit for inventing nothing. Names are runs of capitalised words, so these measures are for
English. Numbers are digits: "three" is not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache

from compress_evals.metrics.answers import normalise
from compress_evals.metrics.text import distinct, words

COPIED = 4  # words that a phrase must have to count as copied
_NUMBER = re.compile(r"\d+(?:[.,:]\d+)*")
_TOKEN = re.compile(r"\w+(?:['’&.-]\w+)*|[.!?:]|\S")
_ENDS = frozenset('.!?:"“‘(')  # a capital after one of these does not indicate a name
# Words that are capitalised only because they open a sentence (or a highlight, as `NEW` does).
_OPENING = (
    "a about after all also although an and another as at before both but by despite during each even every few first "
    "following for from he her here his how however if in instead into it it's its just last later like many meanwhile "
    "more most my new no not now of on once one only or other our over she since so some still such than that the "
    "their then there there's these they this those though three through to two under until up we what when where "
    "which while who why will with without yet you your"
)
_OPENERS = frozenset(_OPENING.split())


def summary_scores(said: str, reference: str, source: str) -> dict[str, float]:
    """All measures of one summary; `rouge_l` is the headline metric.

    `entity_recall`: the share of the reference's names and numbers that the summary has. `entity_precision`,
    `number_precision`: the share of the summary's names and numbers that the source has, 0 if it has none.
    `longest_copy`: the number of words of the longest phrase copied from the source; `copy_rate`: the share of phrases
    of four words copied from it. `length_ratio`: words of the summary per word of the reference.
    """
    if not normalise(said):
        return dict.fromkeys(_MEASURES, 0.0)
    return {name: measure(said, reference, source) for name, measure in _MEASURES.items()}


def agreement(dense_text: str, compressed_text: str) -> float:
    """ROUGE-L of two models' texts, from 0 to 1: how many words they share in the same order.

    Identical texts score 1, also if they say nothing.
    """
    return 1.0 if compressed_text == dense_text else rouge_l(compressed_text, dense_text)


def rouge_1(said: str, reference: str) -> float:
    """ROUGE-1: the F measure of the shared stemmed words, from 0 to 1. Source: Lin, "ROUGE", 2004, section 2."""
    mine, wanted = stems(said), stems(reference)
    return _f_measure(sum((Counter(mine) & Counter(wanted)).values()), len(mine), len(wanted))


def rouge_l(said: str, reference: str) -> float:
    """ROUGE-L: the F measure of the longest common subsequence of stemmed words, from 0 to 1.

    Source: Lin, "ROUGE", 2004, section 3.1, with beta 1 as in the package `rouge_score`.
    """
    mine, wanted = stems(said), stems(reference)
    return _f_measure(common_subsequence(mine, wanted), len(mine), len(wanted))


def stems(text: str) -> list[str]:
    """The words of a text as ROUGE counts them: in lower case, letters a to z and digits only, stemmed as by Porter."""
    if not normalise(text):
        return []
    from rouge_score.tokenize import tokenize

    return list(tokenize(text, _stemmer()))


def common_subsequence(left: Sequence[str], right: Sequence[str]) -> int:
    """The length of the longest common subsequence, computed on all of `right` at once as the bits of one integer.

    Answers of a thousand words take a millisecond; with the table of `rouge_score` they take half a second.
    Source: Hyyrö, "Bit-parallel LCS-length computation revisited", 2004; a zero bit is a match.
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
    """The names in a text: runs of capitalised words, in lower case.

    Common words that are capitalised only because they open a sentence are left out.
    """
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
    """The numbers written in digits, with the commas between thousands removed."""
    return {number.replace(",", "") for number in _NUMBER.findall(text)}


def entity_recall(said: str, reference: str) -> float:
    """The share of the reference's names and numbers that the summary has; 0 if the reference has none."""
    wanted, counted = names(reference), numbers(reference)
    spoken = _spoken(said)
    kept = sum(f" {name} " in spoken for name in wanted) + len(counted & numbers(said))
    return kept / (len(wanted) + len(counted)) if wanted or counted else 0.0


def entity_precision(said: str, source: str) -> float:
    """The share of the summary's names that the source has; the others are invented. 0 if it has no names."""
    found, written = names(said), _spoken(source)
    return sum(f" {name} " in written for name in found) / len(found) if found else 0.0


def number_precision(said: str, source: str) -> float:
    """The share of the summary's numbers that the source has; the others are invented. 0 if it has no numbers."""
    found = numbers(said)
    return len(found & numbers(source)) / len(found) if found else 0.0


def copy_rate(said: str, source: str) -> float:
    """The share of the summary's phrases of four words that the source has; 0 if the summary is shorter than that."""
    mine, theirs = _phrases(words(said), COPIED), set(_phrases(words(source), COPIED))
    return sum(phrase in theirs for phrase in mine) / len(mine) if mine else 0.0


def longest_copy(said: str, source: str) -> int:
    """The number of words of the longest phrase that the summary and the source share."""
    mine, theirs = words(said), words(source)
    short, long = 0, min(len(mine), len(theirs))  # bisection: if a phrase is copied, so are its parts
    while short < long:
        middle = (short + long + 1) // 2
        copied = set(_phrases(mine, middle)) & set(_phrases(theirs, middle))
        short, long = (middle, long) if copied else (short, middle - 1)
    return short


def length_ratio(said: str, reference: str) -> float:
    """Words of the summary per word of the reference; 0 if the reference has none."""
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
    """The words and marks of a text in lower case, with a space around each, so that names can be searched in it."""
    return f" {' '.join(_bare(token) for token in _TOKEN.findall(text))} "


def _bare(token: str) -> str:
    """The word in lower case, without a possessive 's."""
    return re.sub(r"['’]s$", "", token).lower()


def _phrases(said: Sequence[str], n: int) -> list[tuple[str, ...]]:
    return [tuple(said[i : i + n]) for i in range(len(said) - n + 1)]


class _Stemmer:
    """Porter's stemmer with a cache, so that a word is stemmed once and not once per answer."""

    def __init__(self) -> None:
        from nltk.stem.porter import PorterStemmer

        self.stem: Callable[[str], str] = lru_cache(1 << 16)(PorterStemmer().stem)


@lru_cache(1)
def _stemmer() -> _Stemmer:
    return _Stemmer()
