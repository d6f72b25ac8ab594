"""`python -m compress_kernels.bench`: packed CPU products against the bf16 product, in one run.

Prints the median and the spread of each ratio; weights rotate through enough copies to leave the cache.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from compress_kernels.cpu import Int4, Int8

COPIES = 8


def seconds(calls: list[Callable[[], Tensor]], repeats: int) -> list[float]:
    """Time of one call each, over `repeats` rounds of all calls."""
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        for call in calls:
            call()
        times.append((time.perf_counter() - began) / len(calls))
    return times


def row(size: tuple[int, int], rows: int, repeats: int) -> str:
    """One line of the table: int4 and int8 time as ratios to bf16."""
    out, inputs = size
    x = torch.randn(rows, inputs, dtype=torch.bfloat16)
    plain = [torch.randn(out, inputs).bfloat16() for _ in range(COPIES)]
    scale = torch.rand(out, inputs // 64) + 0.5
    int4 = [Int4.pack(torch.randint(0, 16, (out, inputs)), scale, 8.0) for _ in range(COPIES)]
    int8 = [Int8.pack(torch.randint(0, 256, (out, inputs)), torch.rand(out)) for _ in range(COPIES)]
    sets: list[list[Callable[[], Tensor]]] = [
        [lambda w=w: F.linear(x, w) for w in plain],  # type: ignore[misc]
        [lambda w=w: w.linear(x) for w in int4],  # type: ignore[misc]
        [lambda w=w: w.linear(x) for w in int8],  # type: ignore[misc]
    ]
    for calls in sets:
        seconds(calls, 2)
    base, four, eight = (seconds(calls, repeats) for calls in sets)
    cells = []
    for times in (four, eight):
        ratios = [b / t for b, t in zip(base, times, strict=True)]
        cells.append(f"{statistics.median(ratios):5.2f}x ({min(ratios):.2f}-{max(ratios):.2f})")
    return f"{out}x{inputs} | {rows} | {statistics.median(base) * 1e3:.3f} ms | {cells[0]} | {cells[1]}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    write = sys.stdout.write
    write(f"cpu, torch {torch.__version__}, {arguments.threads} threads, {arguments.repeats} runs, {COPIES} copies\n")
    write("speed-up over bf16: median (min-max)\nweight | rows | bf16 | int4 g64 | int8 row\n")
    for size in ((256, 256), (768, 256), (1024, 1024), (2048, 2048), (4096, 4096)):
        for rows in (1, 4, 8, 16):
            write(row(size, rows, arguments.repeats) + "\n")


if __name__ == "__main__":
    main()
