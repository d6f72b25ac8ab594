"""The state of a sweep on disk: `cell.json` of each cell, the key that says whether it is still valid, and the lock.

A key covers everything that a result depends on: the recipe with every option; the model's weights, config and
tokenizer, and those of a delta's base; calibration text that is a file; the evaluation options, with the text, data and
suite code they name; the device; our own code and that of passes of others; and the versions of what computes.
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

from compress.errors import RecipeError
from compress.identity import foreign_code, others, versions
from compress.model.source import digest, locate
from compress.options import build, check_options
from compress.partial import put
from compress_evals.data import available
from compress_evals.folders import describe
from compress_evals.questions import code
from compress_evals.subject import software
from compress_evals.suite import find
from compress_evals.sweep.grid import Asked, Cell, Sweep

DESCRIBING = (".json", ".model", ".txt", ".jinja")  # files of a model folder: config, tokenizer, chat template
RECORD, LOG = "cell.json", "log.txt"
PATIENCE = 10.0  # seconds; cells of a killed sweep end by themselves, but not before their imports are done
State = Literal["new", "changed", "done", "failed"]


@dataclass(frozen=True, kw_only=True)
class Record:
    """The content of `cell.json`: how a cell ended; `seconds` is the time of its process."""

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
    """A cell with its earlier record, if any; `state` is `changed` if that record has another key."""

    cell: Cell
    key: str
    state: State
    record: Record | None


def plan(sweep: Sweep, out: str | Path, device: str = "cpu") -> list[Planned]:
    """Every cell of a sweep, and whether `out` already holds its result; each model and text is read once."""
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
    """The sha256 of everything that a cell's result depends on; `read` holds the hashes of files its recipe names."""
    parts: list[Any] = [cell.recipe.to_dict(), *read, asdict(sweep.asked), suite_digest(sweep.asked.suite), device]
    parts += [versions() | others(), software(), dict(foreign_code(cell.recipe.passes)), *files_digest(sweep.asked)]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def model_digest(model: str) -> str:
    """The sha256 of a model's weights and of all other files in its folder that affect tokenization or computation."""
    folder = locate(model)
    described = sorted(path for path in folder.iterdir() if path.suffix in DESCRIBING and path.is_file())
    told = [describe(folder)["sha"], *([path.name, digest(path)] for path in described)]
    return hashlib.sha256(json.dumps(told).encode()).hexdigest()


def text_digest(data: str) -> str:
    """The sha256 of calibration text that is a file or a folder of files; empty for a named data set."""
    path = Path(data)
    try:
        files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
        told = [[str(file.relative_to(path)), digest(file)] for file in files]
    except (OSError, ValueError):  # not a path; an unreadable file fails later, in its cell
        return ""
    return hashlib.sha256(json.dumps(told).encode()).hexdigest() if told else ""


def files_digest(asked: Asked) -> list[str]:
    """The sha256s of the text and data that a sweep's evaluation options name; empty if they name none.

    Raises ArtifactError for damaged data.
    """
    found = [] if asked.text is None else [digest(Path(asked.text))]
    if asked.data_dir is not None:
        for task in find(asked.suite).chosen(asked.tasks):
            had = available(task.needs, Path(asked.data_dir), online=False) if task.needs else ""
            found.append(had if isinstance(had, str) else had.sha256)
    return found


@cache
def suite_digest(name: str) -> str:
    """The sha256 of a suite's task names and code; the data that it reads are hashed separately."""
    suite = find(name)
    return hashlib.sha256(json.dumps([[task.name for task in suite.tasks], code(suite)]).encode()).hexdigest()


def read_record(folder: Path) -> Record | None:
    """The record in the folder of a cell; None if it is missing or cannot be read, so that the cell is measured."""
    try:
        return build(Record, json.loads((folder / RECORD).read_text(encoding="utf-8")), "cell")
    except (OSError, ValueError, RecipeError):
        return None


def write_record(folder: Path, record: Record) -> None:
    """Write the record atomically."""
    replace_text(folder / RECORD, json.dumps(asdict(record), indent=1) + "\n")


def replace_text(path: Path, text: str) -> None:
    """Replace a text file atomically."""
    put(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def strangers(out: Path, cells: Sequence[Cell]) -> list[str]:
    """The names of cell folders whose cells are no longer in the sweep."""
    known = {cell.id for cell in cells}
    return sorted(path.parent.name for path in (out / "cells").glob(f"*/{RECORD}") if path.parent.name not in known)


@contextmanager
def locked(out: Path) -> Iterator[None]:
    """Lock the folder of a sweep; the lock is released when the process that holds it ends, for whatever reason.

    Raises RecipeError if, after PATIENCE seconds, another sweep still holds it or a cell is still running, or if the
    folder cannot be written.
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
    """Whether a process holds the lock of a file, as a cell does of its log; RecipeError if it cannot be opened."""
    try:
        with path.open("r+", encoding="utf-8") as file:  # does not create the file
            return not held(file)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise RecipeError(f"--out: {path} cannot be written: {error.strerror}") from error


def held(file: IO[str]) -> bool:
    """Try to lock a file; returns whether this succeeded."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
