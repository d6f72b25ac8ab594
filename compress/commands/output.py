"""How commands print: results to stdout, as tables or as JSON; progress to stderr."""

from __future__ import annotations

import json
import logging
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.errors import MarkupError
from rich.table import Table
from rich.text import Text

from compress.commands.fitted import Fitted
from compress.errors import CompressError, RecipeError

Json = Annotated[bool, typer.Option("--json", help="print one JSON object instead of tables")]


def place(text: str) -> Path:
    """The path that --out names; raises RecipeError for an empty one, which Path takes for the current folder."""
    if not text:
        raise RecipeError("--out: is empty; give a path to write to")
    return Path(text)


def out_option(default: str = "", what: str = "folder to write; must not exist") -> Any:
    """The option --out; its help says `what` it names, and the `default` if there is one."""
    said = f"; default: {default}" if default else ""
    return typer.Option("--out", parser=place, metavar="<path>", help=f"{what}{said}")


def screen() -> Console:
    """The console for progress, on stderr; it does not wrap, so that paths stay whole."""
    console = Console(stderr=True, highlight=False, soft_wrap=True)
    return console


def result(value: Any, as_json: bool, *renderables: Any) -> None:
    """Print a result as JSON or as tables and lines; raises RecipeError if stdout cannot be written."""
    with taken():
        if as_json:
            typer.echo(json.dumps(value, indent=1, default=str))
        else:
            show(*renderables)


@contextmanager
def taken() -> Iterator[None]:
    """Raise RecipeError if stdout cannot take what is printed inside, for example on a full disk."""
    try:
        yield
    except BrokenPipeError:  # the reader has closed the pipe, which is no error
        raise
    except OSError as error:
        raise RecipeError(f"stdout: cannot be written: {error.strerror}") from error


def show(*renderables: Any) -> None:
    """Print tables and lines; tables fit a terminal's width, and are up to 160 columns wide elsewhere."""
    terminal = sys.stdout.isatty()
    console = Console(highlight=False, width=None if terminal else 160)
    for renderable in renderables:
        fits = Fitted(renderable) if terminal and isinstance(renderable, Table) else readable(renderable)
        console.print(fits, soft_wrap=isinstance(renderable, str))


def readable(renderable: Any) -> Any:
    """A line with its markup rendered, or literally if a name in it (of a folder, for example) breaks the markup."""
    try:
        return Text.from_markup(renderable) if isinstance(renderable, str) else renderable
    except MarkupError:
        return Text(renderable)


@contextmanager
def spoken(options: Mapping[str, str]) -> Iterator[None]:
    """Replace the parameter name that begins an error's message by its option: `suite: ...` becomes `--suite: ...`.

    Only for parameters that the command line alone can set, not a recipe or another file.
    """
    try:
        yield
    except CompressError as error:
        said = str(error)
        name = next((name for name in options if said.startswith((f"{name}:", f"{name}."))), None)
        if name is None:
            raise
        raise type(error)(options[name] + said.removeprefix(name)) from error


def bytes_of(text: str, option: str) -> int:
    """The bytes that a size such as `500MB` means (units are powers of 1000); raises RecipeError for anything else."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT]?)B?", text.strip(), re.IGNORECASE)
    size = float(found[1]) * 1000 ** " KMGT".index(found[2].upper() or " ") if found else 0.0
    if not 1 <= size <= 2**63:
        raise RecipeError(f"{option}: {text!r} is not a size; give a number with KB, MB, GB or TB")
    return int(size)


def one_model(model: str | None, changes: list[str]) -> None:
    """Raise RecipeError if both --model and --set name the model."""
    if model is not None and any(change.partition("=")[0] == "model" for change in changes):
        raise RecipeError("--set model: cannot be combined with --model; give only one of the two")


def quiet_loading() -> None:
    """Silence transformers' loading bars and bitsandbytes' advice on kernels, which would break our progress lines."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
