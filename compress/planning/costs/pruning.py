"""The costs of pruners and of the passes that refine their masks. Shape suffixes: O out, I in."""

from __future__ import annotations

from math import log2
from typing import Any

from compress.passes.pruning import swaps
from compress.passes.pruning.alps import POLISH
from compress.planning.costs.work import (
    CHOSEN,
    CODING,
    COLUMN,
    DOUBLE,
    F32,
    Work,
    choosing,
    conjugated,
    energy,
    factor,
    rounding,
    sweep,
)

SETTLED = 33  # iterations of ADMM: 30 to 36 for every matrix of the built-in model and of random ones
SOLVED = 18  # conjugate-gradient steps to a residual of 1e-3: 13 to 28 in the built-in model; 50 are allowed
SWAPPED = 18  # inputs of a row for each swap in it, in the built-in model
SWAPPING = 160  # passes for one swap in every row, each of which looks at all entries of its row
DRAWING = 60  # passes to draw a random number for every entry


def chosen(step: Any, rows: int, columns: int) -> Work:
    """Magnitude and Wanda: a mask by scores."""
    return Work(nbytes=CHOSEN * rows * columns, passes=20 + choosing(step.sparsity))


def dealt(step: Any, rows: int, columns: int) -> Work:
    """RIA: a mask; with `permute` also the gain of every column in every group, for each of the m ranks of columns."""
    work = chosen(step, rows, columns) + Work(passes=20)
    if not step.permute:
        return work
    m = int(step.sparsity.split(":")[1])
    groups = columns // m
    looks = Work(nbytes=F32 * 4 * rows * columns, passes=6 * groups, calls=8 * columns)
    return work.times(4) + looks + Work(flops=40.0 * m * groups**3)


def fed_back(step: Any, rows: int, columns: int) -> Work:
    """SparseGPT: one sweep that chooses the mask and, with `bits`, rounds."""
    few = isinstance(step.sparsity, str)  # n:m, where the mask of each group is chosen separately
    coded = rounding(False, step.group, rows, columns) if step.bits else Work()
    own = Work(passes=choosing(step.sparsity), calls=columns * COLUMN * (0.5 * few + 0.25 * bool(step.bits)))
    return factor(columns) + sweep(rows, columns) + own + coded


def alternated(step: Any, rows: int, columns: int) -> Work:
    """ALPS: eigenvectors in float64, two products per iteration, then least squares."""
    count = min(step.iterations, SETTLED)
    eigen = 8 * (4 * columns**2) + 3 * F32 * columns**2  # the Gram in float64, its eigenvectors, LAPACK's workspace
    work = Work(
        nbytes=max(eigen, F32 * (10.5 * rows * columns + 5 * columns**2)), cubes=DOUBLE * columns**3,
        flops=columns**3 + 2.0 * rows * columns**2 * (2 * count + 1), passes=count * (20 + choosing(step.sparsity) / 2),
    )  # fmt: skip
    return work + conjugated(rows, columns, POLISH)


def reconstructed(step: Any, rows: int, columns: int) -> Work:
    """Reconstruct: one sweep under the mask and, with `exact`, least squares; each result is compared with the last."""
    work = (factor(columns) + sweep(rows, columns) + energy(rows, columns, 8)).beside(2 * F32 * rows * columns)
    return work + conjugated(rows, columns, min(step.steps, SOLVED)) if step.method == "exact" else work


def exchanged(step: Any, rows: int, columns: int) -> Work:
    """DSnoT: queues of the best candidates, then one swap per row in each cycle."""
    work = Work(nbytes=33 * rows * columns, passes=500, calls=30 * step.cycles)
    return work + energy(rows, columns, 4) if step.measure else work


def swapped(step: Any, rows: int, columns: int) -> Work:
    """Swaps: one after the other in each row; the sweeps over groups that n:m takes are counted the same way."""
    count = min(step.limit, columns / SWAPPED)
    return Work(
        nbytes=27 * rows * columns + 35 * min(rows * columns, swaps.AT_ONCE), passes=SWAPPING * count,
        flops=2.0 * rows * columns**2, calls=50 * count,
    )  # fmt: skip


def drawn(step: Any, rows: int, columns: int) -> Work:
    """DARE: a random number for every entry; by importance also a few rounds that fit their probabilities."""
    return Work(nbytes=24 * rows * columns, passes=DRAWING + (CODING * log2(columns) if step.keep != "random" else 0))


ROWS = {
    "magnitude": chosen, "wanda": chosen, "ria": dealt, "sparsegpt": fed_back, "alps": alternated,
    "reconstruct": reconstructed, "dsnot": exchanged, "swaps": swapped, "dare": drawn,
}  # fmt: skip
