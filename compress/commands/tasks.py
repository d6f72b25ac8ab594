"""`compress tasks`: lists the evaluation tasks, and which of them can be run here."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from compress.commands.eval import DataDir, Online
from compress.commands.output import Json, result, spoken


@spoken({"suite": "--suite"})
def tasks(
    suite: Annotated[str | None, typer.Option("--suite", help="only this suite: facts, kick or kick_mini")] = None,
    data_dir: DataDir = None,
    online: Online = False,
    as_json: Json = False,
) -> None:
    """List the suites and their tasks: how many questions of what, and their source, or why they cannot be asked."""
    import compress

    compress.require_evals()
    from compress_evals.listing import listed
    from compress_evals.suite import SUITES, find

    chosen = list(SUITES.values()) if suite is None else [find(suite)]
    found = [listed(one, data_dir, online) for one in chosen]
    parts: list[Any] = []
    for one in found:
        parts += [table(one), escape(include_line(one.folder, one.suite, data_dir))]
    result({"suites": [asdict(one) for one in found]}, as_json, *parts)


def table(found: Any) -> Table:
    """The table of one suite."""
    shown = Table(title=found.suite)
    for column in ("task", "what it is", "family", "questions", "data"):
        shown.add_column(column, justify="right" if column == "questions" else "left")
    for task in found.tasks:
        data = f"[yellow]skipped: {escape(task.skipped)}[/]" if task.skipped else escape(task.data)
        family = f"{task.family} (control)" if task.control and task.family != "control" else task.family
        shown.add_row(task.name, escape(task.title), family, "" if task.n is None else f"{task.n:,}", data)
    return shown


def include_line(folder: str, suite: str, data_dir: Path | None) -> str:
    """A line that says how to run the suite with lm-eval itself."""
    data = f' --metadata \'{{"data_dir": "{data_dir}"}}\'' if data_dir is not None else ""
    return f"plain lm-eval: lm-eval run --include_path {folder} --tasks {suite}{data}"
