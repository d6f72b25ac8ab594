"""`compress diff`: compares two model folders tensor by tensor, and their evaluation results task by task.

Results are looked for where `compress eval` writes them: in <folder>.eval beside the first folder it was given, in a
subfolder for each model's name.
"""

from __future__ import annotations

import math
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands.output import Json, result
from compress.errors import ArtifactError, visible

DIFFERENT = 1  # the exit code if the folders differ
SHOWN = 300  # characters of a value that are shown
HASHED = 12  # characters of a sha256 that are shown


def diff(
    a: Annotated[str, typer.Argument(help="an artifact, or any model folder")],
    b: Annotated[str, typer.Argument(help="the artifact or model folder to compare with")],
    base: Annotated[str | None, typer.Option("--base", help="for deltas: their base model")] = None,
    results: Annotated[
        tuple[Path, Path] | None,
        typer.Option(
            "--results",
            help="results of each folder, in order, or of an evaluation that has both; default: <folder>.eval",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Show how two model folders differ: tensors, config, tokenizer, recipe, versions, sizes, evaluation results.

    Exit code 0 if they are equal apart from versions, 1 if they differ.
    """
    from compress.differences import compare

    found = compare(a, b, base)
    rows, note = compared(*named(results, a, b)) if results is not None else compared_beside(a, b)
    same = found.equal and not any(row["delta"] for row in rows)
    value = {**asdict(found), "results": rows, "results_note": note, "equal": same}
    result(finite(value), as_json, *shown(found, rows, note, same))
    if not same:
        raise typer.Exit(DIFFERENT)


def result_in(evaluation: Path, folder: Path, other: Path) -> Path | None:
    """The results file of `folder` in an evaluation, if there is one and it cannot be that of the `other` folder.

    If two models have the same name, `compress eval` prefixes it with the name of the parent folder.
    """
    from compress.model.source import display_name

    names = [f"{folder.parent.name}-{folder.name}", display_name(folder)]
    own = evaluation.resolve() == folder.with_name(f"{folder.name}.eval")
    places = [evaluation / name / "results.json" for name in names[: 2 if own or other.name != folder.name else 1]]
    return next((place for place in places if place.is_file()), None)


def named(given: tuple[Path, Path], a: str, b: str) -> tuple[Path, Path]:
    """The two results that --results gives; from an evaluation of several models, the one of each folder."""
    from compress.model.source import locate

    places = [locate(folder).resolve() for folder in (a, b)]
    one, other = (result_in(held, *pair) for held, pair in zip(given, (places, places[::-1]), strict=True))
    return one or given[0], other or given[1]


def beside(a: str, b: str) -> tuple[Path, Path] | None:
    """The results that `compress eval` wrote for two folders: each beside its own, or both beside one; None if not."""
    from compress.model.source import locate

    one, other = (locate(folder).resolve() for folder in (a, b))
    ours, theirs = (folder.with_name(f"{folder.name}.eval") for folder in (one, other))
    for held, also in ((ours, theirs), (ours, ours), (theirs, theirs)):
        first, second = result_in(held, one, other), result_in(also, other, one)
        if first and second:
            return first, second
    return None


def compared_beside(a: str, b: str) -> tuple[list[dict[str, Any]], str]:
    """The comparison of the results beside two folders, and a note if there are none or they cannot be compared."""
    found = beside(a, b)
    if found is None:
        why = "not both folders have one beside them (<folder>.eval); give others with --results"
        return [], f"evaluations are not compared: {why}"
    try:
        return compared(*found)
    except ArtifactError as error:  # only a note, because the user did not ask for these results with --results
        return [], f"evaluations are not compared: {error}"


def compared(a: Path, b: Path) -> tuple[list[dict[str, Any]], str]:
    """The headline score of each task in both results, with the paired difference, and an empty note.

    Raises ArtifactError for results that are missing, damaged or not of the same questions.
    """
    for place in (a, b):
        if not (place if place.suffix == ".json" else place / "results.json").is_file():
            models = ", ".join(sorted(held.parent.name for held in place.glob("*/results.json")))
            only = f", only those of {models}" if models else ""
            raise ArtifactError(f"--results: {place}: no results.json there{only}; write one with `compress eval`")
    import compress_evals as evals

    paired = {name: task.paired for name, task in evals.compare(evals.load(a), evals.load(b)).tasks.items()}
    return [
        {"task": name, "n": p.n, "a": p.dense, "b": p.compressed, "delta": p.delta, "low": p.low, "high": p.high}
        for name, p in paired.items()
    ], ""


def finite(value: Any) -> Any:
    """The value with infinities and NaN as strings, because JSON has neither."""
    if isinstance(value, dict):
        return {key: finite(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(part) for part in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def shown(found: Any, results: list[dict[str, Any]], note: str, same: bool) -> list[Any]:
    """The tables and lines that are printed without --json."""
    from rich.markup import escape

    head = f"{found.same:,} tensors are stored with the same bytes, {len(found.tensors):,} are not"
    lines: list[Any] = [f"A = {escape(found.a)}, B = {escape(found.b)}: {head}"]
    lines += [tensors_table(found)] if found.tensors else []
    lines.append(f"bytes of tensors: {found.bytes[0]:,} and {found.bytes[1]:,}")
    for title in ("config", "files", "recipe", "calibration", "versions"):
        for key, pair in getattr(found, title).items():
            one, other = (told(value)[: HASHED if title == "files" else SHOWN] for value in pair)
            lines.append(escape(f"{title}: {visible(key)}: {one} and {other}"))
    if found.errors:
        lines.append(f"output errors differ at {len(found.errors):,} sites; --json lists them")
    lines += [results_table(results)] if results else [note]
    return [*lines, "[green]equal[/]" if same else "[yellow]different[/]"]


def told(value: Any) -> str:
    """A value of a config or a recipe as text: a pass as `name(option=value)`, None as `absent`."""
    if isinstance(value, dict) and len(value) == 1 and isinstance(options := next(iter(value.values())), dict):
        return visible(f"{next(iter(value))}({', '.join(f'{key}={held}' for key, held in options.items())})")
    return "absent" if value is None else visible(str(value))


def tensors_table(found: Any) -> Any:
    """The table of the tensors that differ."""
    from rich.markup import escape
    from rich.table import Table

    table = Table(title="tensors that differ")
    for name in ("tensor", "how", "A", "B", "bits A", "bits B", "error", "masks agree"):
        left = name in ("tensor", "how", "A", "B")
        table.add_column(name, justify="left" if left else "right", overflow="fold")
    for row in found.tensors:
        forms = [escape(form or "-") for form in row.forms]
        if row.where == "another shape":
            forms = [f"{form} {list(shape)}" for form, shape in zip(forms, row.shapes, strict=True)]
        bits = ["-" if count is None else f"{count:.2f}" for count in row.bits]
        error = "-" if row.error is None else f"{row.error:.4g}"
        table.add_row(row.name, row.where, *forms, *bits, error, "-" if row.mask is None else f"{row.mask:.1%}")
    return table


def results_table(results: list[dict[str, Any]]) -> Any:
    """The table of the tasks in both results."""
    from rich.table import Table

    table = Table(title="evaluations: the headline of each task; B less A with its 95 % interval")
    for name in ("task", "questions", "A", "B", "B - A", "interval"):
        table.add_column(name, justify="left" if name == "task" else "right")
    for row in results:
        numbers = (f"{row['a']:.4f}", f"{row['b']:.4f}", f"{row['delta']:+.4f}")
        table.add_row(row["task"], str(row["n"]), *numbers, f"{row['low']:+.4f} to {row['high']:+.4f}")
    return table
