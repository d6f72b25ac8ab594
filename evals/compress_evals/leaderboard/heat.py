"""The heat map of tasks: differences from dense as numbers in coloured cells of an ordinary table.

A colour stands for the same range of percentage points on every board, so that two boards can be compared by eye.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from compress_evals.leaderboard.collect import Board
from compress_evals.leaderboard.table import Line
from compress_evals.wording import signed

STEPS = (1.0, 3.0, 8.0, 20.0)  # percentage points at which the colour changes


@dataclass(frozen=True, kw_only=True)
class HeatCell:
    """One difference: `shade` is from -4 (a large loss) to 4 (a large gain), `verdict` is the verdict of the task."""

    text: str
    shade: int
    verdict: str


@dataclass(frozen=True, kw_only=True)
class Heat:
    """The task titles, and for each model its cells; `legend` gives the range of percentage points of each shade."""

    titles: tuple[str, ...]
    rows: tuple[tuple[Line, tuple[HeatCell, ...]], ...]
    legend: tuple[tuple[int, str], ...]


def heat(board: Board, lines: Sequence[Line]) -> Heat:
    """The heat map of a board, with the models in the order of the table."""
    names = list(board.dense.results.tasks)
    return Heat(
        titles=tuple(board.dense.results.tasks[name].title for name in names),
        rows=tuple((line, tuple(_cell(line, name) for name in names)) for line in lines),
        legend=tuple((side * i, _words(side * i)) for side in (-1, 1) for i in range(len(STEPS), 0, -1)[::-side]),
    )


def shade(points: float) -> int:
    """The shade of a difference in percentage points: 0 within one point, else 1 to 4 with the difference's sign."""
    step = sum(abs(points) >= bound for bound in STEPS)
    return step if points > 0 else -step


def _cell(line: Line, task: str) -> HeatCell:
    pair = line.versus.tasks[task].paired
    return HeatCell(text=signed(pair.delta), shade=shade(100 * pair.delta), verdict=pair.verdict)


def _words(step: int) -> str:
    at = abs(step) - 1
    sign = "−" if step < 0 else "+"
    above = f" to {sign}{STEPS[at + 1]:g}" if at + 1 < len(STEPS) else " and beyond"
    return f"{sign}{STEPS[at]:g}{above}"
