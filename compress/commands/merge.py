"""`compress merge`: merges several fine-tunes of one base into one ordinary model folder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from compress.commands.output import Json, out_option, result, screen, spoken
from compress.errors import RecipeError, nearest

Number = float | None  # the type of an option that only some methods have


@spoken(
    {
        "method": "--method",
        "weights": "--weights",
        "calibration.data": "--data",
        "calibration.samples": "--samples",
        "calibration.length": "--length",
    }
)
def merge(
    base: Annotated[str, typer.Argument(help="folder of the model that all were tuned from, or `builtin`")],
    models: Annotated[list[str], typer.Argument(help="fine-tunes or compressed deltas: FOLDER, or NAME=FOLDER")],
    out: Annotated[Path, out_option()],
    method: Annotated[
        str, typer.Option(help="average, breadcrumbs, dare-linear, dare-ties, della, regmean, task-arithmetic, ties")
    ] = "task-arithmetic",
    weights: Annotated[
        list[str] | None,
        typer.Option(
            "--weights", help="NAME=0.5, or NAME:GLOB=0.5 for some tensors; later ones take precedence; repeatable"
        ),
    ] = None,
    scale: Annotated[
        Number, typer.Option("--scale", help="factor applied to the merged change (lambda in the papers)")
    ] = None,
    density: Annotated[Number, typer.Option(help="share of each model's change that is kept")] = None,
    scope: Annotated[
        str | None, typer.Option(help="ties: compare entries within the whole `model` or within each `tensor`")
    ] = None,
    epsilon: Annotated[Number, typer.Option(help="della: half the width of the range of keep probabilities")] = None,
    gamma: Annotated[Number, typer.Option(help="breadcrumbs: share of the largest entries that is dropped")] = None,
    shrink: Annotated[
        Number, typer.Option(help="regmean: fraction by which the Gram's off-diagonal entries are reduced")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="seed of the random drops")] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="regmean: calibration text, or NAME=text of one model")
    ] = None,
    samples: Annotated[int | None, typer.Option(help="regmean: calibration windows of each model")] = None,
    length: Annotated[int | None, typer.Option(help="regmean: tokens per calibration window")] = None,
    device: Annotated[str, typer.Option(help="regmean: where the models run: cpu, cuda, cuda:1")] = "cpu",
    as_json: Json = False,
) -> None:
    """Merge fine-tunes of one base into an ordinary model folder, tensor by tensor."""
    from compress.console import escape
    from compress.merging import merge as run
    from compress.model.memory import release_early

    release_early()
    said: dict[str, Any] = {"scale": scale, "density": density, "scope": scope, "epsilon": epsilon, "gamma": gamma,
            "shrink": shrink, "seed": seed}  # fmt: skip
    given = {name: value for name, value in said.items() if value is not None}
    tokens = {"--data": data or None, "--samples": samples, "--length": length}
    called = options_of(method, given, [option for option, value in tokens.items() if value is not None])
    named = folders(models)
    console = screen()
    with spoken(called), console.status("opening") as status:
        done = run(
            base,
            named,
            out,
            method=method,
            weights=weights_of(weights or []),
            calibration=calibrations(data or [], samples, length, list(named)),
            device=device,
            on_progress=status.update if console.is_terminal else lambda text: None,
            **given,
        )
    kept = ", ".join(f"{name} {done.kept[name]:,} of {changed:,}" for name, changed in done.changed.items())
    result(
        {**asdict(done), "out": str(done.out)},
        as_json,
        escape(f"{done.out}: {done.bytes:,} bytes; entries kept: {kept}"),
    )


def options_of(method: str, given: Mapping[str, Any], tokens: list[str]) -> dict[str, str]:
    """The command-line options of a method, by the names that errors use; empty if the method is unknown.

    Raises RecipeError for one of `given` that the method does not have, and for any of `tokens` (options about
    calibration text) if the method reads none.
    """
    from compress.merging import METHODS
    from compress.merging.regmean import RegMean

    if method not in METHODS:
        return {}
    known = {field.name: f"--{field.name}" for field in fields(METHODS[method])}
    for name in given:
        if name not in known:
            has = f"it has {', '.join(known.values())}" if known else "it has none"
            raise RecipeError(f"--{name}: {method} has no such option; {has}")
    if tokens and METHODS[method] is not RegMean:
        raise RecipeError(f"{tokens[0]}: {method} uses no calibration data; only regmean does")
    return {f"merge.{method}.{name}": option for name, option in known.items()}


def folders(models: list[str]) -> dict[str, str]:
    """The folders that the command line lists, by name; raises RecipeError if a name is empty or given twice."""
    from compress.model.source import display_name, locate

    found: dict[str, str] = {}
    for text in models:
        name, equals, folder = text.partition("=")
        if not equals or "/" in name or Path(text).exists():
            name, folder = display_name(locate(text)), text
        if not name:
            raise RecipeError(f"models: {text!r} has no name before the =; give FOLDER, or NAME=FOLDER")
        if name in found:
            raise RecipeError(f"models: two are called {name!r}; name them, as in one=FOLDER two=FOLDER")
        found[name] = folder
    return found


def weights_of(texts: list[str]) -> dict[str, dict[str, float]]:
    """The weights by model and glob that `NAME=0.5` and `NAME:GLOB=0.5` give; raises RecipeError for anything else."""
    found: dict[str, dict[str, float]] = {}
    for text in texts:
        left, _, number = text.rpartition("=")
        name, colon, glob = left.partition(":")
        try:
            weight = float(number)
        except ValueError:
            name = ""
        if not name or (colon and not glob):
            raise RecipeError(f"--weights: {text!r} is not NAME=NUMBER or NAME:GLOB=NUMBER")
        rules = found.setdefault(name, {})
        rules.pop(glob or "*", None)  # re-insert at the end, because the last match counts
        rules[glob or "*"] = weight
    return found


def calibrations(data: list[str], samples: int | None, length: int | None, names: list[str]) -> Any:
    """The calibration of each model by name; None if no option was given.

    Raises RecipeError for a name that no model has.
    """
    from compress.recipe import Calibration

    if not data and samples is None and length is None:
        return None
    said: dict[str, Any] = {"samples": samples, "length": length}
    common = {key: value for key, value in said.items() if value is not None}
    found = dict.fromkeys(names, Calibration(**common))
    for text in data:
        name, equals, source = text.partition("=")
        if equals and name not in names:
            raise RecipeError(f"--data: no model is called {name!r}{nearest(name, names)}")
        for each in [name] if equals else names:
            found[each] = Calibration(data=source if equals else text, **common)
    return found
