"""What a sweep leaves on disk: `cell.json` of each cell, the key that says whether it still holds, and the lock.

A key covers what a result depends on: the recipe with every option, the model's weights, config and tokenizer, those
of a delta's base, calibration text that is a file, what was asked with the text and data it names, and our version.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import IO, Any, Literal

import compress
from compress.errors import RecipeError
from compress.model.source import digest, locate
from compress.options import build, check_options
from compress.partial import put
from compress_evals.data import available
from compress_evals.folders import describe
from compress_evals.questions import code
from compress_evals.suite import find
from compress_evals.sweep.grid import Asked, Cell, Sweep

DESCRIBING = (".json", ".model", ".txt", ".jinja")  # of a model folder: config, tokenizer, chat template
RECORD, LOG = "cell.json", "log.txt"
PATIENCE = 10.0  # seconds: what a killed sweep was running ends by itself, but not while it still imports
State = Literal["new", "changed", "done", "failed"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """`cell.json`: how a cell ended; `seconds` are those of its process."""

    schema: Literal[1] = 1
    id: str
    model: str
    recipe: str
    seed: int
    changes: dict[str, Any]
    status: Literal["done", "failed"]
    error: str | None = None
    seconds: float
    key: str

    def __post_init__(self) -> None:
        check_options(self, "cell")


@dataclass(frozen=True, kw_only=True)
class Planned:
    """A cell, and what is known of it from earlier: `changed` if its record is of something else."""

    cell: Cell
    key: str
    state: State
    record: Record | None


def plan(sweep: Sweep, out: str | Path, device: str = "cpu") -> list[Planned]:
    """Every cell of a sweep, and whether `out` holds its result already. Reads each model and text once."""
    model, text = cache(model_digest), cache(text_digest)
    found = []
    for cell in sweep.cells:
        delta = cell.recipe.delta
        read = [model(cell.source), "" if delta is None else model(delta.base), text(cell.recipe.calibration.data)]
        key, record = key_of(cell, read, sweep, device), read_record(Path(out) / "cells" / cell.id)
        state: State = "new" if record is None else record.status if record.key == key else "changed"
        found.append(Planned(cell=cell, key=key, state=state, record=record))
    return found


def key_of(cell: Cell, read: Sequence[str], sweep: Sweep, device: str) -> str:
    """The sha256 of all that the result of a cell depends on; `read` are those of the files that its recipe names."""
    parts = [cell.recipe.to_dict(), *read, asdict(sweep.asked), suite_digest(sweep.asked.suite), device]
    parts += [compress.__version__, *files_digest(sweep.asked)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def model_digest(model: str) -> str:
    """The sha256 of a model's weights and of whatever else in its folder says how it reads and what it computes."""
    folder = locate(model)
    described = sorted(path for path in folder.iterdir() if path.suffix in DESCRIBING and path.is_file())
    told = [describe(folder)["sha"], *([path.name, digest(path)] for path in described)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def text_digest(data: str) -> str:
    """The sha256 of calibration text that is a file or a folder of files; empty for what only has a name."""
    path = Path(data)
    try:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        told = [[str(file.relative_to(path)), digest(file)] for file in files]
    except (OSError, ValueError):  # no path at all; one that cannot be read fails in its cell
        return ""
    return hashlib.sha256(json.dumps(told).encode()).hexdigest() if told else ""


def files_digest(asked: Asked) -> list[str]:
    """The sha256s of the files that a sweep names, its text and its data; none if it names none.

    Raises ArtifactError for data that are damaged.
    """
    found = [] if asked.text is None else [digest(Path(asked.text))]
    if asked.data_dir is not None:
        for task in find(asked.suite).chosen(asked.tasks):
            had = available(task.needs, Path(asked.data_dir), online=False) if task.needs else ""
            found.append(had if isinstance(had, str) else had.sha256)
    return found


@cache
def suite_digest(name: str) -> str:
    """The sha256 of what a suite asks, and how it scores; the data read have hashes of their own in results."""
    suite = find(name)
    return hashlib.sha256(json.dumps([[task.name for task in suite.tasks], code(suite)]).encode()).hexdigest()


def read_record(folder: Path) -> Record | None:
    """The record in the folder of a cell; None if there is none that can be read, so that the cell is measured."""
    try:
        return build(Record, json.loads((folder / RECORD).read_text(encoding="utf-8")), "cell")
    except (OSError, ValueError, RecipeError):
        return None


def write_record(folder: Path, record: Record) -> None:
    """Put the record in place at once."""
    replace_text(folder / RECORD, json.dumps(asdict(record), indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Write a file so that it is whole or as before."""
    put(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def strangers(out: Path, cells: Sequence[Cell]) -> list[str]:
    """Folders of cells that the sweep no longer has."""
    known = {cell.id for cell in cells}
    return sorted(path.parent.name for path in (out / "cells").glob(f"*/{RECORD}") if path.parent.name not in known)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Hold the folder of a sweep; the lock goes with the process that holds it, whatever ended that.

    Raises RecipeError if another sweep holds it or has left a cell running, or if the folder cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        file = (out / "lock").open("a+", encoding="utf-8")
    except OSError as error:
        raise RecipeError(f"--out: {out} cannot be written: {error.strerror}") from error
    with file:
        until = time.monotonic() + PATIENCE
        while not held(file) or any(map(busy, out.glob(f"cells/*/{LOG}"))):
            if time.monotonic() > until:
                file.seek(0)
                raise RecipeError(f"--out: another sweep is running in {out} (process {file.read().strip() or '?'})")
            time.sleep(0.1)
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


def busy(path: Path) -> bool:
    """Whether somebody holds a file, as a cell its log; raises RecipeError if it cannot be opened to see that."""
    try:
        with path.open("r+", encoding="utf-8") as file:  # which makes none
            return not held(file)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RecipeError(f"--out: {path} cannot be written: {error.strerror}") from error


def held(file: IO[str]) -> bool:
    """Whether the lock could be had."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
