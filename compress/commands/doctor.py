"""`compress doctor`: reports on the installation and the machine, or packs a bundle for a bug report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from compress.commands.output import Json, result
from compress.errors import ArtifactError, CompressError, RecipeError

if TYPE_CHECKING:
    from compress.recipe import Recipe


def doctor(
    folder: Annotated[Path | None, typer.Argument(help="with --bundle: an artifact, or a run's partial folder")] = None,
    bundle: Annotated[Path | None, typer.Option("--bundle", help="zip file to write, for a bug report")] = None,
    log: Annotated[Path | None, typer.Option("--log", help="with --bundle: the events that `run --log` wrote")] = None,
    model: Annotated[
        str | None, typer.Option("--model", help="with --bundle: the dense model, to include a plan")
    ] = None,
    as_json: Json = False,
) -> None:
    """Describe this installation and machine, what is missing, and what that would enable; or pack a bug report."""
    from compress import doctor as doctors

    spare = [name for name, value in (("folder", folder), ("--log", log), ("--model", model)) if value is not None]
    if bundle is None and spare:
        raise RecipeError(f"{spare[0]}: is used only with --bundle; add --bundle FILE.zip")
    if bundle is None:
        found = doctors.examine()
        result(found, as_json, *shown(found), *doctors.missing(found))
        return
    if folder is None:
        raise RecipeError("--bundle: give the folder of an artifact, or the partial folder of a run")
    plan, without = (None, "") if model is None else plan_of(folder, model)
    names = doctors.bundle(bundle, folder, log, plan)
    line = f"{bundle}: {', '.join(names)}; no weights, no tokens, your home directory is `~`; look before you send it"
    value = {"bundle": str(bundle), "files": names, **({"no_plan": without} if without else {})}
    result(value, as_json, *([f"the plan is left out: {escape(without)}"] if without else []), escape(line))


def plan_of(folder: Path, model: str) -> tuple[dict[str, Any] | None, str]:
    """The plan of the recipe of an artifact, or of the run in a partial folder; if there is none, None and why."""
    from compress.commands.plan import value_of
    from compress.model.source import locate
    from compress.planning import plan_run

    locate(model)  # raises for a wrong model name, which must not be reported as a missing plan
    try:
        return value_of(plan_run(model, recipe_of(folder))), ""
    except CompressError as error:  # a bug report may well be about something damaged
        return None, str(error)


def recipe_of(folder: Path) -> Recipe:
    """The recipe that an artifact or the partial folder of a run records, in which paths are reduced to names."""
    from compress.artifact import PROVENANCE
    from compress.identity import recipe_in
    from compress.journal import IDENTITY, read
    from compress.model.source import read_json
    from compress.recipe import from_dict, parse

    if (folder / PROVENANCE).is_file() or not (folder / IDENTITY).is_file():
        held = read_json(folder / PROVENANCE, "the provenance file")
        return from_dict(parse(str(held.get("recipe")), "the recipe of the artifact"))
    try:
        return from_dict(recipe_in(dict(read(folder / IDENTITY))))
    except (TypeError, ValueError) as error:
        raise ArtifactError(f"{folder / IDENTITY}: is damaged") from error


def shown(found: dict[str, Any]) -> list[Any]:
    """The lines that are printed without --json."""
    from compress.console import size

    system, memory, disk = found["system"], found["memory"], found["disk"]
    free = "not known" if memory["free"] is None else size(memory["free"])
    there = [f"{row['package']} {row['version']}" for row in found["optional"] if row["version"]]
    lines = [
        ", ".join(f"{name} {number}" for name, number in found["versions"].items()),
        f"{system['platform']}: {system['cpu']}, {system['usable_cores']} of {system['cores']} cores, "
        f"{system['threads']} threads",
        f"memory free: {free}; disk free: {size(disk['free'])} in {disk['folder']}",
        *(f"GPU: {gpu['name']}, {size(gpu['free'])} of {size(gpu['total'])} free" for gpu in found["gpus"]),
        f"optional, installed: {', '.join(there) or 'none'}",
        *(
            f"{row['profile']} profile of {row['device']}: {row['state']}"
            for row in found["profiles"]
            if row["state"] != "none" and not row["state"].startswith("damaged")
        ),
    ]
    return lines
