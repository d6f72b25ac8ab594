"""Damage curves: each family's score against the share removed and against bits per weight, one line per method.

Bits per byte of plain text is drawn dashed on an axis of its own: like perplexity in LLM-KICK's figures, it hardly
moves while knowledge is lost. A method is named by the passes of its recipe; it is drawn if it was run with at least
two budgets and everything else equal. A model of another calibration or with other options is a dot beside the line.
Source: Jaiswal et al., "Compressing LLMs: The Truth is Rarely Pure and Never Simple", ICLR 2024, figures 1 and 2.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from compress_evals.fidelity import usual_way
from compress_evals.leaderboard.collect import Board
from compress_evals.leaderboard.figures import Figure
from compress_evals.leaderboard.methods import UNKNOWN
from compress_evals.leaderboard.svg import GLYPHS, MARKERS, SERIES, STAND_IN, axes_of, drawing, inline
from compress_evals.leaderboard.table import Line, families

SIZE = (4.2, 3.1)
WORDS = {"removed": "the share removed", "bits": "bits per weight"}


@dataclass(frozen=True, kw_only=True)
class Curves:
    """The panels for one kind of budget; `methods` is the legend: name, glyph and colour number."""

    title: str
    methods: tuple[tuple[str, str, int], ...]
    panels: tuple[Figure, ...]


def damage(board: Board, lines: Sequence[Line]) -> list[Curves]:
    """Score against the share removed, then against bits per weight, for the methods run at two or more of either."""
    kinds: tuple[tuple[str, str, Callable[[Line], float | None]], ...] = (
        (
            "removed",
            "Share removed, %",
            lambda line: None if line.method.removed is None else 100 * line.method.removed,
        ),
        ("bits", "Bits per weight", lambda line: line.bits),
    )
    found = []
    for name, label, budget in kinds:
        methods = by_method(lines, budget)
        if methods:
            legend = tuple(
                (method, GLYPHS[i % len(GLYPHS)], 1 + i % SERIES) for i, method in enumerate(sorted(methods))
            )
            panels = tuple(
                _panel(board, methods, i, family, f"{name}-{i}", label, budget)
                for i, family in enumerate(families(board))
            )
            found.append(Curves(title=f"Damage against {WORDS[name]}", methods=legend, panels=panels))
    return found


def by_method(lines: Sequence[Line], budget: Callable[[Line], float | None]) -> dict[str, list[Line]]:
    """The lines of each method that was run with at least two budgets and all else equal, sorted by budget.

    Lines whose recipe cannot be read are left out, because they need not be of one method.
    """
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        if budget(line) is not None and line.method.label != UNKNOWN:
            groups[line.method.label].append(line)
    return {
        method: sorted(those, key=lambda line: (budget(line), line.name))
        for method, those in groups.items()
        if len(budgets(usual(those, budget), budget)) > 1
    }


def budgets(lines: Sequence[Line], budget: Callable[[Line], float | None]) -> set[float]:
    """The different budgets of some lines, after rounding to 0.01."""
    return {round(across, 2) for line in lines if (across := budget(line)) is not None}


def usual(lines: Sequence[Line], budget: Callable[[Line], float | None]) -> list[Line]:
    """Those lines of one method that differ in nothing but the budget: the settings run with the most budgets."""
    groups: dict[str, list[Line]] = defaultdict(list)
    for line in lines:
        groups[line.method.settings].append(line)
    return max(groups.values(), key=lambda those: (len(budgets(those, budget)), len(those)))


def _panel(
    board: Board,
    methods: Mapping[str, Sequence[Line]],
    index: int,
    family: str,
    name: str,
    label: str,
    budget: Callable[[Line], float | None],
) -> Figure:
    def score(line: Line) -> float:
        return 100 * line.families[index].paired.compressed

    way = usual_way(line.fidelity for those in methods.values() for line in those if line.fidelity)

    def bits_per_byte(line: Line) -> float | None:
        found = line.fidelity
        return found.compressed_bits_per_byte if found and found.way == way else None

    def finite_bits(line: Line) -> float | None:
        """None also if bits per byte are infinite: the table shows that, but it cannot be drawn."""
        bits = bits_per_byte(line)
        return bits if bits is not None and math.isfinite(bits) else None

    every = [line for method in sorted(methods) for line in methods[method]]
    dense = 100 * every[0].families[index].paired.dense
    with drawing() as library:
        figure = library.figure.Figure(figsize=SIZE, layout="constrained")
        axes = axes_of(figure, STAND_IN, xlabel=label, ylabel="Score, %")
        axes.axhline(dense, color=STAND_IN["soft"], linewidth=1, dashes=(1, 2))
        _lines(axes, methods, budget, score)
        if any(finite_bits(line) is not None for line in every):
            _overlay(axes, methods, budget, finite_bits)
        axes.set_ylim(-3, 103)
        if label.startswith("Bits"):
            axes.invert_xaxis()  # damage grows to the right, as in the figure of the share removed
        axes.xaxis.set_major_locator(library.ticker.MaxNLocator(6, steps=[1, 2, 5, 10]))
        title, about = family.capitalize(), f"Dense scores {dense:.1f} %."
        seen = f"Score against {label.lower()} of {', '.join(sorted(methods))}. {about}"
        svg = inline(figure, f"curve-{name}", title, seen, {f"models/{line.slug}.html": line.name for line in every})
    rows = tuple(
        (
            method, line.name, f"{budget(line) or 0:.4g}", f"{score(line):.1f}",
            "" if (bpb := bits_per_byte(line)) is None else f"{bpb:.3f}",
        )
        for method in sorted(methods)
        for line in methods[method]
    )  # fmt: skip
    header = ("method", "model", label.lower(), "score, %", "bits per byte")
    return Figure(title=title, about=about, svg=svg, header=header, rows=rows)


def _lines(
    axes: Any,
    methods: Mapping[str, Sequence[Line]],
    budget: Callable[[Line], float | None],
    height: Callable[[Line], float | None],
) -> None:
    """Draw a line per method through the models of its usual settings, and a dot per model."""
    for i, method in enumerate(sorted(methods)):
        colour = STAND_IN[f"c{1 + i % SERIES}"]
        axes.plot(*_means(usual(methods[method], budget), budget, height), color=colour)
        dots = axes.scatter(
            [budget(line) for line in methods[method]], [height(line) for line in methods[method]],
            marker=MARKERS[i % len(MARKERS)], s=26, color=colour, zorder=3, linewidths=0,
        )  # fmt: skip
        dots.set_urls([f"models/{line.slug}.html" for line in methods[method]])


def _overlay(
    axes: Any,
    methods: Mapping[str, Sequence[Line]],
    budget: Callable[[Line], float | None],
    height: Callable[[Line], float | None],
) -> None:
    """Draw bits per byte, dashed and thin, on an inverted axis on the right, so that up is better there, too.

    The axis runs from about the dense model's value at the top to at least twice that: if it were fitted to the data,
    any change would look large.
    """
    every = [line for those in methods.values() for line in those]
    dense = next(line.fidelity.dense_bits_per_byte for line in every if line.fidelity and height(line) is not None)
    other = axes.twinx()
    other.set_ylabel("Bits per byte (dashed)", color=STAND_IN["soft"], fontsize=8)
    other.tick_params(colors=STAND_IN["soft"], labelsize=7.5, length=3)
    for side, spine in other.spines.items():
        spine.set(visible=side == "right", color=STAND_IN["line"])
    for i, method in enumerate(sorted(methods)):
        xs, ys = _means(usual(methods[method], budget), budget, height)
        other.plot(xs, ys, color=STAND_IN[f"c{1 + i % SERIES}"], linewidth=1, linestyle=(0, (4, 3)), alpha=0.75)
    worst = max(height(line) or 0.0 for line in every)
    other.set_ylim(max(2 * dense, 1.02 * worst), 0.97 * dense)


def _means(
    lines: Sequence[Line], budget: Callable[[Line], float | None], height: Callable[[Line], float | None]
) -> tuple[list[float], list[float]]:
    heights: dict[float, list[float]] = defaultdict(list)
    for line in lines:
        across, up = budget(line), height(line)
        if across is not None and up is not None:
            heights[across].append(up)
    return sorted(heights), [sum(heights[x]) / len(heights[x]) for x in sorted(heights)]
