"""Lists the tasks of a suite and which of them can be asked with the available data; no model is needed."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from compress_evals.questions import availability, load_tasks
from compress_evals.quiet import quiet
from compress_evals.results import Data
from compress_evals.suite import Suite


@dataclass(frozen=True, kw_only=True)
class Listed:
    """A task: its `n` questions and where they come from, or the reason why it is `skipped`."""

    name: str
    title: str
    family: str
    control: bool
    n: int | None
    data: str
    skipped: str | None


@dataclass(frozen=True, kw_only=True)
class Listing:
    """The tasks of a suite, and the folder that lm-eval's `--include_path` takes."""

    suite: str
    folder: str
    tasks: tuple[Listed, ...]


def listed(suite: Suite, data_dir: Path | None = None, online: bool = False) -> Listing:
    """The tasks of a suite; those whose data are available are loaded to count their questions."""
    had, skipped = availability(suite.tasks, data_dir, online)
    with quiet():
        loaded = load_tasks(suite, data_dir, online, list(had)) if had else {}
    return Listing(
        suite=suite.name,
        folder=str(suite.folder),
        tasks=tuple(
            Listed(
                name=task.name,
                title=task.title,
                family=task.family,
                control=task.control,
                n=len(loaded[task.name].eval_docs) if task.name in loaded else None,
                data="" if task.name in skipped else source(had[task.name]),
                skipped=skipped[task.name].reason if task.name in skipped else None,
            )
            for task in suite.tasks
        ),
    )


def source(data: Data | None) -> str:
    """The source of a task's questions, as text; "built in" for None."""
    return "built in" if data is None else f"{data.source}: {data.name}"
