"""`compress leaderboard`: builds a static site from every result in some folders."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from compress.commands.output import Json, out_option, result, screen


def leaderboard(
    results: Annotated[list[Path], typer.Argument(help="folders of `compress eval` or `compress sweep`")],
    out: Annotated[Path, out_option(what="folder of the site; an earlier leaderboard is replaced")],
    force: Annotated[bool, typer.Option("--force", help="replace any existing folder")] = False,
    picture: Annotated[
        Path | None, typer.Option("--picture", help="also plot the worst family against size, as .svg or .png")
    ] = None,
    examples: Annotated[
        int, typer.Option(min=0, max=20, help="lost and gained answers per task shown on a model's page")
    ] = 20,
    each_run: Annotated[
        bool,
        typer.Option("--each-run", help="one line per calibration seed instead of one for the mean of each recipe"),
    ] = False,
    as_json: Json = False,
) -> None:
    """Publish results as a static site: a page to sort and filter, a page per model, and Markdown, CSV and JSON.

    No server is needed.
    """
    import compress

    compress.require_evals()
    from compress_evals.leaderboard import publish

    with screen().status("reading results"):
        done = publish(results, out, force=force, picture=picture, examples=examples, each_run=each_run)
    value = {
        "out": str(out),
        "boards": [{"dense": name, "models": models, "failed": failed} for name, models, failed in done.boards],
    }
    sentences = [
        f"{name}: {models} models{f', {failed} failed' if failed else ''}" for name, models, failed in done.boards
    ]
    result(value, as_json, *map(escape, sentences), escape(f"page: {out}/index.html"))
