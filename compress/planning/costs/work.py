"""The units of cost, and the cost of steps that several passes share.

A pass over the entries of a matrix reads and writes each of them once, in float32. How many such passes a step is worth
was fitted to measured times (docs/plan.md). Shape suffixes: O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from compress.weights.grid import COARSE

F32 = 4  # bytes
DOUBLE = 2.5  # how many times longer an eigendecomposition takes in float64
CHOOSING = 150  # passes over the entries to find order statistics
CHOOSING_FEW = 50  # passes to compare the pairs of entries in the groups of n:m
CODING = 65  # passes to round once, and for pow(2.4) in the search of a range
POWERS = 50  # times CODING for such a search: it tries 79 ranges, but partly in cache
TRYING = 17  # passes for each range tried by its output error, beside the products
CHOSEN = 30  # bytes per entry while a mask is chosen: scores, order statistics with their indices, counts of ties
MEASURED = 12  # bytes per entry while an error is measured: both matrices in float32 and their difference
COLUMN = 25  # small calls of error feedback per column, including those of its strip and its block


@dataclass(frozen=True, kw_only=True)
class Work:
    """The cost of work on one matrix.

    `nbytes` is the peak memory in addition to the weight and its statistics, `flops` the operations of float32
    products, `cubes` the n**3 of eigendecompositions, `passes` those over its entries in float32, and `calls` the small
    operations called in a loop.
    """

    nbytes: float = 0
    flops: float = 0
    cubes: float = 0
    passes: float = 0
    calls: float = 0

    def __add__(self, other: Work) -> Work:
        """The cost of one after the other; the memory of the first is free by then."""
        return Work(
            nbytes=max(self.nbytes, other.nbytes), flops=self.flops + other.flops, cubes=self.cubes + other.cubes,
            passes=self.passes + other.passes, calls=self.calls + other.calls,
        )  # fmt: skip

    def times(self, count: float) -> Work:
        """The cost of this work done `count` times, one after the other."""
        return Work(
            nbytes=self.nbytes, flops=count * self.flops, cubes=count * self.cubes, passes=count * self.passes,
            calls=count * self.calls,
        )  # fmt: skip

    def beside(self, nbytes: float) -> Work:
        """The cost while `nbytes` more bytes are held."""
        return replace(self, nbytes=self.nbytes + nbytes)


def choosing(sparsity: float | str | None) -> float:
    """Passes over the entries to choose a mask by scores; 0 without a sparsity."""
    return 0 if sparsity is None else CHOOSING_FEW if isinstance(sparsity, str) else CHOOSING


def rounding(search: bool | str, group: int, rows: int, columns: int) -> Work:
    """Rounding to nearest on grids, whose ranges may be searched; a `group` of 0 or less means a whole row."""
    entries, width = rows * columns, group if group > 0 else columns
    if search == "output":
        passes, flops = CODING + TRYING * COARSE, 2.0 * COARSE * entries * width
    else:
        passes, flops = CODING * (1 + (POWERS if search else 1)), 0.0
    return Work(nbytes=(F32 + 1) * entries + min(20 * entries, 40e6), passes=passes, flops=flops)


def factor(columns: int) -> Work:
    """The Cholesky factor of the inverse Gram."""
    return Work(nbytes=3 * F32 * columns**2, flops=columns**3)


def sweep(rows: int, columns: int) -> Work:
    """Error feedback with that factor, columns in blocks."""
    held = 3 * F32 * (columns**2 + rows * columns)
    return Work(nbytes=held, flops=1.0 * rows * columns**2, passes=CODING, calls=COLUMN * columns)


def directions(rows: int, columns: int, metric: bool = True) -> Work:
    """The principal directions of the output, from the eigenvectors of the shorter side, in float32.

    Where float32 cannot separate them, `principal` computes them again in float64, with twice the memory and in two to
    three times the time. Shapes do not tell when, so this is not counted.
    """
    side = min(rows, columns)
    return Work(
        nbytes=F32 * (3 * rows * columns + 4 * side**2), cubes=side**3, passes=CODING,
        flops=2.0 * rows * columns * (columns * metric + side),
    )  # fmt: skip


def energy(rows: int, columns: int, times: int = 1) -> Work:
    """The error of the output, computed from the Gram, `times` over."""
    return Work(nbytes=3 * F32 * rows * columns, flops=2.0 * times * rows * columns**2, passes=4 * times)


def conjugated(rows: int, columns: int, steps: int) -> Work:
    """Least squares of all rows under a mask, by `steps` steps of conjugate gradients."""
    return Work(
        nbytes=F32 * (7 * rows * columns + columns**2), flops=2.0 * (3 + steps) * rows * columns**2,
        passes=20 + 12 * steps,
    )  # fmt: skip
