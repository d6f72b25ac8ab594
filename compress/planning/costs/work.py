"""The units of cost, and what several passes have in common. Shape suffixes: O out, I in."""

from __future__ import annotations

from dataclasses import dataclass, replace

from compress.weights.grid import COARSE

F32 = 4  # bytes
DOUBLE = 2.5  # times that an eigenvector problem takes in float64
CHOOSING = 150  # passes over the entries that order statistics take
CHOOSING_FEW = 50  # passes that comparing the pairs of n:m takes
CODING = 65  # passes of rounding once, and of pow(2.4) in the search of a range
POWERS = 50  # times that; 79 ranges are tried, of which a part stays in the cache
TRYING = 17  # passes of a range that is tried by its output, beside the products
CHOSEN = 30  # bytes an entry while a mask is chosen: scores, order statistics with their places, counts of ties
MEASURED = 12  # bytes an entry while errors are measured: both matrices in float32 and their difference
COLUMN = 25  # small calls that error feedback takes for a column, those of the strip and the block among them


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one matrix takes: `flops` of float32 products, `cubes` n**3 of eigenvectors, `passes` over its entries in
    float32, `calls` of small operations in a loop; `nbytes` at its largest, beside the weight and its statistics."""

    nbytes: float = 0
    flops: float = 0
    cubes: float = 0
    passes: float = 0
    calls: float = 0

    def __add__(self, other: Work) -> Work:
        """One after the other: what one held is free by then."""
        return Work(
            nbytes=max(self.nbytes, other.nbytes), flops=self.flops + other.flops, cubes=self.cubes + other.cubes,
            passes=self.passes + other.passes, calls=self.calls + other.calls,
        )  # fmt: skip

    def times(self, count: float) -> Work:
        """So many times, one after the other."""
        return Work(
            nbytes=self.nbytes, flops=count * self.flops, cubes=count * self.cubes, passes=count * self.passes,
            calls=count * self.calls,
        )  # fmt: skip

    def beside(self, nbytes: float) -> Work:
        """While so many bytes more are held."""
        return replace(self, nbytes=self.nbytes + nbytes)


def choosing(sparsity: float | str | None) -> float:
    """Passes over the entries that a mask by scores takes."""
    return 0 if sparsity is None else CHOOSING_FEW if isinstance(sparsity, str) else CHOOSING


def rounding(search: bool | str, group: int, rows: int, columns: int) -> Work:
    """Codes to nearest on grids whose ranges are searched or not; `columns` for grids of rows."""
    entries, width = rows * columns, group if group > 0 else columns
    if search == "output":
        passes, flops = CODING + TRYING * COARSE, 2.0 * COARSE * entries * width
    else:
        passes, flops = CODING * (1 + (POWERS if search else 1)), 0.0
    return Work(nbytes=(F32 + 1) * entries + min(20 * entries, 40e6), passes=passes, flops=flops)


def factor(columns: int) -> Work:
    """The factor of the inverse Gram."""
    return Work(nbytes=3 * F32 * columns**2, flops=columns**3)


def sweep(rows: int, columns: int) -> Work:
    """Error feedback by that factor, columns in blocks."""
    held = 3 * F32 * (columns**2 + rows * columns)
    return Work(nbytes=held, flops=1.0 * rows * columns**2, passes=CODING, calls=COLUMN * columns)


def directions(rows: int, columns: int, metric: bool = True) -> Work:
    """The directions of the output by the eigenvectors of the shorter side, in float32.

    Where that does not tell them apart (`principal`) it is done again in float64, which no shape foretells: that takes
    twice the memory and two to three times as long.
    """
    side = min(rows, columns)
    return Work(
        nbytes=F32 * (3 * rows * columns + 4 * side**2), cubes=side**3, passes=CODING,
        flops=2.0 * rows * columns * (columns * metric + side),
    )  # fmt: skip


def energy(rows: int, columns: int, times: int = 1) -> Work:
    """The error of an output by the Gram."""
    return Work(nbytes=3 * F32 * rows * columns, flops=2.0 * times * rows * columns**2, passes=4 * times)


def conjugated(rows: int, columns: int, steps: int) -> Work:
    """Least squares of all rows under a mask, by so many steps of conjugate gradients."""
    return Work(
        nbytes=F32 * (7 * rows * columns + columns**2), flops=2.0 * (3 + steps) * rows * columns**2,
        passes=20 + 12 * steps,
    )  # fmt: skip
