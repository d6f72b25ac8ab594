"""The costs of low-rank passes, of hybrids with a low-rank term, and of the codecs for deltas.

Shape suffixes: O out, I in.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from compress.passes.delta.delta_come import ROUNDING
from compress.passes.delta.lora import EXTRA as MORE
from compress.passes.delta.lora import SWEEPS, TRIAL
from compress.passes.subspace import EXTRA
from compress.planning.costs import pruning, quantization
from compress.planning.costs.work import (
    CODING,
    COLUMN,
    DOUBLE,
    F32,
    Work,
    choosing,
    conjugated,
    directions,
    energy,
    factor,
    rounding,
    sweep,
)
from compress.stats import Gram

SETTLED = 20  # iterations of `rpca` to its tolerance; 100 are allowed
USUAL, MERGES = 16, 8  # rank of an adapter, and merges that `lora` simulates to find it
BANDS = 5  # bit widths that `delta-come` uses of the seven it has, approximately


def factored(step: Any, rows: int, columns: int) -> Work:
    """SVD, ASVD and SVD-LLM: the principal directions of the output, in the metric of the pass."""
    return directions(rows, columns, Gram in step.requires)


def paired(step: Any, rows: int, columns: int) -> Work:
    """TransMLA: keys and values are factored as one matrix of twice the rows."""
    del step
    both = directions(2 * rows, columns)  # each of the two sites is charged half
    return replace(both, cubes=both.cubes / 2, flops=both.flops / 2)


def realigned(step: Any, rows: int, columns: int) -> Work:
    """Realign: one Cholesky factorization, and the matrix solved with it."""
    del step
    entries = rows * columns
    return Work(
        nbytes=3 * F32 * (entries + columns**2), flops=4.0 * entries * columns + columns**3 / 3,
        passes=CODING + 10 * columns / rows,
    )  # fmt: skip


def corrected(step: Any, rows: int, columns: int) -> Work:
    """Repair: two low-rank factors of an error, stored in the precision that the pass sets."""
    return fitted(step.rank_of((rows, columns)), step.precision, rows, columns, step.metric == "gram")


def fitted(rank: int, precision: str, rows: int, columns: int, metric: bool) -> Work:
    """The principal directions, and both factors rounded to `precision`."""
    share = rank * (rows + columns) / (rows * columns)
    coding = rounding(precision == "int4", 0, 1, 1).times(share) if precision != "half" else Work()
    return directions(rows, columns, metric) + Work(flops=2.0 * rank * rows * columns, passes=coding.passes)


def by_turns(step: Any, rows: int, columns: int) -> Work:
    """OATS: in every iteration the subspace is updated and a mask chosen; with `refit`, then least squares."""
    entries, rank = rows * columns, step.rank((rows, columns))
    if not rank:
        return pruning.chosen(step, rows, columns)
    turn = Work(flops=4.0 * entries * (rank + EXTRA), passes=80 + choosing(step.sparsity))
    start = Work(nbytes=F32 * (10.5 * entries + 2 * columns**2), cubes=min(rows, columns) ** 3)
    refit = conjugated(rows, columns, pruning.SOLVED) + directions(rows, columns) if step.refit else Work()
    return start + turn.times(step.iterations) + refit


def in_rounds(step: Any, rows: int, columns: int) -> Work:
    """SLiM: new mask, codes and factors in every round, and the error of each."""
    few = isinstance(step.sparsity, str)
    if step.rounding == "feedback":
        made = sweep(rows, columns) + Work(calls=columns * COLUMN * (0.7 if few else 0.25))
        made += rounding(step.search, step.group, rows, columns)
    else:
        made = rounding(step.search, step.group, rows, columns)
    return factor(columns) + (made + corrected(step, rows, columns) + energy(rows, columns, 2)).times(step.rounds + 1)


def coded_in_rounds(step: Any, rows: int, columns: int) -> Work:
    """ReALLM: new codes and factors in every round, and the error of each."""
    factors = fitted(step.rank, step.precision, rows, columns, metric=True)
    made = quantization.coded(step, rows, columns) + factors + energy(rows, columns, 2)
    return made.beside(2 * F32 * rows * columns).times(step.rounds) + factors


def shrunk(step: Any, rows: int, columns: int) -> Work:
    """RPCA: in every iteration, singular values from the Gram of the shorter side, in float64."""
    del step
    entries, side = rows * columns, min(rows, columns)
    turn = Work(cubes=DOUBLE * side**3, flops=2 * 4.0 * entries * side, passes=40)
    return Work(nbytes=8 * (4 * entries + 4 * side**2)) + turn.times(SETTLED)


def in_bands(step: Any, rows: int, columns: int) -> Work:
    """Delta-CoMe: directions, then in every round both factors of each band, with error feedback if set."""
    side, bands = min(rows, columns), min(BANDS, len(ROUNDING))
    fed = step.rounding == "gptq"
    made = Work(
        flops=rows * columns * (6.0 * columns + 3.0 * side), passes=25 * 4,
        calls=COLUMN / 2 * (bands * columns + side) if fed else 0,
    )  # fmt: skip
    held = Work(nbytes=F32 * (10 * rows * columns + 2 * columns**2))
    return directions(rows, columns, step.whitened) + held + made.times(1 + step.rounds) + factor(columns).times(fed)


def signed(step: Any, rows: int, columns: int) -> Work:
    """BitDelta: the signs of every level, and the scales of all levels."""
    entries = rows * columns
    flops = 2.0 * entries * columns * step.levels if step.fit == "output" else 0
    return Work(nbytes=F32 * entries * (3 + 2 * step.levels), flops=flops, passes=30 * step.levels**2)


def merged(step: Any, rows: int, columns: int) -> Work:
    """LoRA: the leading directions, simulated merges until the rank is found, and projections onto the intervals.

    Counted for a fine-tune of 16 bits and a usual rank; one of float32 takes twice the memory and three times as long.
    """
    entries, rank = rows * columns, min(step.largest, USUAL)
    start = Work(flops=2.0 * 2 * SWEEPS * entries * 3 * rank)
    merges = Work(flops=2.0 * 2 * SWEEPS * entries * (1 + MORE) + 6.0 * entries * rank, passes=20).times(MERGES)
    turn = Work(flops=6.0 * entries * rank, passes=6)
    return start.beside(20 * F32 * entries) + merges + turn.times(step.steps + TRIAL)


def portfolio(step: Any, rows: int, columns: int) -> Work:
    """Auto: every codec once, and its error; how many of them fit, and which are retried, depends on values."""
    rows_of = {"delta-come": in_bands, "bitdelta": signed, "gptq": quantization.compensated,
               "sparsegpt": pruning.fed_back}  # fmt: skip
    work = Work()
    for codec in step.codecs((rows, columns), step.bits):
        work += rows_of[codec.name](codec, rows, columns) + energy(rows, columns, 2)
    return work


ROWS = {
    "svd": factored, "asvd": factored, "svd-llm": factored, "transmla": paired, "realign": realigned,
    "repair": corrected, "oats": by_turns, "slim": in_rounds, "reallm": coded_in_rounds, "rpca": shrunk,
    "delta-come": in_bands, "bitdelta": signed, "auto": portfolio, "lora": merged,
}  # fmt: skip
