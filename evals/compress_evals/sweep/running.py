"""Runs the cells of a sweep, each in a process of its own and several at a time; cells that are done are not repeated.

An engine starts the processes, on this machine (`local.py`) or on Ray (`ray.py`); everything else is the same for both.

A cell works in `cells/<id>/work`, and its results are moved in place before its record is written, so that a sweep can
be killed at any moment and resumed. The first cell of a dense model measures that model, and later ones read the cache;
until then, only one cell of that model runs at a time.
"""

from __future__ import annotations

import json
import shutil
import signal
import statistics
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

from compress.errors import RecipeError, why
from compress_evals.results import RESULTS_FILE
from compress_evals.sweep.cell import ERROR, JOB, MODEL, RESULTS, job, keywords
from compress_evals.sweep.grid import Asked, Cell, Sweep
from compress_evals.sweep.local import Process, Start, local
from compress_evals.sweep.ray import cluster
from compress_evals.sweep.records import LOG, Planned, Record, locked, plan, replace_text, write_record

ENGINES = ("local", "ray")
POLL = 0.1  # seconds between polls of the processes
WORK, CACHE, DENSE = "work", "cache", "dense"


@dataclass(frozen=True, kw_only=True)
class Progress:
    """The progress of a sweep: how many cells are done or failed, which are running, and the estimated seconds left.

    `seconds_left` is None while it cannot be estimated. `ended` is the record of a cell that has just ended, else None.
    """

    done: int
    failed: int
    total: int
    running: tuple[str, ...]
    seconds_left: float | None
    ended: Record | None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All records of a sweep in order; `ran` are the ids measured now, `skipped` those whose records were kept."""

    out: str
    records: tuple[Record, ...]
    ran: tuple[str, ...]
    skipped: tuple[str, ...]
    seconds: float

    @property
    def failed(self) -> tuple[Record, ...]:
        """The records of cells that failed, now or earlier."""
        return tuple(record for record in self.records if record.status == "failed")


@dataclass(kw_only=True)
class Running:
    """A cell and the process that runs it."""

    planned: Planned
    process: Process


@dataclass(kw_only=True)
class Board:
    """The state of one run of a sweep: waiting and running cells, and the records of those that ended."""

    waiting: list[Planned]
    running: list[Running] = field(default_factory=list)
    measured: set[str] = field(default_factory=set)  # models whose dense results are in the cache
    records: dict[str, Record] = field(default_factory=dict)

    def next(self) -> Planned | None:
        """The first cell that may start: its dense model is already measured, or no running cell uses it."""
        busy = {at.planned.cell.source for at in self.running} - self.measured
        return next((planned for planned in self.waiting if planned.cell.source not in busy), None)

    def seconds_left(self, jobs: int) -> float | None:
        """The estimated seconds left, from the times of cells of the same recipe, else from the mean of all.

        None before any cell is done.
        """
        took: dict[str, list[float]] = {}
        for record in self.records.values():
            if record.status == "done":
                took.setdefault(record.recipe, []).append(record.seconds)
        if not took:
            return None
        mean = statistics.mean(chain(*took.values()))
        means = {label: statistics.mean(seconds) for label, seconds in took.items()}

        def expected(cell: Cell) -> float:
            return means.get(cell.label, mean)

        ahead = sum(expected(planned.cell) for planned in self.waiting)
        return (ahead + sum(max(0.0, expected(at.planned.cell) - at.process.seconds) for at in self.running)) / jobs

    def progress(self, total: int, jobs: int, ended: Record | None) -> Progress:
        """The progress of the sweep."""
        counts = Counter(record.status for record in self.records.values())
        return Progress(
            done=counts["done"],
            failed=counts["failed"],
            total=total,
            running=tuple(at.planned.cell.id for at in self.running),
            seconds_left=self.seconds_left(jobs),
            ended=ended,
        )


def run(
    sweep: Sweep,
    out: str | Path,
    *,
    jobs: int = 1,
    timeout: float | None = None,
    keep_models: bool = False,
    retry_failed: bool = False,
    device: str = "cpu",
    engine: str = "local",
    address: str | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> Summary:
    """Measure every cell that has no result with the same key in `out`, `jobs` at a time, and return all records.

    A cell that fails, or takes more than `timeout` minutes, is recorded with its error while the others go on; it is
    tried again only if it changes or with `retry_failed`. Models are deleted once evaluated unless `keep_models`.
    `engine` is `local` or `ray`, the latter on a cluster of its own or on the one at `address`. Raises RecipeError if
    another sweep is running in `out`, if `out` cannot be written, if the evaluation options are invalid, or if the
    engine is not available.
    """
    began, out = time.monotonic(), Path(out)
    keywords(sweep.asked, out / CACHE)  # reject invalid options now, not in every cell
    places = engine_of(engine, jobs, device, address)
    with locked(out):
        replace_text(out / "sweep.yaml", sweep.text)
        planned = plan(sweep, out, device)
        waiting = [p for p in planned if p.state in ("new", "changed") or (retry_failed and p.state == "failed")]
        ids = {p.cell.id for p in waiting}
        kept = {p.cell.id: p.record for p in planned if p.record and p.cell.id not in ids}
        board = Board(waiting=list(waiting), records=dict(kept))
        board.measured = {p.cell.source for p in planned if p.cell.id in kept and p.state == "done"}
        if not board.measured:  # no result that was compared with them is kept
            shutil.rmtree(out / DENSE, ignore_errors=True)
        tell = on_progress or (lambda progress: None)
        if waiting:
            with places as start:
                work_off(
                    board,
                    partial(begin, asked=sweep.asked, out=out, device=device, start=start),
                    partial(end, out=out, timeout=timeout, keep_models=keep_models),
                    lambda ended: tell(board.progress(len(planned), jobs, ended)),
                    jobs, timeout, out,
                )  # fmt: skip
    return Summary(
        out=str(out),
        records=tuple(board.records[p.cell.id] for p in planned),
        ran=tuple(p.cell.id for p in waiting),
        skipped=tuple(kept),
        seconds=round(time.monotonic() - began, 1),
    )


def engine_of(engine: str, jobs: int, device: str, address: str | None) -> AbstractContextManager[Start]:
    """The engine that starts the processes of cells; raises RecipeError if it is unknown or not available."""
    if engine not in ENGINES:
        raise RecipeError(f"--engine: {engine!r} is not one of {', '.join(ENGINES)}")
    if engine == "ray":
        return cluster(jobs, device, address)
    if address is not None:
        raise RecipeError("--address: is only valid with --engine ray")
    return local(jobs)


def work_off(
    board: Board,
    begin: Callable[[Planned], Running],
    end: Callable[[Running], tuple[Record, str]],
    say: Callable[[Record | None], None],
    jobs: int,
    timeout: float | None,
    out: Path,
) -> None:
    """Run all waiting cells; if this is interrupted for any reason, all running processes are killed."""
    try:
        while board.waiting or board.running:
            while len(board.running) < jobs and (chosen := board.next()) is not None:
                board.waiting.remove(chosen)
                board.running.append(begin(chosen))
            time.sleep(POLL)
            ended = [end(at) for at in finished(board.running, timeout)]
            for record, source in ended:
                board.running = [at for at in board.running if at.planned.cell.id != record.id]
                board.records[record.id] = record
                board.measured |= {source} if record.status == "done" else set()
                say(record)
            if not ended:
                say(None)
    except OSError as error:  # such as a full disk, or a folder that was removed
        raise RecipeError(f"--out: {out} cannot be written: {why(error)}") from error
    finally:
        for at in board.running:
            at.process.kill()
            shutil.rmtree(work_of(out, at.planned.cell), ignore_errors=True)


def work_of(out: Path, cell: Cell) -> Path:
    """The working folder of a cell; it is deleted when the cell has ended."""
    return out / "cells" / cell.id / WORK


def command(work: Path) -> list[str]:
    """The command that runs a cell."""
    return [sys.executable, "-m", "compress_evals.sweep", str(work)]


def begin(planned: Planned, *, asked: Asked, out: Path, device: str, start: Start) -> Running:
    """Start the process of a cell."""
    work = work_of(out, planned.cell)
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    told = job(planned.cell, asked, device, out / CACHE)
    (work / JOB).write_text(json.dumps(told, indent=1), encoding="utf-8")
    return Running(planned=planned, process=start(command(work), work.parent / LOG))


def finished(running: Sequence[Running], timeout: float | None) -> list[Running]:
    """The cells that have ended or exceeded the timeout."""
    return [at for at in running if at.process.poll() is not None or late(at, timeout)]


def late(at: Running, timeout: float | None) -> bool:
    """Whether a cell has run for more than `timeout` minutes."""
    return timeout is not None and at.process.seconds > 60 * timeout


def end(at: Running, *, out: Path, timeout: float | None, keep_models: bool) -> tuple[Record, str]:
    """Move the results of a process in place, then write the record of its cell; returns the record and the model."""
    cell, work = at.planned.cell, work_of(out, at.planned.cell)
    error = None if at.process.poll() == 0 else failure(at, work, timeout)
    at.process.kill()
    if error is None and not (work / RESULTS / cell.id / RESULTS_FILE).is_file():
        error = "its process ended without results"
    for old in (RESULTS, MODEL):
        shutil.rmtree(work.parent / old, ignore_errors=True)
    if error is None:
        place(work, out, cell, keep_models)
    shutil.rmtree(work, ignore_errors=True)
    record = Record(
        id=cell.id, model=cell.model, recipe=cell.label, seed=cell.seed, changes=cell.changes,
        status="failed" if error else "done", error=error, seconds=round(at.process.seconds, 1), key=at.planned.key,
    )  # fmt: skip
    write_record(work.parent, record)
    return record, cell.source


def place(work: Path, out: Path, cell: Cell, keep_models: bool) -> None:
    """Move the results to the folder of the cell, those of dense to a shared folder, and the model if it is kept."""
    for found in sorted((work / RESULTS).glob(f"*/{RESULTS_FILE}")):
        if found.parent.name != cell.id:
            shared = dense_place(out, found)
            shared.parent.mkdir(exist_ok=True)
            shutil.rmtree(shared, ignore_errors=True)
            found.parent.rename(shared)
    (work / RESULTS).rename(work.parent / RESULTS)
    if keep_models:
        (work / MODEL).rename(work.parent / MODEL)


def dense_place(out: Path, found: Path) -> Path:
    """The folder for the dense results of a cell; results of another batch size get a folder of their own.

    They differ because a cell that runs out of memory evaluates all its models again at half the batch size, and other
    cells remain compared with the results of the full size.
    """
    name, size = found.parent.name, batch_size(found)
    there = out / DENSE / name
    return there if batch_size(there / RESULTS_FILE) in (None, size) else out / DENSE / f"{name}-batch-{size}"


def batch_size(path: Path) -> int | None:
    """The batch size of stored results; None if there are none."""
    try:
        found: int = json.loads(path.read_text(encoding="utf-8"))["engine"]["batch_size"]
    except (OSError, ValueError, KeyError):
        return None
    return found


def failure(at: Running, work: Path, timeout: float | None) -> str:
    """The reason why a process failed, in one line."""
    code = at.process.poll()
    if code is None:
        return f"timed out after {timeout:g} minutes"
    with suppress(OSError):
        return (work / ERROR).read_text(encoding="utf-8")
    if code < 0:
        name = signal.Signals(-code).name
        return f"killed by {name}{'; out of memory?' if name == 'SIGKILL' else f'; see {LOG}'}"
    return f"its process exited with {code}; see {LOG}"


def as_dict(summary: Summary) -> dict[str, Any]:
    """The summary as plain data."""
    return {
        "out": summary.out,
        "done": sum(record.status == "done" for record in summary.records),
        "failed": len(summary.failed),
        "ran": list(summary.ran),
        "skipped": list(summary.skipped),
        "seconds": summary.seconds,
        "cells": [vars(record) for record in summary.records],
    }
