"""`compress recipes`: lists the packaged recipes, or prints the text of one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from compress.commands.output import Json, result, taken
from compress.errors import RecipeError, nearest

FIGURES = {"bits": r"([\d.]+) bits a block weight", "kl": r"KL on prose ([\d.]+)"}  # as the recipe headers word them


def recipes(
    name: Annotated[
        str | None, typer.Argument(help="print the text of this recipe, as a start for your own file")
    ] = None,
    as_json: Json = False,
) -> None:
    """List the packaged recipes with what each does and what it cost on the built-in model; or print one."""
    from compress.recipe import packaged

    found = packaged()
    if name is None:
        rows = [about(path) for path in found.values()]
        result({"recipes": rows}, as_json, table(rows), escape(MEANT))
        return
    if name not in found:
        raise RecipeError(f"no packaged recipe {name!r}{nearest(name, found)}")
    text = found[name].read_text(encoding="utf-8")
    if as_json:
        result({**about(found[name]), "text": text}, as_json)
    else:
        with taken():
            typer.echo(text.rstrip())


DIGITS = {"bits": 2, "kl": 3}
MEANT = (
    "bits a weight of the blocks and KL in nats on prose, both of the built-in model; each file says when and how they "
    "were measured: `compress recipes NAME` prints it, `compress run NAME --model FOLDER` runs it on a model of yours"
)


def about(path: Path) -> dict[str, Any]:
    """The facts in a recipe's header: what it does, its source, the measured result, and bits and KL from that."""
    lines = path.read_text(encoding="utf-8").splitlines()
    header = " ".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))
    what, _, rest = header.partition(" Source: ")
    source, _, measured = rest.partition(" Measured ")
    _, _, found = measured.partition(" Result: ")
    figures = {key: re.search(pattern, found) for key, pattern in FIGURES.items()}
    return {
        "name": path.stem, "what": what, "source": source, "result": found,
        **{key: float(match[1]) if match else None for key, match in figures.items()},
    }  # fmt: skip


def table(rows: list[dict[str, Any]]) -> Table:
    """The table of all recipes, one per line."""
    shown = Table()
    for column in ("recipe", "what it does", "bits", "KL"):
        shown.add_column(
            column,
            justify="left" if column in ("recipe", "what it does") else "right",
            no_wrap=column != "what it does",
        )
    for row in rows:
        figures = ["" if row[key] is None else f"{row[key]:.{DIGITS[key]}f}" for key in FIGURES]
        shown.add_row(row["name"], escape(row["what"].partition(". ")[0].rstrip(".")), *figures)
    return shown
