"""`python -m compress_evals.speed`: times each method on one block, and its inner loop against a naive one.

The block has the shapes of a 1.1 B Llama (hidden 2048, inner 5632, 256 for keys and values), random weights and
correlated inputs. The naive loops follow the method's paper literally, with one column, one row or one full
decomposition at a time. Loops over rows are timed on a few rows of one matrix and scaled up, loops over decompositions
on the first one; the table says so. Nothing here is used for compression.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress import (
    ALPS,
    GPTQ,
    OATS,
    RIA,
    DSnoT,
    Magnitude,
    Pass,
    Reconstruct,
    Site,
    SparseGPT,
    Swaps,
    Wanda,
)
from compress.stats import Collector, ColumnNorm, Gram, Moments, Statistics

INPUTS = {"q": 0, "k": 0, "v": 0, "o": 1, "gate": 2, "up": 2, "down": 3}


@dataclass(frozen=True, kw_only=True)
class Shapes:
    """The widths of the block."""

    hidden: int
    inner: int
    keys: int

    def of(self) -> dict[str, tuple[int, int]]:
        """The shape (out, in) of each matrix, by name."""
        h, f = self.hidden, self.inner
        return {"q": (h, h), "k": (self.keys, h), "v": (self.keys, h), "o": (h, h), "gate": (f, h), "up": (f, h),
                "down": (h, f)}  # fmt: skip


def normal(*shape: int, seed: int) -> Tensor:
    """Standard normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, width: int, seed: int) -> Tensor:
    """Inputs [count, width] whose channels are correlated, have different magnitudes and a non-zero mean."""
    mixed: Tensor = (
        normal(count, width // 4, seed=seed) @ normal(width // 4, width, seed=seed + 1) / (width // 4) ** 0.5
    )
    loudness = normal(width, seed=seed + 3).mul(0.5).exp()
    return torch.mul(mixed + 0.5 * normal(count, width, seed=seed + 2) + 0.2, loudness)


def site(name: str, shape: tuple[int, int], stats: Statistics) -> Site:
    """A site with a random weight and the given statistics."""
    linear = nn.Linear(shape[1], shape[0], bias=False)
    linear.weight.data = normal(*shape, seed=len(name)) * 0.02
    made = Site(name, linear.requires_grad_(False))
    made.stats = stats
    return made


def clock(work: Callable[[], Any]) -> tuple[float, Any]:
    """Run `work`; returns (wall seconds, result)."""
    began = time.perf_counter()
    result = work()
    return time.perf_counter() - began, result


def seconds_of(step: Pass, sites: dict[str, Site]) -> float:
    """Seconds to rewrite all matrices of the block; derived statistics that sites share are computed once."""

    def work() -> None:
        for each in sites.values():
            each.weight = step.rewrite(each)  # type: ignore[attr-defined]

    return clock(work)[0]


# -- plain loops -----------------------------------------------------------------------------------


def column_loop(w_OI: Tensor, upper_II: Tensor, sparsity: float, block: int = 128) -> Tensor:
    """SparseGPT one column at a time, with each error pushed at once onto all columns to the right."""
    w = w_OI.clone()
    for start in range(0, w.shape[1], block):
        part = slice(start, start + block)
        score = (w[:, part] / upper_II.diagonal()[part]) ** 2
        keep = score > score.flatten().kthvalue(int(sparsity * score.numel())).values
        for j in range(start, min(start + block, w.shape[1])):
            q = w[:, j] * keep[:, j - start]
            e = (w[:, j] - q) / upper_II[j, j]
            w[:, j:] -= e[:, None] * upper_II[j, j:]
            w[:, j] = q
    return w


def rounded_loop(w_OI: Tensor, upper_II: Tensor, bits: int, group: int) -> Tensor:
    """GPTQ one column at a time, with each error pushed at once onto all columns to the right.

    Every row and group has its own scale and zero point.
    """
    w, top = w_OI.clone(), 2**bits - 1
    for j in range(w.shape[1]):
        if j % group == 0:
            low, high = w[:, j : j + group].amin(1).clamp(max=0), w[:, j : j + group].amax(1).clamp(min=0)
            scale = ((high - low) / top).half().float()
            zero = (-low / scale).round().clamp(0, top)
        q = (((w[:, j] / scale).round() + zero).clamp(0, top) - zero) * scale
        e = (w[:, j] - q) / upper_II[j, j]
        w[:, j:] -= e[:, None] * upper_II[j, j:]
        w[:, j] = q
    return w


def group_loop(score_OI: Tensor, m: int, n: int) -> Tensor:
    """The n:m mask (n kept of every m), one group of columns at a time."""
    keep = torch.ones_like(score_OI, dtype=torch.bool)
    for j in range(0, score_OI.shape[1], m):
        keep[:, j : j + m].scatter_(1, score_OI[:, j : j + m].topk(m - n, 1, largest=False).indices, False)
    return keep


def dsnot_loop(w_OI: Tensor, keep_OI: Tensor, mean_I: Tensor, variance_I: Tensor, norm_I: Tensor) -> Tensor:
    """DSnoT one row and one swap at a time; a row stops before a swap that would not lower its error."""
    keep_OI = keep_OI.clone()
    for w, keep in zip(w_OI, keep_OI, strict=True):
        part, quiet = w * mean_I, w.abs() * norm_I
        merit = part / variance_I
        error = part[~keep].sum()
        fresh = torch.ones_like(keep)
        for _ in range(50):
            if error.abs() <= 4.9e-5:
                break
            up = (merit * error.sign()).masked_fill(keep | ~fresh, -torch.inf).argmax()
            down = quiet.masked_fill(~keep | ~fresh | (part * error.sign() >= 0), torch.inf).argmin()
            after = error + part[down] - part[up]
            if after.abs() >= error.abs():
                break
            error = after
            keep[up], keep[down] = True, False
            fresh[up], fresh[down] = False, False
    return keep_OI


def swaps_loop(w_OI: Tensor, keep_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Exact swaps one row and one swap at a time, each the best over all pairs."""
    keep_OI = keep_OI.clone()
    diagonal = gram_II.diagonal()
    for w, keep in zip(w_OI, keep_OI, strict=True):
        for _ in range(100):  # the default of the pass
            missing = w * ~keep
            c = gram_II @ missing
            ups, downs = (~keep).nonzero()[:, 0], keep.nonzero()[:, 0]
            up = w[ups] * (w[ups] * diagonal[ups] - 2 * c[ups])
            down = w[downs] * (w[downs] * diagonal[downs] + 2 * c[downs])
            gain = up[:, None] + down - 2 * w[ups][:, None] * w[downs] * gram_II[ups][:, downs]
            best = int(gain.argmin())
            if float(gain.flatten()[best]) >= -1e-7 * float(missing @ c):
                break
            keep[ups[best // len(downs)]], keep[downs[best % len(downs)]] = True, False
    return keep_OI


def solve_loop(w_OI: Tensor, keep_OI: Tensor, gram_II: Tensor) -> Tensor:
    """Least-squares reconstruction one row at a time."""
    after = torch.zeros_like(w_OI)
    for w, keep, row in zip(w_OI, keep_OI, after, strict=True):
        inside = gram_II[keep][:, keep]
        factor = torch.linalg.cholesky(inside)
        row[keep] = torch.cholesky_solve((gram_II[keep] @ w)[:, None], factor)[:, 0]
    return after


def turns_loop(a_OI: Tensor, rank: int, kept: int, turns: int) -> Tensor:
    """OATS with a full singular value decomposition per iteration; returns the sum of both terms."""
    sparse_OI = torch.zeros_like(a_OI)
    for _ in range(turns):
        left, values, right = torch.linalg.svd(a_OI - sparse_OI, full_matrices=False)
        rest_OI = a_OI - left[:, :rank] * values[:rank] @ right[:rank]
        largest = rest_OI.abs().topk(kept, 1).indices
        sparse_OI = torch.zeros_like(a_OI).scatter_(1, largest, rest_OI.gather(1, largest))
    both_OI: Tensor = a_OI - rest_OI + sparse_OI
    return both_OI


# -- the table -------------------------------------------------------------------------------------


def block_seconds(shapes: Shapes, stats: dict[int, Statistics]) -> list[tuple[str, float]]:
    """(method, seconds for the block) of every pass; the time of the Wanda mask before a refinement is not counted."""
    rows: list[tuple[str, float]] = []
    steps: list[tuple[str, list[Pass]]] = [
        ("magnitude 50 %", [Magnitude()]), ("magnitude 2:4", [Magnitude(sparsity="2:4")]),
        ("wanda 50 %", [Wanda()]), ("wanda 2:4", [Wanda(sparsity="2:4")]), ("wanda alpha", [Wanda(alpha=True)]),
        ("ria 50 %", [RIA()]), ("sparsegpt 50 %", [SparseGPT()]), ("sparsegpt 2:4", [SparseGPT(sparsity="2:4")]),
        ("gptq int4", [GPTQ()]), ("sparsegpt 2:4 int4", [SparseGPT(sparsity="2:4", bits=4)]),
        ("dsnot 50 %", [Wanda(), DSnoT(measure=False)]),
        ("dsnot 2:4", [Wanda(sparsity="2:4"), DSnoT(measure=False)]), ("swaps 50 %", [Wanda(), Swaps()]),
        ("swaps 2:4", [Wanda(sparsity="2:4"), Swaps()]), ("reconstruct 50 %", [Wanda(), Reconstruct()]),
        ("alps 50 %", [ALPS()]),
    ]  # fmt: skip
    for name, passes in (steps[0], *steps):  # the first one runs twice, once as warm-up
        for shared in stats.values():
            shared._derived.clear()
        sites = {part: site(part, shape, stats[INPUTS[part]]) for part, shape in shapes.of().items()}
        taken = [seconds_of(step, sites) for step in passes]
        sys.stderr.write(f"{name}: {taken[-1]:.2f} s\n")
        rows.append((name, taken[-1]))
    return rows[1:]


def inner_loops(shapes: Shapes, stats: dict[int, Statistics], rows: int) -> list[tuple[str, float, float, str]]:
    """(method, seconds, seconds of the naive loop, what that was timed on), for the q matrix alone."""
    from compress.passes.feedback import Chosen, Unrounded, feed_back
    from compress.passes.hessian import damp, inverse_factor
    from compress.passes.pruning.dsnot import dsnot
    from compress.passes.pruning.reconstruct import least_squares
    from compress.passes.pruning.swaps import swap
    from compress.passes.quantization.gptq import gptq
    from compress.weights import Grid, pattern

    q = site("q", shapes.of()["q"], stats[0])
    w, gram, norm = q.original.data, q.stats[Gram], q.stats[ColumnNorm]
    mean, _, within = q.stats[Moments]
    keep, half = pattern(0.5).keep(w.abs() * norm), pattern(0.5, "matrix")
    found = inverse_factor(gram, 0.01)
    if found is None:
        raise RuntimeError("the synthetic Gram is indefinite")
    upper, damped, some, share = found[0], damp(gram, 0.01), slice(0, rows), len(w) / rows
    values, few, whole = w * keep, f"{rows} rows", f"{len(w)} rows"
    return [
        ("sparsegpt 50 %", clock(lambda: feed_back(w, upper, Unrounded(), Chosen(half)))[0],
         clock(lambda: column_loop(w, upper, 0.5))[0], whole),
        ("gptq int4 g64", clock(lambda: gptq(w, upper, Grid(bits=4, group=64)))[0],
         clock(lambda: rounded_loop(w, upper, 4, 64))[0], whole),
        ("wanda 2:4, the mask", clock(lambda: pattern("2:4").keep(w.abs() * norm))[0],
         clock(lambda: group_loop(w.abs() * norm, 4, 2))[0], whole),
        ("dsnot 50 %", clock(lambda: dsnot(w, keep, mean, within, norm))[0],
         clock(lambda: dsnot_loop(w[some], keep[some], mean, within, norm))[0] * share, few),
        ("swaps 50 %", clock(lambda: swap(w, values, keep, gram))[0],
         clock(lambda: swaps_loop(w[some], keep[some], gram))[0] * share, few),
        ("reconstruct 50 %", clock(lambda: least_squares(w, keep, damped, values))[0],
         clock(lambda: solve_loop(w[some], keep[some], damped))[0] * share, few),
    ]  # fmt: skip


def by_turns_row(shapes: Shapes, stats: dict[int, Statistics]) -> tuple[str, float, float, str]:
    """(method, seconds, seconds of the loop over decompositions, what that was timed on), for the down matrix."""
    from compress.passes.hybrid.oats import by_turns

    step, down = OATS(), site("down", shapes.of()["down"], stats[INPUTS["down"]])
    a_OI = down.original.data * down.stats[ColumnNorm]
    rank, chosen = step.rank(down.shape), step.remainder(down.shape)
    ours = clock(lambda: by_turns(a_OI, rank, chosen, step.iterations))[0]
    first = clock(lambda: turns_loop(a_OI, rank, round(a_OI.shape[1] * 3 / 8), 1))[0]
    return "oats 50 %, down", ours, first * step.iterations, f"1 of {step.iterations} iterations"


def main() -> None:
    """Measure and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--inner", type=int, default=5632)
    parser.add_argument("--keys", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--rows", type=int, default=32, help="rows on which the loops over rows are timed")
    parser.add_argument("--only", choices=["block", "loops"], help="print only this table; the block takes ten minutes")
    arguments = parser.parse_args()
    shapes = Shapes(hidden=arguments.hidden, inner=arguments.inner, keys=arguments.keys)
    widths = {INPUTS[name]: shape[1] for name, shape in shapes.of().items()}
    stats: dict[int, Statistics] = {}
    gathering = dict.fromkeys((ColumnNorm, Moments, Gram), 0.0)
    for number, width in widths.items():
        x_BTI = tokens(arguments.tokens, width, seed=10 * number).unflatten(0, (-1, min(2048, arguments.tokens)))
        for kind in gathering:
            collector = Collector((kind,), width, x_BTI.device)
            gathering[kind] += clock(lambda c=collector, x=x_BTI: [c.update(window[None]) for window in x])[0]  # type: ignore[misc]
        whole = Collector(tuple(gathering), width, x_BTI.device)
        whole.update(x_BTI)
        stats[number] = whole.finish(f"input {number}")
    lines = [f"hidden {shapes.hidden}, inner {shapes.inner}, {torch.get_num_threads()} threads, one run each, float32"]
    lines += ["", f"| statistic of the block's 4 inputs, {arguments.tokens} tokens | seconds |", "|---|---|"]
    lines += [f"| {kind.__name__} | {seconds:.2f} |" for kind, seconds in gathering.items()]
    if arguments.only != "loops":
        lines += ["", "| method | seconds a block |", "|---|---|"]
        lines += [f"| {name} | {seconds:.2f} |" for name, seconds in block_seconds(shapes, stats)]
    if arguments.only == "block":
        sys.stdout.write("\n".join(lines) + "\n")
        return
    lines += ["", "| inner loop, one matrix | seconds | plain loop | ratio | loop timed on |", "|---|---|---|---|---|"]
    for name, ours, loop, on in (*inner_loops(shapes, stats, arguments.rows), by_turns_row(shapes, stats)):
        lines.append(f"| {name} | {ours:.2f} | {loop:.1f} | {loop / ours:.1f} | {on} |")
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
