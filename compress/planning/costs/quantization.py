"""What quantizers cost. Shape suffixes: O out, I in."""

from __future__ import annotations

from typing import Any

from compress.passes.kmeans import ROUNDS, SAMPLES
from compress.planning.costs.work import CODING, COLUMN, F32, Work, factor, rounding, sweep
from compress.weights.grid import AT_ONCE

SPLITTING = 2500  # passes of up to 20 iterations of HQQ, which end where no group gains
TABLED = 320  # passes of looking up the nearest of a format's own values
LATTICE = 10_000  # passes of the nearest points of E8P: 256 patterns are scored for each vector of eight
COMPARING = 34  # passes of comparing a vector with an entry of a k-means book, in a table of its own
LOADED = 48e6  # bytes that bitsandbytes loads at its first call
TURNING = 30  # passes of a Hadamard transform, one for every power of two


def rounded(step: Any, rows: int, columns: int) -> Work:
    """Codes to nearest, the range searched or not."""
    return rounding(step.search, step.group, rows, columns)


def compensated(step: Any, rows: int, columns: int) -> Work:
    """GPTQ: ranges as they are reached or before, and a sweep."""
    masked = Work(calls=columns * COLUMN / 4 * (step.target == "original"))
    work = factor(columns) + sweep(rows, columns) + masked
    return work + rounding(step.search, step.group, rows, columns) if step.search else work


def split(step: Any, rows: int, columns: int) -> Work:
    """HQQ, a few million entries at a time."""
    del step
    return Work(nbytes=3 * rows * columns + 40 * min(rows * columns, AT_ONCE), passes=SPLITTING)


def tabled(step: Any, rows: int, columns: int) -> Work:
    """MXFP4: the nearest of 16 values, under two exponents if one is searched."""
    return Work(nbytes=20 * rows * columns, passes=TABLED * (3 if step.exponent == "search" else 1))


def looked_up(step: Any, rows: int, columns: int) -> Work:
    """NVFP4, and NF4 by another library, which loads more when it is first called."""
    return Work(nbytes=20 * rows * columns + LOADED * (step.name == "nf4"), passes=0.7 * TABLED)


def plain(step: Any, rows: int, columns: int) -> Work:
    """FP8 and int8: a scale a row, and a cast."""
    del step
    return Work(nbytes=12 * rows * columns, passes=CODING / 2)


def turned(step: Any, rows: int, columns: int) -> Work:
    """A rotation of the inputs."""
    del step
    return Work(nbytes=3 * F32 * rows * columns, passes=TURNING)


def coded(step: Any, rows: int, columns: int) -> Work:
    """Vectors with error feedback, behind a rotation of matrix and Gram, by E8P or by a book that is fitted."""
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
