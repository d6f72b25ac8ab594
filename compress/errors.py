"""The errors that a user can cause, by kind; every message says what is wrong, where, and what is allowed.

Bugs have no class here: they stay ordinary Python exceptions and keep their traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator

OUT_OF_MEMORY = ("allocate memory", "out of memory", "not enough memory", "bad_alloc", "status_alloc_failed")
LONGEST = 2000  # characters of a message; the names in it may come from untrusted files


class CompressError(Exception):
    """The parent of every error a user can cause; the command line exits with `exit_code`.

    Its message is one line, with unprintable characters escaped, so that names in it cannot control a terminal.
    """

    exit_code = 2

    def __init__(self, message: object = "") -> None:
        super().__init__(visible(str(message))[:LONGEST])


class RecipeError(CompressError):
    """A recipe, an option or a file named on the command line is not what it must be."""


class UnsupportedWeight(CompressError):
    """A pass, a codec or a kernel was given a weight expression it has no rule for."""


class CalibrationError(CompressError):
    """Calibration data, or the statistics computed from it, cannot be used."""


class ArtifactError(CompressError):
    """A model folder or a results file is missing, malformed or not one that Compress reads."""


class VerificationError(CompressError):
    """What was written does not read back as what was meant."""

    exit_code = 4


class PlanError(CompressError):
    """The work does not fit: memory, disk or a limit of the recipe."""

    exit_code = 3


class AcceptanceError(CompressError):
    """The compressed model lost more than the recipe accepts."""

    exit_code = 5


class LostProcess(CompressError):
    """Another process of the same run failed or disappeared; the run can be resumed from what is finished."""

    exit_code = 7


def visible(text: str) -> str:
    """The text with unprintable characters escaped: controls, line breaks, lone surrogates, direction marks."""
    return text if text.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def nearest(name: str, allowed: Iterable[str], otherwise: str | None = None) -> str:
    """`; did you mean ...?` with the nearest allowed name; if none is near, `otherwise` or a list of allowed names."""
    names = sorted(allowed)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean {close[0]!r}?"
    return f"; allowed: {', '.join(names) or 'none'}" if otherwise is None else otherwise


def why(error: Exception) -> str:
    """The text of an exception; for an OSError only its reason, because the caller's message already names the file."""
    return getattr(error, "strerror", None) or str(error)


def first_line(error: Exception) -> str:
    """The first line of an exception's text, or the name of its type if the text is empty."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def in_short(error: Exception, most: int = 200) -> str:
    """The whole text of an exception on one line, cut after `most` characters; the name of its type if it is empty."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception, then those it was raised from (`__cause__`)."""
    while error is not None:
        yield error
        error = error.__cause__


def pass_on_memory(error: Exception) -> None:
    """Raise a MemoryError from an exception that means that memory ran out, which says nothing about what was read."""
    if out_of_memory(error):
        raise MemoryError(in_short(error)) from error


def out_of_memory(error: BaseException) -> bool:
    """Whether an exception means that memory ran out; torch and CUDA's libraries say so in many wordings and types."""
    said = str(error).lower()
    return isinstance(error, MemoryError) or any(words in said for words in OUT_OF_MEMORY)
