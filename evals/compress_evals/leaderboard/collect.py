"""Finds results below folders, and groups those that are comparable into boards.

Not here: any statistic. A board is one dense model measured in one way. Results that differ in the suite, in an engine
field that `compare` requires to be equal, in the questions, in the source of the questions or in the margin go to
different boards and never into one table. The per-question rows are dropped as soon as their scores are extracted:
sixty models of a real suite would not fit in memory otherwise.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, Field, ValidationError

from compress.errors import ArtifactError, why
from compress_evals.comparison import ASKED_ALIKE, MUST_AGREE
from compress_evals.leaderboard.naming import distinct, one_line
from compress_evals.results import RESULTS_FILE, Results, load
from compress_evals.stats import Floats

CELL_FILE = "cell.json"
MADE_HERE = "leaderboard.json"  # marks a published site, which is not searched for results
SAME = 1e-9  # tolerance for two means of the same scores


class Cell(BaseModel):
    """One cell of a sweep, as recorded beside its results; the sweep's other fields are ignored."""

    schema_version: Literal[1] = Field(alias="schema")
    id: str
    model: str
    recipe: str
    seed: int | None = None
    changes: dict[str, Any] = Field(default_factory=dict)
    status: Literal["done", "failed"]
    error: str | None = None


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One result: `results` without its rows, the headline scores of every question by task, and where it was found.

    With `runs`, it is the mean over these runs (`leaderboard/runs.py`).
    """

    name: str
    place: str
    results: Results
    scores: Mapping[str, Floats]
    runs: tuple[Entry, ...] = ()

    @property
    def sources(self) -> dict[str, str | None]:
        """The source of the questions of each task; None where it was not recorded."""
        return {name: task.data.source if task.data else None for name, task in self.results.tasks.items()}


@dataclass(frozen=True, kw_only=True)
class Board:
    """One table: a dense model, the models compared with it, and the sweep cells that failed.

    `clusters` holds the cluster of every question, by task.
    """

    dense: Entry
    compressed: tuple[Entry, ...]
    clusters: Mapping[str, tuple[str, ...]]
    margin: float
    failed: tuple[Cell, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Collection:
    """The boards in a fixed order, and the failed cells of models that have no board."""

    boards: tuple[Board, ...]
    unplaced: tuple[Cell, ...]


def collect(paths: Sequence[Path]) -> Collection:
    """Collect all results below `paths`, pair each with its dense result, and group them into boards.

    A dense result that is found several times counts once. Raises ArtifactError for a path without results, a file that
    cannot be read, and a compressed result whose dense result is missing or was measured differently; the message names
    the difference.
    """
    places, cells = find(paths)
    found = [(place, *_opened(folder, place)) for folder, place in places]
    clusters = {entry.results.tasks[t].task_hash: c for _, entry, by in found for t, c in by.items()}
    dense = _once([entry for _, entry, _ in found if entry.results.vs is None])
    pairs = [(_partner(entry, dense), entry) for _, entry, _ in found if entry.results.vs is not None]
    boards = []
    for original in dense:
        mine = [entry for partner, entry in pairs if partner is original]
        for margin in sorted({_margin(entry) for entry in mine}) or [0.05]:
            those = distinct(_unrepeated([entry for entry in mine if _margin(entry) == margin]))
            asked = {t: clusters[task.task_hash] for t, task in original.results.tasks.items()}
            boards.append(Board(dense=original, compressed=tuple(those), clusters=asked, margin=margin))
    return _with_failures(boards, [cell for cell in cells if cell.status == "failed"])


def find(paths: Sequence[Path]) -> tuple[list[tuple[Path, str]], list[Cell]]:
    """The folders of results below `paths`, each with a short display path, and the sweep cells."""
    folders: dict[Path, str] = {}
    cells: dict[Path, Cell] = {}
    for path in paths:
        top = path.parent if path.name in (RESULTS_FILE, CELL_FILE) else path
        if not top.is_dir():
            raise ArtifactError(f"{path}: no such folder of results; write them with `compress eval`")
        before = len(folders) + len(cells)
        for folder, names in _folders(top):
            place = str(Path(top.resolve().name) / folder.relative_to(top))
            if RESULTS_FILE in names:
                folders.setdefault(folder.resolve(), place)
            if CELL_FILE in names:
                cells.setdefault(folder.resolve(), _cell(folder / CELL_FILE))
        if len(folders) + len(cells) == before and not _seen(top, [*folders, *cells]):
            raise ArtifactError(f"{path}: holds no {RESULTS_FILE}; write them with `compress eval`")
    return sorted(folders.items(), key=lambda pair: pair[1]), [cells[folder] for folder in sorted(cells)]


def why_not(dense: Entry, compressed: Entry) -> str | None:
    """The first difference, in words, that makes two results incomparable; None if there is none."""
    ours, theirs = dense.results, compressed.results
    for field in MUST_AGREE:
        a, b = getattr(ours.engine, field), getattr(theirs.engine, field)
        if a != b:
            return f"{field}: {a} and {b}"
    if ours.tasks.keys() != theirs.tasks.keys():
        return f"tasks: only one has {', '.join(sorted(ours.tasks.keys() ^ theirs.tasks.keys()))}"
    for name, task in ours.tasks.items():
        other = theirs.tasks[name]
        if any(getattr(task, field) != getattr(other, field) for field in ASKED_ALIKE):
            return f"{name}: different questions; use the same limit, seed and version"
        if dense.sources[name] != compressed.sources[name]:
            return f"{name}: questions from {dense.sources[name]} and from {compressed.sources[name]}"
        said = theirs.vs.tasks.get(name) if theirs.vs else None
        if theirs.vs and (said is None or abs(said.paired.dense - float(dense.scores[name].mean())) > SAME):
            return f"{name}: it was compared with another measurement of the dense model"
    return None


def _folders(top: Path) -> Iterator[tuple[Path, list[str]]]:
    for folder, below, names in os.walk(top):  # symbolic links are not followed, so there are no loops
        below.sort()
        if MADE_HERE in names:
            below.clear()
            continue
        yield Path(folder), names


def _seen(top: Path, folders: Sequence[Path]) -> bool:
    return any(folder.is_relative_to(top.resolve()) for folder in folders)


def _cell(path: Path) -> Cell:
    try:
        return Cell.model_validate(json.loads(path.read_text(encoding="utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        raise ArtifactError(f"{path}: {'.'.join(str(part) for part in first['loc'])}: {first['msg']}") from None
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: not readable as JSON: {why(error)}") from None


def _opened(folder: Path, place: str) -> tuple[Entry, dict[str, tuple[str, ...]]]:
    results = load(folder)
    scores = {
        name: np.array([row.scores[task.headline] for row in results.rows[name]], dtype=np.float64)
        for name, task in results.tasks.items()
    }
    clusters = {name: tuple(row.cluster for row in rows) for name, rows in results.rows.items()}
    light = results.model_copy(update={"rows": {}})
    return Entry(name=one_line(results.model.name), place=place, results=light, scores=scores), clusters


def _alike(a: Entry, b: Entry) -> bool:
    """Whether two results have the same name, weights, recipe, settings and scores."""
    return (
        (a.name, a.results.model.sha, a.results.model.recipe) == (b.name, b.results.model.sha, b.results.model.recipe)
        and why_not(a, replace(b, results=b.results.model_copy(update={"vs": None}))) is None
        and all(np.array_equal(scores, b.scores[name]) for name, scores in a.scores.items())
    )


def _once(dense: Sequence[Entry]) -> list[Entry]:
    """The dense results without duplicates; a result that includes the noise floor is preferred over its duplicates."""
    kept: list[Entry] = []
    for entry in sorted(dense, key=lambda entry: not entry.results.noise):
        if not any(_alike(entry, other) for other in kept):
            kept.append(entry)
    return sorted(kept, key=lambda entry: (entry.name, entry.place))


def _unrepeated(entries: Sequence[Entry]) -> list[Entry]:
    """The entries without copies, which are results with the same weights and scores found in two folders."""
    kept: list[Entry] = []
    by_name: dict[str, list[Entry]] = {}
    for entry in entries:
        known = by_name.setdefault(entry.name, [])
        if entry.results.model.sha is None or not any(_alike(entry, other) for other in known):
            known.append(entry)
            kept.append(entry)
    return kept


def _partner(entry: Entry, dense: Sequence[Entry]) -> Entry:
    versus = entry.results.vs
    called = versus.dense if versus else ""
    named = [other for other in dense if other.results.model.name == called]
    if not named:
        raise ArtifactError(
            f"{entry.place}: was compared with {called}, but there is no dense result of that name in the given paths"
        )
    reasons = [why_not(other, entry) for other in named]
    fitting = [other for other, reason in zip(named, reasons, strict=True) if reason is None]
    if len(fitting) > 1:
        places = " and ".join(other.place for other in fitting)
        raise ArtifactError(f"{entry.place}: could belong to {places}, which differ in their weights; leave one out")
    if not fitting:
        raise ArtifactError(f"{entry.place}: is not comparable with {named[0].place}; they differ in {reasons[0]}")
    return fitting[0]


def _margin(entry: Entry) -> float:
    return entry.results.vs.margin if entry.results.vs else 0.0


def _with_failures(boards: Sequence[Board], failed: Sequence[Cell]) -> Collection:
    """The collection with each failed cell on the boards of its model, or on the only board if there is just one."""
    if not boards:
        raise ArtifactError("there is no dense result in the given paths, so nothing to compare with")
    boards = sorted(boards, key=lambda board: -len(board.compressed))
    only = len(boards) == 1
    placed = [
        replace(board, failed=tuple(c for c in failed if only or Path(c.model).name == board.dense.name))
        for board in boards
    ]
    shown = {id(cell) for board in placed for cell in board.failed}
    return Collection(boards=tuple(placed), unplaced=tuple(cell for cell in failed if id(cell) not in shown))
