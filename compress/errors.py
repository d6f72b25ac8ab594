"""What a user can cause, by kind; every message says what is wrong, where, and what is allowed.

Bugs are not here: they stay ordinary Python exceptions and keep their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

LONGEST = 2000  # characters of a message: names in it may come from anybody


class CompressError(Exception):
    """The parent of every error a user can cause; the command line exits with `exit_code`.

    Its message is one line that a terminal shows as it is, whatever the names in it hold.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(str(message))[:LONGEST])


class RecipeError(CompressError):
    """A recipe, an option or a file named on the command line is not what it must be."""


class UnsupportedWeight(CompressError):
    """A pass, a codec or a kernel was given a weight expression it has no rule for."""


class CalibrationError(CompressError):
    """Calibration data or the statistics made of it cannot be used."""


class ArtifactError(CompressError):
    """A model folder or a results file is missing, malformed or not ours."""


class VerificationError(CompressError):
    """What was written does not say what was meant."""

    exit_code = 4


class PlanError(CompressError):
    """The work does not fit: memory, disk or a limit of the recipe."""

    exit_code = 3


class AcceptanceError(CompressError):
    """The compressed model lost more than the recipe accepts."""

    exit_code = 5


class LostProcess(CompressError):
    """Another process of the same run failed or has gone; what is done of the run can be gone on with."""

    exit_code = 7


def visible(text: str) -> str:
    """The text with every character escaped that does not show: controls, line breaks, half pairs, direction marks."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(name: str, allowed: Iterable[str], otherwise: str | None = None) -> str:
    """`; did you mean ...?` with the nearest allowed name, else the list of allowed names, or what is said instead."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; allowed: {', '.join(names) or 'none'}" if otherwise is None else otherwise


def why(error: Exception) -> str:
    """What an exception says; of a failed call of the system only why, as who tells it has named the file."""
    return getattr(error, "strerror", None) or str(error)


def first_line(error: Exception) -> str:
    """What an exception says, in one line: its type if it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_short(error: Exception, most: int = 200) -> str:
    """All that an exception says as one line, cut after `most` characters: its type if it says nothing."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and those it was raised from."""
    while error is not None:
        yield error
        error = error.__cause__


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception says that memory ran out, which torch tells in several words and types."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or "allocate memory" in said or "out of memory" in said
