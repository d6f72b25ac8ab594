"""The geometry of a report's plots as plain data: coordinates of lines, dots and names, drawn by `report.html.j2`."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from compress_evals.comparison import retained
from compress_evals.results import Results, versus
from compress_evals.stats import verdict_text
from compress_evals.wording import byte_size, points

LETTER = 7.2  # generous estimate of a letter's width in the 12.5 px font of a plot


@dataclass(frozen=True, kw_only=True)
class Whisker:
    """One difference with its interval, in the coordinates of the forest plot."""

    y: float
    x: float
    low: float
    high: float
    verdict: str
    text: str


@dataclass(frozen=True, kw_only=True)
class Forest:
    """The forest plot of one model's differences by task; `bands` span the losses that count as matching."""

    model: str
    width: int
    height: int
    left: int
    zero: float
    ticks: tuple[tuple[float, str], ...]
    labels: tuple[tuple[float, str], ...]
    bands: tuple[tuple[float, float, float], ...]
    whiskers: tuple[Whisker, ...]


@dataclass(frozen=True, kw_only=True)
class Dot:
    """One model in the scatter plot: its mean and worst family, which a line joins, and the place of its name."""

    x: float
    y: float
    worst_y: float
    name: str
    name_x: float
    name_y: float
    anchor: str
    dense: bool


@dataclass(frozen=True, kw_only=True)
class Scatter:
    """The scatter plot of quality kept against size on disk."""

    width: int
    height: int
    left: int
    bottom: int
    x_ticks: tuple[tuple[float, str], ...]
    y_ticks: tuple[tuple[float, str], ...]
    dots: tuple[Dot, ...]


def forest(result: Results, width: int = 980) -> Forest:
    """The forest plot of one model: a row per task, with its margin as a band."""
    comparison, step = versus(result), 26
    pairs = [(cell.title, cell.paired) for cell in comparison.tasks.values()]
    left = max(190, *(round(LETTER * len(title)) + 20 for title, _ in pairs))
    lowest = min(-0.1, *(min(pair.low, -pair.margin) for _, pair in pairs))
    highest = max(0.05, *(pair.high for _, pair in pairs))
    spacing = _spacing(highest - lowest)
    first, last = math.floor(lowest / spacing), math.ceil(highest / spacing)

    def place(value: float) -> float:
        return round(left + (value / spacing - first) / (last - first) * (width - left - 20), 1)

    def line(i: int) -> float:
        return 24 + i * step

    return Forest(
        model=result.model.name,
        width=width,
        height=24 + len(pairs) * step + 26,
        left=left,
        zero=place(0.0),
        ticks=tuple((place(i * spacing), _tick(i * spacing)) for i in range(first, last + 1)),
        labels=tuple((line(i), title) for i, (title, _) in enumerate(pairs)),
        bands=tuple((line(i), place(-pair.margin), place(0.0)) for i, (_, pair) in enumerate(pairs)),
        whiskers=tuple(
            Whisker(
                y=line(i),
                x=place(pair.delta),
                low=place(pair.low),
                high=place(pair.high),
                verdict=pair.verdict,
                text=f"{title}: {points(pair)} points, {verdict_text(pair)}",
            )
            for i, (title, pair) in enumerate(pairs)
        ),
    )


def scatter(dense: Results, compressed: Sequence[Results]) -> Scatter | None:
    """The scatter plot of quality kept against bytes on disk; None if the size of any model is unknown."""
    shown = [(result, result.model.bytes_on_disk) for result in (dense, *compressed)]
    sizes = [size for _, size in shown if size]
    if len(sizes) != len(shown):
        return None
    width, height, left, right, bottom, top = 980, 380, 60, 40, 46, 34
    spacing = _spacing(max(sizes) * 1.05)
    most = math.ceil(max(sizes) * 1.05 / spacing) * spacing

    def across(size: float) -> float:
        return round(left + size / most * (width - left - right), 1)

    kept = [_kept(dense, result) for result, _ in shown]
    highest = max(1.0, *(share for pair in kept for share in pair))  # a compressed model may score above dense
    step = max(0.25, _spacing(highest))

    def up(share: float) -> float:
        return round(height - bottom - max(share, 0.0) / highest * (height - bottom - top), 1)

    spots = [(across(size), up(mean)) for size, (mean, _) in zip(sizes, kept, strict=True)]
    names = [result.model.name for result, _ in shown]
    dots = zip(names, spots, kept, place_names(names, spots, width), strict=True)
    return Scatter(
        width=width,
        height=height,
        left=left,
        bottom=bottom,
        x_ticks=tuple((across(i * spacing), byte_size(i * spacing)) for i in range(round(most / spacing) + 1)),
        y_ticks=tuple((up(i * step), f"{100 * i * step:.0f} %") for i in range(int(highest / step) + 1)),
        dots=tuple(
            Dot(x=x, y=y, worst_y=up(worst), name=name, name_x=at[0], name_y=at[1], anchor=anchor, dense=i == 0)
            for i, (name, (x, y), (_, worst), (*at, anchor)) in enumerate(dots)
        ),
    )


def place_names(
    names: Sequence[str], spots: Sequence[tuple[float, float]], width: float
) -> list[tuple[float, float, str]]:
    """The place and text anchor of each name beside its point; the first free candidate is taken, so few overlap."""
    taken: list[tuple[float, float, float]] = [(x - 6, x + 6, y) for x, y in spots]
    placed = []
    for name, (x, y) in zip(names, spots, strict=True):
        length = LETTER * len(name)
        choices = [(side, dy) for dy in (-8, 18, -24, 34) for side in (1, -1)]
        boxes = [(x + 9 if side > 0 else x - 9 - length, y + dy, side) for side, dy in choices]
        inside = [box for box in boxes if box[0] >= 0 and box[0] + length <= width] or boxes
        free = [
            (left, at, side)
            for left, at, side in inside
            if all(left > b or left + length < a or abs(at - 4 - c) > 12 for a, b, c in taken)
        ]
        left, at, side = (free or inside)[0]
        taken.append((left, left + length, at - 4))
        placed.append((x + 9 * side, at, "start" if side > 0 else "end"))
    return placed


def _kept(dense: Results, result: Results) -> tuple[float, float]:
    """The mean and the minimum over families of the share kept of the dense score above chance."""
    shares = list(retained(dense.tasks, result.tasks).values()) or [0.0]
    return sum(shares) / len(shares), min(shares)


def _tick(fraction: float) -> str:
    rounded = round(100 * fraction)
    return f"{rounded:+d}".replace("-", "−") if rounded else "0"


def _spacing(extent: float) -> float:
    """A round distance between ticks that fits at most nine times into `extent`."""
    power = 10.0 ** math.floor(math.log10(extent))
    return next(power * step for step in (0.1, 0.2, 0.5, 1.0, 2.0) if extent / (power * step) <= 9)
