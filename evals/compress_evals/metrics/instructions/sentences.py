"""Counts the sentences of a text by rules, so that no model has to be downloaded or unpickled.

Not here: splitting by layout. A line break does not end a sentence, as in Punkt, which the published checker uses.
"""

from __future__ import annotations

import re
from itertools import pairwise

# These precede a name or a number, so their full stop never ends a sentence.
_TITLES = {
    "mr",
    "mrs",
    "ms",
    "dr",
    "prof",
    "st",
    "gen",
    "sen",
    "rep",
    "gov",
    "capt",
    "lt",
    "col",
    "rev",
    "mt",
    "fig",
    "vs",
    "e.g",
    "i.e",
}
# These can occur anywhere; their full stop ends a sentence only if a capital follows.
_SHORTENED = {"etc", "inc", "ltd", "co", "corp", "jr", "sr", "ave", "approx", "dept"}
_OPENERS = "\"'“‘([*_"
_CLOSERS = "\"'”’)\\]*_"
_END = re.compile(rf"(?P<marks>[.!?…]+)[{_CLOSERS}]*(?=\s|$)|[。！？।۔؟]+")
_LAST_WORD = re.compile(r"\S*$")
_LONGEST = 40  # characters before a possible end that are examined


def count_sentences(text: str) -> int:
    """The number of sentences: parts between sentence ends that have a letter or digit; the last needs no end mark."""
    ends = [end.end() for end in _END.finditer(text) if _is_end(end, text)]
    parts = (text[start:end] for start, end in pairwise([0, *ends, len(text)]))
    return sum(any(map(str.isalnum, part)) for part in parts)


def _is_end(end: re.Match[str], text: str) -> bool:
    if end["marks"] is None:
        return True
    after = text[end.end() :].lstrip()
    if not after or end["marks"].strip(".…"):
        return True
    word = _LAST_WORD.findall(text[max(0, end.start() - _LONGEST) : end.start()])[0].lstrip(_OPENERS)
    if _is_list_number(word, end, text) or word.lower() in _TITLES or _is_initial(word):
        return False
    if "." in word or word.lower() in _SHORTENED or end["marks"] != ".":
        return after.lstrip(_OPENERS)[:1].isupper()
    return bool(word)


def _is_initial(word: str) -> bool:
    return len(word) == 1 and word.isupper() and word != "I"


def _is_list_number(word: str, end: re.Match[str], text: str) -> bool:
    line = text[text.rfind("\n", 0, end.start()) + 1 : end.start()]
    return word.isdigit() and line.strip(" \t*_#>-") == word
