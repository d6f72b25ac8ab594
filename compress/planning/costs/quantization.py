"""The costs of quantizers. Shape suffixes: O out, I in."""

from __future__ import annotations

from typing import Any

from compress.passes.kmeans import ROUNDS, SAMPLES
from compress.planning.costs.work import CODING, COLUMN, F32, Work, factor, rounding, sweep
from compress.weights.grid import AT_ONCE

SPLITTING = 2500  # passes for up to 20 iterations of HQQ, which stop when no group improves
TABLED = 320  # passes to find the nearest of a format's fixed values
LATTICE = 10_000  # passes to find the nearest E8P points: each vector of eight is scored against 256 patterns
COMPARING = 34  # passes to compare a vector with one entry of a k-means book, by way of a table of scores
LOADED = 48e6  # bytes that bitsandbytes loads on its first call
TURNING = 30  # passes for a Hadamard transform, which takes a step for every power of two


def rounded(step: Any, rows: int, columns: int) -> Work:
    """RTN: rounding to nearest, with or without a search of the ranges."""
    return rounding(step.search, step.group, rows, columns)


def compensated(step: Any, rows: int, columns: int) -> Work:
    """GPTQ: one sweep, and the search of ranges, if any, before it or group by group."""
    masked = Work(calls=columns * COLUMN / 4 * (step.target == "original"))
    work = factor(columns) + sweep(rows, columns) + masked
    return work + rounding(step.search, step.group, rows, columns) if step.search else work


def split(step: Any, rows: int, columns: int) -> Work:
    """HQQ, on about two million entries at a time."""
    del step
    return Work(nbytes=3 * rows * columns + 40 * min(rows * columns, AT_ONCE), passes=SPLITTING)


def tabled(step: Any, rows: int, columns: int) -> Work:
    """MXFP4: the nearest of 16 values, tried with two exponents if the exponent is searched."""
    return Work(nbytes=20 * rows * columns, passes=TABLED * (3 if step.exponent == "search" else 1))


def looked_up(step: Any, rows: int, columns: int) -> Work:
    """NVFP4, and NF4 by bitsandbytes, which loads LOADED bytes on its first call."""
    return Work(nbytes=20 * rows * columns + LOADED * (step.name == "nf4"), passes=0.7 * TABLED)


def plain(step: Any, rows: int, columns: int) -> Work:
    """FP8 and int8: one scale per row, and a cast."""
    del step
    return Work(nbytes=12 * rows * columns, passes=CODING / 2)


def turned(step: Any, rows: int, columns: int) -> Work:
    """Rotate: a rotation of the inputs."""
    del step
    return Work(nbytes=3 * F32 * rows * columns, passes=TURNING)


def coded(step: Any, rows: int, columns: int) -> Work:
    """VQ: vector codes from E8P or a fitted book, with error feedback; `rotate` rotates matrix and Gram first."""
    entries = rows * columns
    finding: float = LATTICE * (1.1 if step.bits > 2 else 1)
    if step.book == "kmeans":
        book, vectors = 2 ** (step.bits * step.width), entries / step.width
        finding = COMPARING * book * (ROUNDS * min(vectors, SAMPLES) / entries + 1 / step.width)
    turning = turned(step, rows, columns) + Work(passes=TURNING * columns / rows) if step.rotate else Work()
    own = Work(passes=finding, calls=COLUMN / 2 * columns).beside(7 * entries + F32 * columns**2)
    return turning + factor(columns) + sweep(rows, columns).beside(own.nbytes) + own


ROWS = {
    "rtn": rounded, "gptq": compensated, "hqq": split, "mxfp4": tabled, "nvfp4": looked_up, "nf4": looked_up,
    "fp8": plain, "int8": plain, "rotate": turned, "vq": coded,
}  # fmt: skip
