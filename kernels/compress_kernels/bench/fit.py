"""`python -m compress_kernels.bench.fit LINES.jsonl`: how many times longer than its roofline each format takes.

Computes the `slack` of `defaults.json` from the lines that `compress_kernels.bench.gpu` has written: for each kind of
packed form, the medians over shapes with tiles of 8, 16 and 64 rows of x. Nothing is measured here.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from compress_kernels import dispatch
from compress_kernels.bench.subjects import ours

TILES = (8, 16, 64)
SAMPLE = (128, 1024)  # [out, in] of a matrix that is packed to find each format's kind and bits per weight


def forms() -> dict[str, tuple[str, dispatch.Format]]:
    """For each format name in the lines: the name of its slack, and its costs without slack."""
    found = {}
    for each in ours():
        form = each.pack(torch.randn(SAMPLE, generator=torch.Generator().manual_seed(0)).half())
        small = 0 < int(getattr(form, "group", 0)) < dispatch.SMALL
        known = replace(dispatch.format_of(form, SAMPLE[0] * SAMPLE[1]), slack=(1.0, 1.0, 1.0))
        found[each.name] = (f"{form.kind} g32" if small else str(form.kind), known)
    return found


def ratios(
    lines: Iterable[Mapping[str, Any]], device: dispatch.Device, rows: Collection[int] = TILES, shipped: bool = False
) -> dict[str, dict[int, list[float]]]:
    """By slack and by rows: the measured over the expected time for each shape that a kernel computed.

    Both times are taken without the launch overhead (`dispatch.START`). With `shipped`, the expected time has the
    shipped slack and the overhead is included.
    """
    known, found = forms(), defaultdict[str, dict[int, list[float]]](lambda: defaultdict(list))
    start = 0.0 if shipped else dispatch.START
    for line in lines:
        if line.get("rows") in rows and line["format"] in known and line.get("way") == dispatch.KERNEL:
            name, form = known[line["format"]]
            form = replace(form, bytes=line["bytes"] / (line["out"] * line["in"]))
            form = replace(form, slack=dispatch.SLACK[name]) if shipped else form
            expected = dispatch.predict(form, line["rows"], line["out"] * line["in"], device, dispatch.KERNEL)
            found[name][line["rows"]].append((line["seconds"] - start) / (expected.seconds - start))
    return found


def main() -> None:
    """Print the slack of every format."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("lines", type=Path)
    path = parser.parse_args().lines
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        device = dispatch.known(lines[0]["conditions"]["device"])
    except (OSError, ValueError, LookupError, TypeError) as error:
        parser.error(f"{path}: no lines of compress_kernels.bench.gpu: {error}")
    for name, tiles in ratios(lines, device).items():
        slack = [round(statistics.median(tiles[rows]), 2) for rows in TILES]
        sys.stdout.write(f'  "{name}": {json.dumps(slack)},\n')


if __name__ == "__main__":
    main()
