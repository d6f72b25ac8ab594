"""`compress sweep`: measures every cell of a grid of models, recipes and seeds, and can be resumed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compress.commands.output import Json, out_option, result, screen

if TYPE_CHECKING:
    from rich.console import RenderableType

    from compress_evals.sweep import Planned, Progress, Summary

FAILED = 6  # the exit code if cells failed
SHOWN = 5  # notes that are printed


def sweep(
    file: Annotated[Path, typer.Argument(help="a YAML file with `cells` and optionally `models`, `seeds`, `eval`")],
    out: Annotated[Path | None, out_option("out/<file>", what="folder to write, or to resume in")] = None,
    jobs: Annotated[int, typer.Option(min=1, max=256, help="cells run at a time; they share the CPU cores")] = 1,
    timeout: Annotated[float | None, typer.Option(min=0.01, help="most minutes that a cell may take")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="run cells again that failed earlier")] = False,
    keep_models: Annotated[bool, typer.Option("--keep-models", help="keep each compressed model")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="list the cells and stop")] = False,
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    engine: Annotated[str, typer.Option(help="what runs the processes: local, ray")] = "local",
    address: Annotated[
        str | None, typer.Option(help="HOST:PORT of a running Ray cluster; default: start a local one")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compress and evaluate every cell of a sweep, each in a process of its own.

    If it was stopped, the same command resumes it. Exit code 6 if cells failed.
    """
    import compress

    compress.require_evals()
    from compress_evals import sweep as sweeps

    loaded = sweeps.load(file)
    place = out if out is not None else Path("out") / file.stem
    console = screen()
    strange = sweeps.strangers(place, loaded.cells)
    notes = [*loaded.notes, *(f"{name} is in {place} but no longer in the sweep" for name in strange)]
    for note in notes[:SHOWN]:
        console.print(f"note: {note}", markup=False)
    if len(notes) > SHOWN:
        console.print(f"note: and {len(notes) - SHOWN} more, in --json")
    if dry_run:
        sweeps.engine_of(engine, jobs, device, address)
        planned = sweeps.plan(loaded, place, device)
        value, shown = listing(planned, jobs, retry_failed)
        result({"out": str(place), "notes": notes, **value}, as_json, *shown)
        return
    try:
        with console.status("starting") as status:

            def say(progress: Progress) -> None:
                status.update(standing(progress))
                if progress.ended is not None:
                    console.print(line(progress), markup=False)

            summary = sweeps.run(
                loaded, place, jobs=jobs, timeout=timeout, keep_models=keep_models, retry_failed=retry_failed,
                device=device, engine=engine, address=address, on_progress=say,
            )  # fmt: skip
    except KeyboardInterrupt:
        console.print(f"stopped; finished cells are in {place}; the same command resumes the sweep", markup=False)
        raise
    result({**sweeps.as_dict(summary), "notes": notes}, as_json, *summary_table(summary))
    if summary.failed:
        raise typer.Exit(FAILED)


def listing(planned: list[Planned], jobs: int, retry_failed: bool) -> tuple[dict[str, Any], list[RenderableType]]:
    """The cells of a sweep, as data and as a table."""
    from rich.table import Table
    from rich.text import Text

    from compress_evals.sweep import Board

    todo = [p for p in planned if p.state in ("new", "changed") or (retry_failed and p.state == "failed")]
    board = Board(waiting=todo, records={p.cell.id: p.record for p in planned if p.record is not None})
    left = board.seconds_left(jobs)
    rows = [
        {"id": p.cell.id, "model": p.cell.model, "recipe": p.cell.label, "seed": p.cell.seed,
         "changes": p.cell.changes, "state": p.state}
        for p in planned
    ]  # fmt: skip
    table = Table("cell", "model", "recipe", "seed", "state")
    for row in rows:
        table.add_row(*(Text(str(row[key])) for key in ("id", "model", "recipe", "seed", "state")))
    text = f"{len(planned)} cells, {len(todo)} to measure" + (f", about {duration(left)}" if left is not None else "")
    return {"cells": rows, "to_measure": len(todo), "seconds_left": left}, [table, text]


def summary_table(summary: Summary) -> list[RenderableType]:
    """A table of how every cell ended and how long it took, and a line of totals."""
    from rich.table import Table
    from rich.text import Text

    table = Table("cell", "result", "seconds", "error")
    table.columns[2].justify = "right"
    for record in summary.records:
        said = record.status + ("" if record.id in summary.ran else ", earlier")
        style = "red" if record.status == "failed" else ""
        cells = (record.id, said, f"{record.seconds:.1f}", record.error or "")
        table.add_row(*(Text(cell, style=style) for cell in cells))
    done = len(summary.records) - len(summary.failed)
    counts = f"{done} done, {len(summary.failed)} failed, {len(summary.skipped)} of these earlier"
    return [table, Text(f"{summary.out}: {counts}; {duration(summary.seconds)}")]


def standing(progress: Progress) -> str:
    """The state of a sweep in one line."""
    left = "" if progress.seconds_left is None else f", about {duration(progress.seconds_left)} left"
    failed = f", {progress.failed} failed" if progress.failed else ""
    running = f": {', '.join(progress.running)}" if progress.running else ""
    return f"{progress.done + progress.failed}/{progress.total}{failed}{left}{running}"


def line(progress: Progress) -> str:
    """How a cell ended, and the state of the sweep after it, in one line."""
    record = progress.ended
    if record is None:
        return standing(progress)
    said = f"failed: {record.error}" if record.status == "failed" else "done"
    return f"{record.id}: {said} ({record.seconds:.0f} s)  {standing(progress)}"


def duration(seconds: float) -> str:
    """A duration as `45 s`, `12 min` or `1 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
