"""The figures of quality against size and speed, and of flips against difference.

Not here: the damage curves (`curves.py`). Each figure comes with its numbers as a table, for readers who cannot see it.
The heat map of tasks is itself a table (`heat.py`), because coloured cells are easier to read with numbers in them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from compress_evals.leaderboard.labels import along, placed
from compress_evals.leaderboard.rank import Kept
from compress_evals.leaderboard.svg import LIGHT, STAND_IN, axes_of, drawing, inline, save_picture
from compress_evals.leaderboard.table import Line
from compress_evals.wording import byte_size, signed

WIDE = 4  # the x axis is logarithmic if its largest value is more than this many times its smallest
NAMED = 14  # names that fit beside the points of a front
SIZE = (5.4, 3.7)  # inches; the page scales it


@dataclass(frozen=True, kw_only=True)
class Figure:
    """One figure of the page: `svg` is trusted markup made here, everything else is text to be escaped."""

    title: str
    about: str
    svg: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One model as a point, with the interval of its y value; `link` is the address of its page."""

    name: str
    x: float
    y: float
    low: float
    high: float
    link: str


def worst_of(line: Line) -> Kept | None:
    """The share of the dense score that the model's worst family kept."""
    return line.standing.kept


def mean_of(line: Line) -> Kept | None:
    """The share of the dense score that the model kept on average over families."""
    return line.standing.mean


def trade_offs(lines: Sequence[Line]) -> list[Figure]:
    """Quality (the worst family, then the mean) against bytes, and against speed where it was measured."""
    found = []
    for x, axis, less, tick in (
        (lambda line: line.bytes, "Bytes on disk", True, byte_size),
        (
            lambda line: line.speed.ratio if line.speed else None,
            "Decoding speed against dense",
            False,
            "{:.3g}×".format,
        ),
    ):
        for kept, what in ((worst_of, "Worst family kept"), (mean_of, "Kept on average")):
            spots = points(lines, x, kept)
            if spots:
                found.append(_trade_off(spots, axis, what, less, tick))
    return found


def points(
    lines: Sequence[Line], x: Callable[[Line], float | None], kept: Callable[[Line], Kept | None]
) -> list[Point]:
    """The points of the lines that have both coordinates; y values are in percent."""
    return [
        Point(
            name=line.name, x=across, y=100 * share.value, low=100 * share.low, high=100 * share.high,
            link=f"models/{line.slug}.html",
        )
        for line in lines
        if (across := x(line)) is not None and (share := kept(line)) is not None
    ]  # fmt: skip


def front(spots: Sequence[Point], less: bool) -> list[Point]:
    """The Pareto front, starting at the best x value: the smallest if `less`, else the largest."""
    best, kept = -math.inf, []
    for point in sorted(spots, key=lambda p: (p.x if less else -p.x, -p.y)):
        if point.y > best:
            kept.append(point)
            best = point.y
    return kept


def picture(lines: Sequence[Line], path: Path) -> None:
    """Write the trade-off of worst family against bytes to a file, in light colours."""
    with drawing():
        save_picture(_draw(points(lines, lambda line: line.bytes, worst_of), LIGHT, "Bytes on disk",
                           "Worst family kept, % of dense", True, byte_size), path)  # fmt: skip


def flips(lines: Sequence[Line]) -> Figure:
    """The share of answers that flipped, against the net difference in score."""
    title, links = "Flips against difference", {f"models/{line.slug}.html": line.name for line in lines}
    with drawing() as library:
        figure = library.figure.Figure(figsize=SIZE, layout="constrained")
        axes = axes_of(figure, STAND_IN, xlabel="Mean difference from dense, points", ylabel="Answers that flipped, %")
        widest = max([1.0, *(100 * abs(line.delta) for line in lines)])
        axes.plot([-widest, 0, widest], [widest, 0, widest], color=STAND_IN["soft"], linewidth=1, dashes=(3, 3))
        _dots(axes, [(100 * line.delta, 100 * line.flips, f"models/{line.slug}.html") for line in lines], STAND_IN)
        svg = inline(figure, "flips", title, "Each point is a model; none can lie below the dashed lines.", links)
    return Figure(
        title=title,
        about="A model on the dashed line only lost, or only gained. The further above it, the more answers changed in "
        "both directions and cancelled: a difference near zero with many flips means different answers, not an "
        "unchanged model.",
        svg=svg,
        header=("model", "difference, points", "flips, %"),
        rows=tuple((line.name, signed(line.delta), f"{100 * line.flips:.1f}") for line in lines),
    )


def _trade_off(spots: Sequence[Point], axis: str, what: str, less: bool, tick: Callable[[float], str]) -> Figure:
    best = front(spots, less)
    title = f"{what} against {axis[0].lower()}{axis[1:]}"
    about = f"{len(spots)} models with 95 % intervals; on the front, which no other model beats: " + ", ".join(
        point.name for point in best[:NAMED]
    )
    name = f"{'size' if less else 'speed'}-{'worst' if what.startswith('Worst') else 'mean'}"
    with drawing():
        figure = _draw(spots, STAND_IN, axis, f"{what}, % of dense", less, tick)
        svg = inline(figure, name, title, about, {point.link: point.name for point in spots})
    kept = {id(point) for point in best}
    return Figure(
        title=title,
        about="Bars are 95 % intervals; the line is the front: the models that no other beats at their size or below."
        if less
        else "Bars are 95 % intervals; the line is the front: the models that no other beats at their speed or above.",
        svg=svg,
        header=("model", axis.lower(), f"{what.lower()}, %", "on the front"),
        rows=tuple(
            (p.name, tick(p.x), f"{p.y:.1f} [{p.low:.1f}, {p.high:.1f}]", "yes" if id(p) in kept else "")
            for p in sorted(spots, key=lambda p: p.x)
        ),
    )


def _draw(
    spots: Sequence[Point], colours: Mapping[str, str], xlabel: str, ylabel: str, less: bool, tick: Callable[..., str]
) -> Any:
    from matplotlib.figure import Figure as Canvas
    from matplotlib.ticker import FuncFormatter, NullLocator

    figure = Canvas(figsize=SIZE, layout="constrained")
    axes = axes_of(figure, colours, xlabel=xlabel, ylabel=ylabel)
    best = front(spots, less)
    axes.axhline(100, color=colours["soft"], linewidth=1, dashes=(3, 3))
    for p in spots:
        axes.plot([p.x, p.x], [p.low, p.high], color=colours["soft"], linewidth=1, alpha=0.6)
    axes.step([p.x for p in best], [p.y for p in best], where="post" if less else "pre", color=colours["accent"])
    edge = {id(p) for p in best}
    _dots(axes, [(p.x, p.y, p.link) for p in spots if id(p) not in edge], colours, "card")
    _dots(axes, [(p.x, p.y, p.link) for p in best], colours)
    xs = [p.x for p in spots] or [1.0]
    if max(xs) > WIDE * min(xs) > 0:
        axes.set_xscale("log")
        low, high = (math.log10(bound(xs)) for bound in (min, max))
        axes.set_xticks([10 ** (low + i * (high - low) / 4) for i in range(5)])
        axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: tick(value)))
    axes.margins(x=0.12, y=0.12)
    _names(figure, axes, best, spots, colours)
    return figure


def _dots(
    axes: Any, spots: Sequence[tuple[float, float, str]], colours: Mapping[str, str], fill: str = "accent"
) -> None:
    if spots:
        dots = axes.scatter(
            [x for x, _, _ in spots], [y for _, y, _ in spots], s=30, zorder=3, linewidths=1.2,
            facecolors=colours[fill], edgecolors=colours["accent"],
        )  # fmt: skip
        dots.set_urls([link for _, _, link in spots])


def _names(figure: Any, axes: Any, best: Sequence[Point], spots: Sequence[Point], colours: Mapping[str, str]) -> None:
    """Write the names of models on the front beside their points, without changing the layout of the figure."""
    figure.draw_without_rendering()
    scale = 72 / figure.dpi
    (left, bottom), (right, top) = axes.get_window_extent().get_points() * scale

    def at(x: float, y: float) -> tuple[float, float]:
        across, up = axes.transData.transform((x, y)) * scale
        return float(across), float(up)

    named = best[:: max(1, math.ceil(len(best) / NAMED))]
    names = [p.name if len(p.name) <= 24 else p.name[:23] + "…" for p in named]
    line = along([at(*corner) for corner in zip(*axes.lines[-1].get_data(), strict=True)])
    anchors, room = [at(p.x, p.y) for p in named], (left, bottom, right + 0.1 * (right - left), top)
    for p, name, anchor, corner in zip(
        named, names, anchors, placed(names, anchors, [at(p.x, p.y) for p in spots], line, room), strict=True
    ):
        shift = corner[0] - anchor[0], corner[1] - anchor[1]
        text = axes.annotate(
            name, (p.x, p.y), xytext=shift, textcoords="offset points", fontsize=8, color=colours["ink"],
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": colours["soft"], "linewidth": 0.5},
            bbox={"facecolor": colours["card"], "edgecolor": "none", "alpha": 0.85, "pad": 0.4},
        )  # fmt: skip
        text.set_in_layout(False)
