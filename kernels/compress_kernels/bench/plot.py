"""`python -m compress_kernels.bench.plot LINES.jsonl OUT.png`: plots the speed-up over dense by rows of x and shape.

Reads the lines that `compress_kernels.bench.gpu` has written; nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Lines = list[dict[str, Any]]


def speedups(lines: Lines) -> dict[tuple[int, int], dict[str, list[tuple[int, float]]]]:
    """By shape and format: (rows, speed-up over dense), in the order in which they were measured."""
    timed = [line for line in lines if "seconds" in line]
    dense = {(x["out"], x["in"], x["rows"]): x["seconds"] for x in timed if x["format"] == "dense"}
    found: dict[tuple[int, int], dict[str, list[tuple[int, float]]]] = defaultdict(lambda: defaultdict(list))
    for line in timed:
        key = (line["out"], line["in"], line["rows"])
        if key in dense and line["format"] != "dense":
            found[key[:2]][line["format"]].append((line["rows"], dense[key] / line["seconds"]))
    return found


def draw(lines: Lines, out: Path) -> None:
    """Draw one plot per shape, side by side. Raises ValueError if no format was timed along with dense."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    found = speedups(lines)
    if not found:
        raise ValueError("no format was timed beside dense")
    figure = Figure(figsize=(5 * len(found) + 1.5, 4), layout="constrained")
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    names = list(dict.fromkeys(name for formats in found.values() for name in formats))
    colours = {name: colormaps["tab20"](i % 20) for i, name in enumerate(names)}
    for axis, (shape, formats) in zip(axes, found.items(), strict=True):
        for name, points in formats.items():
            rows, ratios = zip(*points, strict=True)
            dashes = "--" if names.index(name) % 2 else "-"
            axis.plot(rows, ratios, dashes, marker="o", markersize=3, linewidth=1, color=colours[name], label=name)
        axis.axhline(1, color="gray", linewidth=0.8)
        axis.set_xscale("log", base=2)
        measured = sorted({count for points in formats.values() for count, _ in points})
        axis.set_xticks(measured, [str(count) for count in measured])
        axis.set(title=f"{shape[0]} x {shape[1]}", xlabel="rows of x", ylabel="times as fast as dense")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    head: dict[str, Any] = next((line["conditions"] for line in lines if "conditions" in line), {})
    figure.suptitle(", ".join(f"{name} {value}" for name, value in head.items() if name != "clocks"), fontsize=8)
    figure.savefig(out, dpi=120)


def main(arguments: Sequence[str] | None = None) -> None:
    """Read the lines and draw the plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path)
    parser.add_argument("out", type=Path)
    given = parser.parse_args(arguments)
    draw([json.loads(line) for line in given.lines.read_text(encoding="utf-8").splitlines()], given.out)


if __name__ == "__main__":
    main()
