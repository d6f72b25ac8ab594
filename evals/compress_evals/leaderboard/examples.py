"""Flipped questions with both answers side by side and their differing words marked."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import SequenceMatcher

from compress_evals.leaderboard.table import Line
from compress_evals.results import Example

LONGEST = 4000  # characters of an answer that are compared and shown; the rest is cut
Words = tuple[tuple[str, bool], ...]


@dataclass(frozen=True, kw_only=True)
class Flip:
    """One question, with both answers as runs of text, each flagged if it differs from the other answer."""

    id: str
    prompt: str
    wanted: str
    dense: Words
    compressed: Words


@dataclass(frozen=True, kw_only=True)
class Flips:
    """The lost and gained examples of one task, and the total number of each."""

    title: str
    lost: tuple[Flip, ...]
    gained: tuple[Flip, ...]
    all_lost: int
    all_gained: int


def flipped(line: Line, most: int) -> list[Flips]:
    """The examples of every task that has any, at most `most` lost and `most` gained ones."""
    return [
        Flips(
            title=task.title,
            lost=tuple(map(_flip, task.lost[:most])),
            gained=tuple(map(_flip, task.gained[:most])),
            all_lost=task.paired.lost,
            all_gained=task.paired.gained,
        )
        for task in line.versus.tasks.values()
        if task.lost[:most] or task.gained[:most]
    ]


def marked(one: str, other: str) -> tuple[Words, Words]:
    """Both texts as runs of words and spaces, each with a flag that says whether it is missing from the other text."""
    a, b = _words(one), _words(other)
    left: list[tuple[str, bool]] = []
    right: list[tuple[str, bool]] = []
    for kind, i, j, k, m in SequenceMatcher(None, a, b, autojunk=False).get_opcodes():
        left += [("".join(a[i:j]), kind != "equal")] if j > i else []
        right += [("".join(b[k:m]), kind != "equal")] if m > k else []
    return tuple(left), tuple(right)


def _flip(example: Example) -> Flip:
    dense, compressed = marked(example.dense, example.compressed)
    return Flip(id=example.id, prompt=example.prompt, wanted=example.wanted, dense=dense, compressed=compressed)


def _words(text: str) -> Sequence[str]:
    shown = text if len(text) <= LONGEST else text[:LONGEST] + " …"
    return re.findall(r"\s+|\w+|[^\w\s]+", shown)
