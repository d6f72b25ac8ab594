"""What passes cost beside the walk: memory at its largest and work, from the shape of a matrix.

A row was counted from the source of its pass and then compared with runs (docs/plan.md has the errors). A pass without
a row is not modelled, and the plan says so instead of guessing. Shape suffixes: O out, I in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from compress.passes.base import SitePass


@dataclass(frozen=True, kw_only=True)
class Work:
    """What one matrix takes: `flops` of float32 products, `cubes` n**3 of eigenvectors, `passes` over its entries in
    float32, `calls` of small operations in a loop; `nbytes` at its largest, beside the weight and its statistics."""

    nbytes: float = 0
    flops: float = 0
    cubes: float = 0
    passes: float = 0
    calls: float = 0


F32 = 4  # bytes
CHOOSING = 400  # passes over the entries that order statistics take
CODING = 65  # of rounding once, and of pow(2.4) in the search of a range
CHOSEN = 30  # bytes an entry while a mask is chosen: scores, order statistics with their places, counts of ties
MEASURED = 12  # bytes an entry while errors are measured: both matrices in float32 and their difference


def chosen(step: Any, rows: int, columns: int) -> Work:
    """A mask by scores."""
    del step
    return Work(nbytes=CHOSEN * rows * columns, passes=CHOOSING)


def rounded(step: Any, rows: int, columns: int) -> Work:
    """Codes to nearest, the range searched or not."""
    tries = 45 if step.search is True else 24 if step.search == "output" else 1
    return Work(nbytes=(F32 + 1) * rows * columns + 40e6, passes=CODING * (1 + tries))


def swept(rows: int, columns: int) -> Work:
    """Error feedback: the factor of the inverse Gram, then columns in blocks."""
    factor = 3 * F32 * columns**2
    return Work(
        nbytes=factor + 3 * F32 * rows * columns, flops=columns**3 + 1.0 * rows * columns**2, passes=CODING,
        calls=25 * columns,
    )  # fmt: skip


def fed_back(step: Any, rows: int, columns: int) -> Work:
    """GPTQ and SparseGPT."""
    del step
    return swept(rows, columns)


def factored(step: Any, rows: int, columns: int) -> Work:
    """The directions of the output by the eigenvectors of the shorter side, in float32.

    Where that does not tell them apart (`principal`) it is done again in float64, which no shape foretells: that takes
    twice the memory and two to three times as long.
    """
    del step
    side = min(rows, columns)
    return Work(
        nbytes=F32 * (3 * rows * columns + 4 * side**2), cubes=side**3,
        flops=2.0 * rows * columns * (columns + side), passes=CODING,
    )  # fmt: skip


COSTS: dict[str, Callable[[Any, int, int], Work]] = {
    "magnitude": chosen, "wanda": chosen, "rtn": rounded, "gptq": fed_back, "sparsegpt": fed_back, "svd-llm": factored,
}  # fmt: skip


def work_of(step: SitePass, shape: tuple[int, int]) -> Work | None:
    """What a pass costs on a matrix; None if it is not modelled."""
    found = COSTS.get(step.name)
    return None if found is None else found(step, *shape)
