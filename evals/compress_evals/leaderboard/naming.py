"""The names of models on a board and on disk: distinct display names and safe file names.

Names are untrusted input: a file name keeps nothing but the letters a to z, digits and dashes, so that no name can
lead out of its folder on any operating system.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import PurePath
from typing import TYPE_CHECKING

from compress.errors import ArtifactError

if TYPE_CHECKING:
    from compress_evals.leaderboard.collect import Entry

LONGEST = 60  # characters of a file name: display names have no limit, paths do
RESERVED = {"index", "con", "nul", "aux", "prn"}  # the board's own page, and device names on Windows


def distinct(entries: Sequence[Entry]) -> list[Entry]:
    """The entries with distinct names: equal names get the parts of their paths that differ appended in parentheses.

    Raises ArtifactError if the names are still not distinct.
    """
    times = Counter(entry.name for entry in entries)
    named = []
    for entry in entries:
        twins = [other.place for other in entries if other.name == entry.name and other is not entry]
        named.append(entry if times[entry.name] == 1 else replace(entry, name=f"{entry.name} ({_apart(entry, twins)})"))
    again = [name for name, count in Counter(entry.name for entry in named).items() if count > 1]
    if again:
        raise ArtifactError(f"two results are called {again[0]!r}: give each model its own name")
    return named


def _apart(entry: Entry, twins: Sequence[str]) -> str:
    """The parts of an entry's path that differ from those of at least one of its namesakes."""
    mine, others = PurePath(entry.place).parts, [PurePath(place).parts for place in twins]
    own = [part for i, part in enumerate(mine) if any(i >= len(o) or o[i] != part for o in others)]
    return "/".join(own) or entry.place


def slugs(names: Iterable[str]) -> list[str]:
    """A safe and distinct file name, without ending, for each name, in order."""
    given: set[str] = set()
    found = []
    for name in names:
        plain = unicodedata.normalize("NFKD", name).encode("ascii", "ignore").decode().lower()
        stem = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")[:LONGEST].strip("-") or "model"
        stem = f"model-{stem}" if stem in RESERVED else stem
        choices = (stem if i == 1 else f"{stem}-{i}" for i in range(1, len(given) + 2))
        slug = next(choice for choice in choices if choice not in given)
        given.add(slug)
        found.append(slug)
    return found


def readable(text: str) -> str:
    """The text with control characters and invisible format marks (such as bidirectional overrides) replaced by U+FFFD.

    Line breaks, tabs and the two marks that join emoji are kept.
    """
    if text.isprintable():
        return text
    kinds = ("Cc", "Cf", "Cs", "Zl", "Zp")
    kept = "\n\t\u200d\ufe0f"  # line breaks and tabs, and the marks that join emoji
    return "".join("\ufffd" if unicodedata.category(c) in kinds and c not in kept else c for c in text)


def one_line(name: str) -> str:
    """The display form of a name: readable and on one line; `unnamed` if nothing is left."""
    return readable(" ".join(name.split())) or "unnamed"
