"""Formats numbers and untrusted text for readers: points, percent, bytes, Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compress_evals.results import Metric
from compress_evals.stats import Paired


def size_change(before: int | None, after: int | None) -> str:
    """Bytes on disk before and after, with the change in percent; empty if the size after is unknown."""
    if after is None:
        return ""
    if not before:
        return byte_size(after)
    return f"{byte_size(before)} → {byte_size(after)} ({100 * (after / before - 1):+.0f} %)".replace("-", "−")


def percent(metric: Metric) -> str:
    """A score and its interval in percent."""
    return f"{100 * metric.value:.1f} [{100 * metric.low:.1f}, {100 * metric.high:.1f}]"


def points(pair: Paired) -> str:
    """A difference and its interval in percentage points, with signs."""
    return f"{signed(pair.delta)} [{signed(pair.low)}, {signed(pair.high)}]"


def p_value(p: float) -> str:
    """A p value to three decimal places; below 0.001 as `<0.001`."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def signed(fraction: float) -> str:
    """A fraction in percentage points, with its sign unless it rounds to zero."""
    rounded = round(100 * fraction, 1) + 0.0
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def byte_size(count: float) -> str:
    """A number of bytes with three significant digits and a decimal unit."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # a value that rounds to 1000 becomes 1 of the next unit
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def md(text: str) -> str:
    """The text on one line, escaped so that Markdown shows it literally."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def md_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with its cells escaped."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell if cell == '---' else md(cell) for cell in line)} |" for line in lines)


def fenced(text: str) -> str:
    """The text as a YAML code block, with a fence long enough that the text cannot end it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"
