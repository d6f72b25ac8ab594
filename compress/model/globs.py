"""Which sites a pass is for: globs, of which any may match, and excluded globs, of which none may."""

from __future__ import annotations

from fnmatch import fnmatchcase
from functools import cache


def matches(name: str, globs: str) -> bool:
    """Whether a name is selected by globs separated by spaces; `!` excludes, and exclusions alone are of all names.

    `*mlp*` selects what it matches, `*q_proj *k_proj` either, `* !*down_proj` and `!*down_proj` all but one.
    """
    wanted, unwanted = split(globs)
    return any(fnmatchcase(name, glob) for glob in wanted) and not any(fnmatchcase(name, glob) for glob in unwanted)


@cache
def split(globs: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The globs that select and those that exclude."""
    parts = globs.split()
    unwanted = tuple(part.removeprefix("!") for part in parts if part.startswith("!"))
    wanted = tuple(part for part in parts if not part.startswith("!"))
    return wanted or (("*",) if unwanted else ()), unwanted
