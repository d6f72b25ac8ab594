"""Checks of the number of words, sentences and paragraphs of a response."""

from __future__ import annotations

import re

from compress_evals.metrics.instructions.relation import meets
from compress_evals.metrics.instructions.sentences import count_sentences


def number_words(response: str, *, num_words: int, relation: str) -> bool:
    """Whether there is the required number of words, which are runs of letters, digits and underscores.

    `don't` counts as two.
    """
    return meets(len(re.findall(r"\w+", response)), relation, num_words)


def number_sentences(response: str, *, num_sentences: int, relation: str) -> bool:
    """Whether there is the required number of sentences."""
    return meets(count_sentences(response), relation, num_sentences)


def number_paragraphs(response: str, *, num_paragraphs: int) -> bool:
    """Whether there are exactly `num_paragraphs` paragraphs separated by `***`, with no empty one in the middle."""
    parts = [part.strip() for part in response.split("***")]
    return all(parts[1:-1]) and sum(map(bool, parts)) == num_paragraphs


def nth_paragraph_first_word(response: str, *, num_paragraphs: int, nth_paragraph: int, first_word: str) -> bool:
    """Whether there are exactly `num_paragraphs` paragraphs separated by blank lines, and the n-th begins with a word.

    `nth_paragraph` counts from 1; the word may be in any case.
    """
    parts = response.split("\n\n")
    if sum(bool(part.strip()) for part in parts) != num_paragraphs or nth_paragraph > num_paragraphs:
        return False
    opening = parts[nth_paragraph - 1].split()
    return bool(opening) and _plain(opening[0]) == first_word.lower()


def _plain(word: str) -> str:
    """The word in lower case, without leading quotes and up to its first punctuation mark."""
    return re.split(r"[.,?!'\"]", word.lstrip("'").lstrip('"'))[0].lower()
