"""Sweeps: a resumable grid of models, recipes and seeds, in which each cell is measured in a process of its own.

    sweep = load("sweep.yaml")
    run(sweep, "out/sweep", jobs=2)

Not here: the evaluation of a model (`compress_evals.folders`) and the pages that show results (`leaderboard`).
"""

from __future__ import annotations

from compress_evals.sweep.grid import Asked, Cell, Sweep, load
from compress_evals.sweep.records import Planned, Record, plan, strangers
from compress_evals.sweep.running import Board, Progress, Summary, as_dict, engine_of, run

__all__ = [
    "Asked",
    "Board",
    "Cell",
    "Planned",
    "Progress",
    "Record",
    "Summary",
    "Sweep",
    "as_dict",
    "engine_of",
    "load",
    "plan",
    "run",
    "strangers",
]
