"""How many sentences a text has, by rules: no model to download and none to unpickle.

Not here: a splitter for layout. A line break ends no sentence, as in Punkt, by which the published checker counts.
"""

from __future__ import annotations

import re
from itertools import pairwise

# Before a name or a number, so never at the end.
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
# Anywhere; an end only if a capital follows.
_SHORTENED = {"etc", "inc", "ltd", "co", "corp", "jr", "sr", "ave", "approx", "dept"}
_OPENERS = "\"'“‘([*_"
_CLOSERS = "\"'”’)\\]*_"
_END = re.compile(rf"(?P<marks>[.!?…]+)[{_CLOSERS}]*(?=\s|$)|[。！？।۔؟]+")
_LAST_WORD = re.compile(r"\S*$")
_LONGEST = 40  # letters before an end that are looked at


def count_sentences(text: str) -> int:
    """The sentences of a text: its parts between ends, that have a letter or digit; the last needs no end."""
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
