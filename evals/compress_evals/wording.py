"""How numbers and strangers' text are written for people: points, percent, bytes, Markdown."""

from __future__ import annotations

import re
from collections.abc import Sequence

from compress_evals.results import Metric
from compress_evals.stats import Paired


def size_change(before: int | None, after: int | None) -> str:
    """Bytes on disk before and after; empty if the size after is not known."""
    if after is None:
        return ""
    if not before:
        return byte_size(after)
    return f"{byte_size(before)} → {byte_size(after)} ({100 * (after / before - 1):+.0f} %)".replace("-", "−")


def percent(metric: Metric) -> str:
    """A score and its interval in percent."""
    return f"{100 * metric.value:.1f} [{100 * metric.low:.1f}, {100 * metric.high:.1f}]"


def points(pair: Paired) -> str:
    """A difference and its interval in points, with a sign."""
    return f"{signed(pair.delta)} [{signed(pair.low)}, {signed(pair.high)}]"


def p_value(p: float) -> str:
    """A p value to three places, never as zero."""
    return "<0.001" if p < 0.001 else f"{p:.3f}"


def signed(fraction: float) -> str:
    """A fraction in points, with its sign unless it is zero."""
    rounded = round(100 * fraction, 1) + 0.0
    return f"{rounded:+.1f}".replace("-", "−") if rounded else "0.0"


def byte_size(count: float) -> str:
    """A number of bytes in three digits."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:  # what rounds to 1000 is 1 of the next
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"


def md(text: str) -> str:
    """Text that Markdown shows as it is, on one line."""
    return re.sub(r"([\\`*_\[\]<>|#~])", r"\\\1", " ".join(text.split()))


def md_table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table, its cells as they are read."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(cell if cell == '---' else md(cell) for cell in line)} |" for line in lines)


def fenced(text: str) -> str:
    """Text as a code block that it cannot end."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return f"{fence}yaml\n{text.rstrip()}\n{fence}"
