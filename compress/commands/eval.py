"""`compress eval`: measures what a compressed model still knows, compared with its dense original."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from compress.commands.output import Json, out_option, quiet_loading, result, screen, spoken
from compress.errors import AcceptanceError, RecipeError, why

Suite = Annotated[str, typer.Option("--suite", help="facts (built in), kick, or kick_mini (200 questions per task)")]
DataDir = Annotated[
    Path | None, typer.Option("--data-dir", help="folder with the data of kick, laid out as its manifest.json says")
]
Online = Annotated[bool, typer.Option("--online", help="download from the hub what the data folder lacks")]


@spoken({"suite": "--suite", "tasks": "--tasks"})
def evaluate(
    folders: Annotated[list[Path], typer.Argument(help="compressed model folders")],
    base: Annotated[str | None, typer.Option(help="the dense model; default: what the artifact was made from")] = None,
    delta_base: Annotated[
        str | None, typer.Option(help="base model of the deltas among the folders; default: builtin, for deltas of it")
    ] = None,
    out: Annotated[Path | None, out_option("<folder>.eval", what="folder for the results and report.html")] = None,
    suite: Suite = "facts",
    data_dir: DataDir = None,
    online: Online = False,
    tasks: Annotated[str | None, typer.Option("--tasks", help="only these tasks, separated by commas")] = None,
    limit: Annotated[int | None, typer.Option(min=4, help="use a fixed sample of this many questions per task")] = None,
    margin: Annotated[
        float,
        typer.Option(
            min=0, max=1, help="share of the dense score by which a task may differ and still count as matching"
        ),
    ] = 0.05,
    accept: Annotated[
        list[str] | None,
        typer.Option(
            "--accept",
            help="exit with 5 unless every task meets it: 'drop<=0.02@95%', or 'FAMILY:drop<=...'; repeatable",
        ),
    ] = None,
    noise: Annotated[
        int,
        typer.Option(min=0, help="questions per task that the dense model answers twice, to measure noise; 0: none"),
    ] = 200,
    speed: Annotated[bool, typer.Option("--speed", help="also time generation, compared with the dense model")] = False,
    batch_size: Annotated[str, typer.Option(help="questions at once: a number, or auto for as many as fit")] = "auto",
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="format every prompt with the dense model's chat template")
    ] = False,
    cache: Annotated[
        Path | None, typer.Option(help="folder in which measurements are cached; default: OUT/cache")
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="measure again, ignoring the cache")] = False,
    text: Annotated[Path | None, typer.Option(help="UTF-8 text for bits per byte and KL; default: built-in")] = None,
    seed: Annotated[int, typer.Option(min=0, help="seed of question samples and bootstraps")] = 0,
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    as_json: Json = False,
) -> None:
    """Measure what compressed models still know, compared with their dense original, with confidence intervals.

    If it was interrupted, the same command resumes it.
    """
    import compress

    compress.require_evals()
    quiet_loading()
    import compress_evals as evals
    from compress_evals.batching import parse
    from compress_evals.conditions import broken, parse_all

    only = None if tasks is None else names(tasks)
    conditions, size = parse_all(accept or [], suite, only), parse(batch_size)
    first = folders[0].resolve()
    target = out if out is not None else first.with_name(f"{first.name}.eval")
    prose = None if text is None else read_text(text)
    with watching(screen()) as meter:
        results = evals.evaluate_folders(
            folders, base, delta_base=delta_base, suite=suite, data_dir=data_dir, online=online,
            only=only, limit=limit, margin=margin,
            noise=noise, speed=speed, batch_size=size, chat_template=chat_template, cache=cache, fresh=fresh,
            conditions=conditions, text=prose, seed=seed, device=device, out=target, meter=meter,
        )  # fmt: skip
    value = {"out": str(target), "results": [json.loads(found.model_dump_json(by_alias=True)) for found in results]}
    result(value, as_json, *shown(results), escape(f"report: {target}/report.html"))
    failures = [line for found in results[1:] for line in broken(found, conditions)]
    if failures:
        raise AcceptanceError(f"{target} is written, but not accepted: {'; '.join(failures)}")


def names(tasks: str) -> list[str]:
    """The task names that --tasks lists; raises RecipeError if there is none, or an empty one."""
    found = [name.strip() for name in tasks.split(",")]
    if not all(found):
        what = f"{tasks!r} has an empty name" if any(found) else "is empty"
        raise RecipeError(f"--tasks: {what}; give task names separated by commas")
    return found


def shown(results: list[Any]) -> list[Any]:
    """The tables and sentences that are printed without --json, model by model."""
    import compress_evals as evals
    from compress.console import quality_table
    from compress_evals.report import caveats, noise_line, speed_line

    dense, *others = results
    rows = evals.table_rows(results)
    parts: list[Any] = list(map(escape, caveats(dense, others)))
    for found in others:
        mine = [row for row in rows if row.model == found.model.name]
        parts.append(quality_table(mine, f"{found.model.name} against {dense.model.name}"))
        lines = (noise_line(dense, found), evals.fidelity_line(found), speed_line(found), *found.vs.notes)
        parts += [escape(line) for line in lines if line]
    return parts


@contextmanager
def watching(console: Console) -> Iterator[Any]:
    """A meter that shows progress: a bar with the time left on a terminal, otherwise one line per task."""
    from rich.progress import BarColumn, Progress, TextColumn

    from compress_evals.progress import Meter, Step, duration

    if not console.is_terminal:
        yield Meter(lambda line: console.print(line, markup=False))
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TextColumn("{task.fields[left]}"))
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task("loading", total=1.0, left="")

        def step(at: Step) -> None:
            time_left = "" if at.seconds_left is None else f", {duration(at.seconds_left)}"
            doing = f"{at.model}: {at.number}/{at.of} {at.task}"
            bar.update(task, description=doing, completed=at.share, left=f"{at.questions_left:,} questions{time_left}")

        yield Meter(step=step, note=lambda line: console.print(line, markup=False))


def read_text(path: Path) -> str:
    """The text of a file; raises RecipeError if it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--text: {path} cannot be read: {why(error)}") from error
