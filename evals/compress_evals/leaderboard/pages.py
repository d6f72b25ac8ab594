"""Renders the pages of a site as text: a page per board, a page per model, and an index if there are several boards.

The templates escape everything on a page. Only the figures (`svg.py`) are inserted as markup, which is built from
escaped text. The one script is part of the package, and the page's content security policy allows only its hash, so
that no other script can run.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from compress_evals.leaderboard.collect import Board, Cell, Collection
from compress_evals.leaderboard.columns import FOLDED, GROUPS, Column, columns
from compress_evals.leaderboard.curves import damage
from compress_evals.leaderboard.examples import flipped
from compress_evals.leaderboard.facts import facts, told_apart
from compress_evals.leaderboard.figures import flips, trade_offs
from compress_evals.leaderboard.heat import heat
from compress_evals.leaderboard.naming import readable
from compress_evals.leaderboard.table import SEVERITY, Line, families
from compress_evals.report import GLYPHS, MEANINGS, TableRow, calibration, fidelity_table, table_rows, tier_table
from compress_evals.wording import p_value, percent, points, signed, size_change

TEMPLATES = Path(__file__).parent / "templates"


def board_page(board: Board, lines: Sequence[Line], *, home: str = "") -> str:
    """The page of one board; `home` is the address of the list of boards, empty if there is none."""
    shown = columns(lines, families(board))
    return _render(
        "board.html.j2",
        board=board,
        facts=facts(board),
        lines=lines,
        columns=shown,
        spans=[(group, GROUPS[group], sum(c.group == group for c in shown)) for group in _groups(shown)],
        folded=[group for group in FOLDED if group in _groups(shown)],
        kinds=sorted({line.method.family for line in lines}),
        figures=[*trade_offs(lines), flips(lines)] if lines else [],
        curves=damage(board, lines) if lines else [],
        heat=heat(board, lines),
        home=home,
        script=Markup(script()),
        script_hash=policy(script()),
    )


def model_page(
    board: Board, line: Line, rows: Sequence[TableRow], place: int, of: int, examples: int, mean: Line | None = None
) -> str:
    """The page of one model: its losses by task, with at most `examples` lost and as many gained answers per task.

    It is the `place`-th of `of` models. `mean` is the line of several runs to which this one belongs, if any.
    """
    results = line.entry.results
    dense = board.dense.results
    return _render(
        "model.html.j2",
        board=board,
        line=line,
        results=results,
        rows={family: [row for row in rows if row.family == family] for family in families(board)},
        place=place,
        of=of,
        mean=mean,
        size=size_change(line.versus.dense_bytes, line.bytes),
        calibration=calibration(results),
        tiers=tier_table(dense, [results]),
        fidelity=fidelity_table([results]),
        flips=flipped(line, examples),
        script_hash=None,
    )


def boards_page(collection: Collection, summaries: Sequence[tuple[str, Sequence[Line]]]) -> str:
    """The index of several boards and the properties in which they differ; `summaries` are their folders and lines."""
    boards = list(zip(collection.boards, summaries, told_apart(collection), strict=True))
    return _render("boards.html.j2", boards=boards, unplaced=collection.unplaced, script_hash=None)


def rows_by_model(board: Board) -> dict[str, list[TableRow]]:
    """The task rows of every model of a board, with p values adjusted over all models and tasks.

    The rows of single runs are adjusted separately, as a group of their own.
    """
    found: dict[str, list[TableRow]] = {}
    for entries in (board.compressed, [run for entry in board.compressed for run in entry.runs]):
        named = [
            entry.results.model_copy(update={"model": entry.results.model.model_copy(update={"name": entry.name})})
            for entry in entries
        ]
        found |= {entry.name: [] for entry in entries}
        for row in table_rows([board.dense.results, *named]) if named else ():
            found[row.model].append(row)
    return found


def error_line(cell: Cell) -> str:
    """The last line of a failed cell's error, or a note that none was recorded."""
    lines = (cell.error or "").strip().splitlines()
    return lines[-1] if lines else "no error was recorded"


def script() -> str:
    """The source of the script that sorts and filters the table."""
    return (TEMPLATES / "table.js").read_text(encoding="utf-8")


def policy(source: str) -> str:
    """The hash source, without quotes, with which a content security policy allows this inline script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(source.encode()).digest()).decode()


def _groups(shown: Sequence[Column]) -> list[str]:
    return list(dict.fromkeys(column.group for column in shown))


def _render(template: str, **values: Any) -> str:
    return _environment().get_template(template).render(**values)


@cache
def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader([TEMPLATES, TEMPLATES.parent.parent]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: readable(value) if type(value) is str else value,
    )
    environment.filters |= {
        "percent": percent, "points": points, "p_value": p_value, "signed": signed, "drawn": Markup,
        "error_line": error_line,
    }  # fmt: skip
    environment.globals |= {"glyphs": GLYPHS, "meanings": MEANINGS, "severity": SEVERITY}
    return environment
