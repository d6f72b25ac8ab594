"""The process of one cell: it compresses, evaluates, and writes the results to the folder that it was given.

One process does both, because importing everything twice would take longer than many recipes. It reads its job from
`job.json` in that folder and writes an error to `error.txt`. It is killed when the sweep that started it ends, for
whatever reason.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, fields
from inspect import signature
from pathlib import Path
from typing import Any

import compress
from compress.errors import CompressError, RecipeError, why
from compress.recipe import from_dict
from compress_evals.folders import evaluate_folders
from compress_evals.sweep.grid import Asked, Cell

JOB, ERROR, MODEL, RESULTS = "job.json", "error.txt", "model", "results"


def job(cell: Cell, asked: Asked, device: str, cache: Path) -> dict[str, Any]:
    """The job of a cell's process, as plain data."""
    return {
        "id": cell.id,
        "model": cell.source,
        "recipe": cell.recipe.to_dict(),
        "eval": asdict(asked),
        "device": device,
        "cache": str(cache),
    }


def perform(told: dict[str, Any], work: Path, say: Callable[[str], None]) -> None:
    """Compress into `work/model/<id>` and evaluate into `work/results`; raises CompressError."""
    recipe = from_dict(told["recipe"])
    out = work / MODEL / told["id"]
    say(f"compressing {told['model']} on {told['device']}\n{recipe.to_yaml()}")
    compress.run(told["model"], recipe, out, device=told["device"], emit=lambda event: say(f"{event}"))
    say("evaluating")
    evaluate_folders(
        [out],
        told["model"],
        delta_base=recipe.delta.base if recipe.delta else None,
        out=work / RESULTS,
        device=told["device"],
        on_progress=say,
        **keywords(Asked(**told["eval"]), Path(told["cache"])),
    )
    say("done")


def keywords(asked: Asked, cache: Path) -> dict[str, Any]:
    """The options as keyword arguments of `evaluate_folders`, without those that have their default.

    Raises RecipeError for a text that cannot be read, or an option that evaluation does not have.
    """
    given = {f.name: getattr(asked, f.name) for f in fields(asked) if getattr(asked, f.name) != f.default}
    if "tasks" in given:
        given["only"] = given.pop("tasks")
    if "data_dir" in given:
        given["data_dir"] = Path(given["data_dir"])
    if "text" in given:
        try:
            given["text"] = Path(given["text"]).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise RecipeError(f"eval.text: {given['text']} cannot be read: {why(error)}") from error
    takes = signature(evaluate_folders).parameters
    for name in given:
        if name not in takes:
            raise RecipeError(f"eval.{name}: evaluation has no such option yet")
    return {**given, **({"cache": cache} if "cache" in takes else {})}


def end_with_parent() -> None:
    """Kill this process and its children as soon as the other end of its stdin is closed, as when its parent dies."""

    def wait() -> None:
        os.read(0, 1)  # not sys.stdin: holding its lock here would abort the interpreter at exit
        alone = os.getpgrp() == os.getpid()  # true if a sweep started it, false under a shell
        os.kill(0 if alone else os.getpid(), signal.SIGKILL)

    threading.Thread(target=wait, daemon=True).start()


def main(work: Path) -> int:
    """Run the job in `work/job.json`; returns 0, or 1 with the reason in `work/error.txt` and details in the log."""
    end_with_parent()
    began = time.monotonic()

    def say(text: str) -> None:
        sys.stderr.write(f"[{time.monotonic() - began:7.1f} s] {text}\n")
        sys.stderr.flush()

    try:
        perform(json.loads((work / JOB).read_text(encoding="utf-8")), work, say)
    except Exception as error:  # a bug in one cell must not stop the others; the traceback is in the log
        traceback.print_exc()
        lines = str(error).strip().splitlines()
        kind = "" if isinstance(error, CompressError) else f"{type(error).__name__}: "
        (work / ERROR).write_text(f"{kind}{lines[0] if lines else 'no reason given'}"[:500], encoding="utf-8")
        return 1
    return 0
