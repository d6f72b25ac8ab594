"""Reads a sweep file (models, recipes with axes, and seeds) into cells, and reports all errors of the file at once.

YAML is parsed as for recipes. Not here: running the cells (`running.py`). A cell's `id` is the name of its folder and
of its model in results; it depends only on the cell's own line, so that adding lines, seeds or models renames nothing.
"""

from __future__ import annotations

import copy
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from itertools import product
from math import prod
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from compress.errors import CompressError, RecipeError, nearest, why
from compress.model.source import BUILTIN, locate
from compress.options import build, check_options
from compress.recipe import Recipe, from_dict, packaged, parse, put
from compress_evals.folders import model_name
from compress_evals.suite import find as find_suite

KEYS = ("models", "seeds", "eval", "cells")
INLINE = tuple(f.name for f in fields(Recipe) if f.name not in ("model", "accept"))
MOST = 10_000  # cells; more are taken for a mistake in an axis
LONGEST = 100  # characters of an id; longer folder names break archives


@dataclass(frozen=True, kw_only=True)
class Asked:
    """The evaluation options of every cell, as in `compress eval`; paths are relative to the sweep file."""

    suite: Annotated[str, Field(description="suite of tasks")] = "facts"
    tasks: Annotated[list[str] | None, Field(min_length=1, description="only these tasks of the suite")] = None
    data_dir: Annotated[str | None, Field(description="folder with the suite's data")] = None
    online: Annotated[bool, Field(description="allow downloading data from the hub")] = False
    limit: Annotated[int | None, Field(ge=4, description="questions per task, a fixed sample")] = None
    margin: Annotated[float, Field(ge=0, le=1, description="largest relative loss that counts as matching")] = 0.05
    seed: Annotated[int, Field(ge=0, description="seed of samples and bootstraps")] = 0
    text: Annotated[str | None, Field(description="UTF-8 file for bits per byte and KL; default: built-in")] = None
    batch_size: Annotated[int | Literal["auto"], Field(description="batch size")] = "auto"
    chat_template: Annotated[bool, Field(description="put prompts through the tokenizer's chat template")] = False
    speed: Annotated[bool, Field(description="also time generation beside the dense model")] = False
    noise: Annotated[int, Field(ge=0, description="questions per task that the dense model is asked twice")] = 0

    def __post_init__(self) -> None:
        check_options(self, "eval")
        find_suite(self.suite).chosen(self.tasks)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement: a recipe on a model with a seed.

    `label` names its recipe; `changes` holds the values that the sweep set in it, by dotted path; `source` is the
    folder of the model, or `builtin`.
    """

    id: str
    name: str
    model: str
    source: str
    label: str
    seed: int
    changes: dict[str, Any]
    recipe: Recipe


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """All cells in order; `text` is the content of the file, `notes` mention cells that are measured only once."""

    text: str
    asked: Asked
    cells: tuple[Cell, ...]
    notes: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One recipe of one line of the file, before it is crossed with models and seeds."""

    where: str
    name: str
    label: str
    changes: dict[str, Any]
    recipe: Recipe


def load(path: str | Path) -> Sweep:
    """The sweep in a file; raises RecipeError with all errors of the file, each with its place."""
    place = Path(path)
    try:
        text = place.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{place}: cannot be read: {why(error)}") from error
    data = parse(text, str(place))
    faults: list[str] = []
    with noting(faults):
        check_keys(data, KEYS, "sweep")
    data = data if isinstance(data, Mapping) else {}
    models, seeds, asked, variants = {"builtin": "builtin"}, [0], Asked(), []
    with noting(faults):
        models = read_models(data.get("models", ["builtin"]), place.parent)
    with noting(faults):
        seeds = read_seeds(data.get("seeds", [0]))
    with noting(faults):
        asked = read_asked(data.get("eval", {}), place.parent)
    with noting(faults):
        for i, entry in enumerate(listed(data.get("cells"), "cells")):
            with noting(faults):
                variants += read_entry(entry, f"cells[{i}]", place.parent, faults)
    cells, notes = crossed(variants, models, seeds, faults)
    if faults:
        count = f" {len(faults)} errors:" if len(faults) > 1 else ""
        raise RecipeError(f"{place}:{count} {'; '.join(map(str, faults))}")
    return Sweep(text=text, asked=asked, cells=cells, notes=notes)


@contextmanager
def noting(faults: list[str]) -> Iterator[None]:
    """Catch a CompressError and append its message to `faults`, so that reading can continue."""
    try:
        yield
    except CompressError as error:
        faults.append(str(error))


def check_keys(data: Any, allowed: Sequence[str], where: str) -> None:
    """Raise RecipeError unless `data` is a mapping with only the allowed keys."""
    if not isinstance(data, Mapping):
        raise RecipeError(f"{where}: expected a mapping with {', '.join(f'`{key}`' for key in allowed)}, got {data!r}")
    for key in data:
        if key not in allowed:
            raise RecipeError(f"{where}: unknown key {key!r}{nearest(str(key), allowed)}")


def listed(value: Any, where: str) -> list[Any]:
    """The value, if it is a list of at least one item; raises RecipeError for anything else."""
    if not isinstance(value, list) or not value:
        raise RecipeError(f"{where}: expected a list of at least one item, got {value!r}")
    return value


def read_models(value: Any, folder: Path) -> dict[str, str]:
    """The folder of each model, by name; folders are relative to the sweep file."""
    found: dict[str, str] = {}
    for i, model in enumerate(listed(value, "models")):
        if not isinstance(model, str) or not model:
            raise RecipeError(f"models[{i}]: expected a folder or `builtin`, got {model!r}")
        source = model if model == "builtin" else str((folder / Path(model).expanduser()).resolve())
        if source != "builtin" and locate(source) == BUILTIN.resolve():
            source = "builtin"
        locate(source)
        name = model_name(source)
        if name in found:
            raise RecipeError(f"models[{i}]: two models are called {name!r}; results could not be told apart")
        found[name] = source
    return found


def read_seeds(value: Any) -> list[int]:
    """The seeds without duplicates; raises RecipeError for anything that is not a whole number from 0."""
    for i, seed in enumerate(listed(value, "seeds")):
        if not isinstance(seed, int) or isinstance(seed, bool) or seed < 0:
            raise RecipeError(f"seeds[{i}]: expected a whole number of at least 0, got {seed!r}")
    return list(dict.fromkeys(value))


def read_asked(value: Any, folder: Path) -> Asked:
    """The evaluation options, with absolute paths; raises RecipeError for a path that does not exist."""
    asked: Asked = build(Asked, value, "eval")
    for key in ("text", "data_dir"):
        if (given := getattr(asked, key)) is not None:
            path = (folder / Path(given).expanduser()).resolve()
            if not path.exists():
                raise RecipeError(f"eval.{key}: {path} does not exist")
            if key == "data_dir" and not path.is_dir():
                raise RecipeError(f"eval.{key}: {path} is not a folder")
            whole: dict[str, Any] = {key: str(path)}
            asked = replace(asked, **whole)
    return asked


def read_entry(entry: Any, where: str, folder: Path, faults: list[str]) -> list[Variant]:
    """The recipes of one line: one for each combination of the values of its axes."""
    entry = {"recipe": entry} if isinstance(entry, str) else entry
    check_keys(entry, ("name", "recipe", "set", *INLINE), where)
    name = entry.get("name")
    if not (name is None or (isinstance(name, str) and name.strip())):
        raise RecipeError(f"{where}.name: expected a text, got {name!r}")
    data, label = recipe_data(entry, where, folder)
    axes = read_axes(entry.get("set", {}), f"{where}.set")
    told = [path for path in axes if name is None or isinstance(entry["set"][path], list)]  # a name covers the rest
    if prod(map(len, axes.values())) > MOST:
        raise RecipeError(f"{where}.set: more than {MOST} combinations")
    found = []
    for values in product(*axes.values()):
        changes = dict(zip(axes, values, strict=True))
        called = " ".join([name or label, *(f"{short(path, told)}={word(changes[path])}" for path in told)])
        with noting(faults):
            recipe = changed(data, changes, f"{where} ({called})")
            found.append(Variant(where=where, name=called, label=label, changes=changes, recipe=recipe))
    return found


def recipe_data(entry: Mapping[str, Any], where: str, folder: Path) -> tuple[Any, str]:
    """The recipe of a line as data, and its name; it is in a file, packaged, or written in the line itself."""
    inline = {key: entry[key] for key in INLINE if key in entry}
    if ("recipe" in entry) == bool(inline):
        raise RecipeError(f"{where}: give either `recipe` (with `set` for changes) or `passes`")
    if inline:
        if "name" not in entry:
            raise RecipeError(f"{where}: an inline recipe needs a `name`")
        return inline, str(entry["name"])
    path = find(entry["recipe"], folder, where)
    try:
        return parse(path.read_text(encoding="utf-8"), f"{where}.recipe: {path.name}"), path.stem
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{where}.recipe: {path} cannot be read: {why(error)}") from error


def find(recipe: Any, folder: Path, where: str) -> Path:
    """The path of a recipe: relative to the sweep file, or packaged; the current folder is never searched."""
    if not isinstance(recipe, str) or not recipe or "\0" in recipe:
        raise RecipeError(f"{where}.recipe: expected a file or the name of a packaged recipe, got {recipe!r}")
    known = packaged()
    named = known.get(Path(recipe).name.removesuffix(".yaml")) if Path(recipe).parent == Path() else None
    for path in (folder / recipe, *([named] if named else [])):
        try:
            if path.is_file():
                return path
        except OSError as error:  # for example, a name that is too long
            raise RecipeError(f"{where}.recipe: no file at {recipe[:60]!r}: {error.strerror}") from error
    hint = nearest(Path(recipe).stem, known, "; `compress recipes` lists those that are packaged")
    raise RecipeError(f"{where}.recipe: no recipe file at {recipe!r}{hint}")


def read_axes(value: Any, where: str) -> dict[str, list[Any]]:
    """The values of each axis, by dotted path; a single value becomes an axis with one value."""
    if not isinstance(value, Mapping):
        raise RecipeError(f"{where}: expected paths such as passes.0.sparsity with a value or a list, got {value!r}")
    for path, values in value.items():
        if not isinstance(path, str):
            raise RecipeError(f"{where}: {path!r} is not a path such as passes.0.sparsity")
        if path in ("model", "calibration.seed"):
            raise RecipeError(
                f"{where}.{path}: must be set by `{'models' if path == 'model' else 'seeds'}` of the sweep"
            )
        if values == []:
            raise RecipeError(f"{where}.{path}: is an empty list")
    return {path: values if isinstance(values, list) else [values] for path, values in value.items()}


def changed(data: Any, changes: Mapping[str, Any], where: str) -> Recipe:
    """The recipe with the changes applied; errors are raised as RecipeError with `where` in front."""
    mine = copy.deepcopy(data)
    try:
        for path, value in changes.items():
            put(mine, path, value, f"set.{path}")
        recipe = from_dict(mine)
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from error
    if recipe.accept:
        raise RecipeError(f"{where}: accept: a sweep measures every cell and tests no conditions; set `accept: null`")
    return recipe


def short(path: str, among: Sequence[str]) -> str:
    """The last part of a path, or the path without `passes.` if another one ends in the same way."""
    ends = Counter(other.rpartition(".")[2] for other in among)
    end = path.rpartition(".")[2]
    return end if ends[end] == 1 else path.removeprefix("passes.")


def word(value: Any) -> str:
    """A value as it is written in YAML."""
    return value if isinstance(value, str) else json.dumps(value)


def crossed(
    variants: Sequence[Variant], models: Mapping[str, str], seeds: Sequence[int], faults: list[str]
) -> tuple[tuple[Cell, ...], tuple[str, ...]]:
    """The cells of every recipe on every model with every seed; duplicates are dropped and noted."""
    cells: dict[tuple[str, str], Cell] = {}
    taken = {model.casefold() for model in models}  # results are distinguished by name only
    notes = []
    if len(variants) * len(models) * len(seeds) > MOST:
        raise RecipeError(f"cells: more than {MOST}")
    for variant, (i, (model, source)), seed in product(variants, enumerate(models.items()), seeds):
        parts = [variant.name, *([f"seed={seed}"] if seed else []), *([f"of {model}"] if i else [])]
        recipe = replace(variant.recipe, model=None, calibration=replace(variant.recipe.calibration, seed=seed))
        identity = (source, json.dumps(recipe.to_dict(), sort_keys=True))
        name, called = " ".join(parts), slug(" ".join(parts))
        if identity in cells:
            notes.append(f"{variant.where} ({name}) is the same as {cells[identity].id}: measured once")
            continue
        if called.casefold() in taken:
            faults.append(f"{variant.where} ({name}): another cell or model is called {called!r}; give it a `name`")
        if not 0 < len(called) <= LONGEST:
            faults.append(f"{variant.where} ({name}): a name of {len(called)} characters; give it one of at most "
                          f"{LONGEST} with letters or digits")  # fmt: skip
        taken.add(called.casefold())
        cells[identity] = Cell(
            id=called, name=name, model=model, source=source, label=variant.label, seed=seed, changes=variant.changes,
            recipe=recipe,
        )  # fmt: skip
    return tuple(cells.values()), tuple(notes)


def slug(name: str) -> str:
    """A name made safe for folders: `wanda sparsity=2:4` becomes `wanda-sparsity=2of4`."""
    return re.sub(r"[^A-Za-z0-9._=+-]+", "-", re.sub(r"(?<=\d):(?=\d)", "of", name)).strip("-.")
