"""Reads measured degradations from JSON lines, written by the sweeps here or by anyone else."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from compress.errors import RecipeError, why


@dataclass(frozen=True, kw_only=True)
class Point:
    """One measured model: N, D, bits per weight, and degradation (cross-entropy lost) in nats per token."""

    parameters: float
    tokens: float
    bits: float
    degradation: float


def read_points(path: Path, parameters: float | None = None, tokens: float | None = None) -> tuple[list[Point], str]:
    """The points of a file, and the key of their bits: `bits_per_weight` if every line has it, else `bits`.

    A line is an object with bits, and with either `degradation`, or `loss` and `dense_loss`. The losses are means in
    nats, or lists of sums over windows; in the latter case `tokens` of the line counts the evaluated tokens.
    `parameters` and `tokens` are used for lines that do not have them. Raises RecipeError, naming the file and line, if
    one cannot be used.
    """
    rows = read_rows(path)
    key = next((k for k in ("bits_per_weight", "bits") if all(number(row.get(k)) for _, row in rows)), None)
    if key is None:
        raise RecipeError(f"{path}: every line needs `bits_per_weight` as a number, or every line `bits`")
    points = []
    for place, row in rows:
        summed = isinstance(row.get("loss"), list)  # then `tokens` counts the text that was evaluated
        given = {
            "parameters": row.get("parameters", parameters),
            "tokens": tokens if summed else row.get("tokens", tokens),
            "bits": row[key],
            "degradation": degradation(row, place),
        }
        for name in ("parameters", "tokens", "bits"):
            if not number(given[name]) or not 0 < given[name] < math.inf:
                raise RecipeError(f"{place}: no positive {name}; give it in the line or on the command line")
        points.append(Point(**given))
    return points, key


def read_rows(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """Each line as an object, with its place (`FILE:LINE`); empty lines are skipped."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"--fit: {path} cannot be read: {why(error)}") from error
    rows = []
    for i, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise RecipeError(f"{path}:{i}: not JSON: {error}") from error
        if not isinstance(row, dict):
            raise RecipeError(f"{path}:{i}: not a JSON object")
        rows.append((f"{path}:{i}", row))
    if not rows:
        raise RecipeError(f"--fit: {path} holds no line")
    return rows


def degradation(row: dict[str, Any], place: str) -> float:
    """The degradation of a line, in nats per token; raises RecipeError if the line does not give it."""
    found, before, after = row.get("degradation"), row.get("dense_loss"), row.get("loss")
    if found is None and isinstance(before, list) and isinstance(after, list):
        count = row.get("tokens")
        if number(count) and count > 0 and all(number(x) for x in (*before, *after)):
            found = (sum(after) - sum(before)) / count
    elif found is None and number(before) and number(after):
        found = after - before
    if not number(found):
        raise RecipeError(f"{place}: no `degradation` in nats, and no `loss` and `dense_loss` to compute it from")
    return float(found)


def number(value: Any) -> TypeGuard[float]:
    """Whether a JSON value is a number, infinity included."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and not math.isnan(value)
