"""Error feedback: change columns one by one, pushing each error onto the columns not yet done.

One loop serves GPTQ (a grid changes the columns), SparseGPT (a mask chosen along the way does), both at once, the
compensation of a given mask, and vectors of columns that are rounded together. Within a block it works on the
transposed weight, where a column is contiguous, in strips: small updates stay within a strip, and one matrix product
carries them over the rest of the block.
Shape suffixes: O out, I in, B columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isnan, lcm
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.weights.pattern import NM, Blocks, Pattern
from compress_kernels import solver
from compress_kernels.solver import Choice, Steps

STRIP = 16  # columns; two rows of floats of a few thousand outputs then stay in a core's cache
LAUNCH = 128  # columns that one kernel launch handles at most


class Rounding(Protocol):
    """Decides the new values of a column, or of `width` adjacent columns at once."""

    aligned: int  # columns that must be up to date when the first of them is rounded; a multiple of `width`
    width: int  # columns rounded together

    def round(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> Tensor:
        """The new values [out] or [width, out]; `ahead_BO` holds these columns and the rest of their block.

        `keep_BO` is the mask of the same columns.
        """


@runtime_checkable
class Launchable(Protocol):
    """A rounding whose grids are known when the first column of a strip is reached, so one launch can do the strip."""

    def strip(self, limit: int) -> int:
        """The number of columns, at most `limit`, for which the grids are known together."""

    def steps(self, columns: slice, ahead_BO: Tensor, keep_BO: Tensor | None) -> Steps | None:
        """The grids of a strip, or None if nothing is rounded; `ahead_BO` and `keep_BO` as in `round`."""

    def take(self, columns: slice, codes_BO: Tensor) -> None:
        """Store the codes of a strip."""


class Mask(Protocol):
    """Decides which weights of a column are kept."""

    aligned: int

    def enter(self, start: int, w_BO: Tensor, diagonal_B: Tensor) -> Tensor:
        """The mask [B, out] of a block, as far as it is known when the block is entered."""

    def reach(self, at: int, w_BO: Tensor, diagonal_B: Tensor, keep_BO: Tensor) -> None:
        """Complete the mask for column `at` of the block, in place."""

    def choice(self, part: slice) -> Choice | None:
        """The rule by which the mask of a part of the block is completed along the way; None if it is known."""


class Unrounded:
    """A rounding that leaves kept weights at their present, compensated values."""

    aligned = 1
    width = 1

    def round(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> Tensor:
        """The column, 0 where it is cut."""
        del column
        return ahead_BO[0] if keep_BO is None else ahead_BO[0] * keep_BO[0]

    def strip(self, limit: int) -> int:
        """All columns: there are no grids."""
        return limit

    def steps(self, columns: slice, ahead_BO: Tensor, keep_BO: Tensor | None) -> Steps | None:
        """None: nothing is rounded."""

    def take(self, columns: slice, codes_BO: Tensor) -> None:
        """Do nothing: there are no codes."""


class Given:
    """A mask known beforehand."""

    aligned = 1

    def __init__(self, keep_OI: Tensor) -> None:
        self.keep_OI = keep_OI

    def enter(self, start: int, w_BO: Tensor, diagonal_B: Tensor) -> Tensor:
        """The part of the mask that belongs to the block."""
        return self.keep_OI[:, start : start + len(w_BO)].T.contiguous()

    def reach(self, at: int, w_BO: Tensor, diagonal_B: Tensor, keep_BO: Tensor) -> None:
        """Do nothing: the mask is complete."""

    def choice(self, part: slice) -> Choice | None:
        """None: the mask is known."""


class Chosen:
    """A mask by the score (w / U_jj)² of the weights as they are when their block, or their group of m, is reached.

    Inputs that never fire (`dead_I`) score 0. The pattern counts within a block of columns, over all rows together or
    in each row; summed over all blocks the count is exact. Source: Frantar and Alistarh, SparseGPT, ICML 2023, section
    3.2.
    """

    def __init__(self, pattern: Pattern, dead_I: Tensor | None = None) -> None:
        self.pattern, self.dead_I = pattern, dead_I
        self.aligned = pattern.m if isinstance(pattern, NM) else pattern.columns if isinstance(pattern, Blocks) else 1
        self.start = 0

    def enter(self, start: int, w_BO: Tensor, diagonal_B: Tensor) -> Tensor:
        """The mask of the block; for n:m, which decides group by group, a mask that keeps everything so far."""
        self.start = start
        if isinstance(self.pattern, NM):
            return torch.ones_like(w_BO, dtype=torch.bool)
        return self.pattern.keep_part(self.score(0, w_BO, diagonal_B).T.contiguous(), start).T.contiguous()

    def reach(self, at: int, w_BO: Tensor, diagonal_B: Tensor, keep_BO: Tensor) -> None:
        """Complete the mask of a group of m when its first column is reached."""
        if isinstance(self.pattern, NM) and at % self.pattern.m == 0:
            part = slice(at, at + self.pattern.m)
            keep_BO[part] = self.pattern.keep_across(self.score(at, w_BO[part], diagonal_B[part]))

    def choice(self, part: slice) -> Choice | None:
        """The n and m of the pattern, or None where the mask was chosen when the block was entered."""
        if not isinstance(self.pattern, NM):
            return None
        dead_B = None if self.dead_I is None else self.dead_I[self.start + part.start : self.start + part.stop]
        return Choice(n=self.pattern.n, m=self.pattern.m, dead_B=dead_B)

    def score(self, at: int, w_BO: Tensor, diagonal_B: Tensor) -> Tensor:
        """(w / U_jj)², 0 for dead inputs."""
        score_BO = (w_BO / diagonal_B[:, None]).square_()
        if self.dead_I is not None:
            first = self.start + at
            score_BO[self.dead_I[first : first + len(w_BO)]] = 0
        return score_BO


def feed_back(
    w_OI: Tensor, upper_II: Tensor, rounding: Rounding, mask: Mask | None = None, block: int = 128
) -> tuple[Tensor, Tensor | None, float]:
    """(W', its mask, the loss); columns are changed from left to right, in float32.

    `upper_II` is the factor of the inverse Gram (`inverse_factor`), in the column order of `w_OI`. The loss, sum of
    e² / 2, equals tr(D H Dᵀ) / 2 exactly, for the damped H and D = W' - W. For a given mask the result does not depend
    on `block`, which is rounded to whole groups of `rounding` and `mask`. A vector of columns leaves the error
    (w - q) U_vv^-1; this is block LDL, whose unit factor is U_vv^-1 U. Raises CalibrationError if a pruning score is
    NaN.
    Source: Frantar et al., GPTQ, ICLR 2023, algorithm 1; Frantar and Alistarh, SparseGPT, ICML 2023, algorithm 1; Tseng
    et al., QuIP#, ICML 2024, section 4.1 (there from last to first).
    """
    group = lcm(rounding.aligned, mask.aligned if mask else 1)
    block = max(group, block // group * group)
    w = w_OI.to(torch.float32, copy=True)
    launched = at_once(w, upper_II, rounding, mask)
    strip = launched or strip_of(rounding, mask)
    keep_OI = torch.empty_like(w, dtype=torch.bool) if mask else None
    losses = []
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        w_BO, u_BB = w[:, start:end].T.contiguous(), upper_II[start:end, start:end]
        keep_BO = mask.enter(start, w_BO, u_BB.diagonal()) if mask else None
        e_BO = torch.empty_like(w_BO)
        columns = Columns(start, w_BO, u_BB, e_BO, keep_BO)
        for first in range(0, end - start, strip):
            last = min(first + strip, end - start)
            (in_one_launch if launched else one_by_one)(columns, slice(first, last), rounding, mask)
            w_BO[last:].addmm_(u_BB[first:last, last:].T, e_BO[first:last], alpha=-1)
        w[:, start:end] = w_BO.T
        if keep_OI is not None and keep_BO is not None:
            keep_OI[:, start:end] = keep_BO.T
        losses.append(e_BO.square().sum(dtype=torch.float64))  # read at the end: the loop need not wait for a GPU
        w[:, end:].addmm_(e_BO.T, upper_II[start:end, end:], alpha=-1)
    loss = sum(torch.stack(losses).tolist()) / 2 if losses else 0.0
    if launched and mask and isnan(loss):
        raise CalibrationError("a pruning score is NaN; the weights or the calibration statistics are not finite")
    return w, keep_OI, loss


@dataclass(frozen=True, eq=False)
class Columns:
    """The state of a block in progress, transposed: weights, its part of the factor, errors and mask.

    All of them change in place except the factor.
    """

    start: int
    w_BO: Tensor
    u_BB: Tensor
    e_BO: Tensor
    keep_BO: Tensor | None

    def ahead(self, at: int) -> tuple[Tensor, Tensor | None]:
        """Weights and mask from a column of the block onwards."""
        return self.w_BO[at:], None if self.keep_BO is None else self.keep_BO[at:]


def strip_of(rounding: Rounding, mask: Mask | None) -> int:
    """The number of columns in a strip that is done column by column.

    A strip holds whole groups, or a group holds whole strips.
    """
    aligned = (rounding.aligned, mask.aligned if mask else 1)
    group = lcm(*aligned)
    return STRIP if all(each % STRIP == 0 or STRIP % each == 0 for each in aligned) else group * max(1, STRIP // group)


def at_once(w_OI: Tensor, upper_II: Tensor, rounding: Rounding, mask: Mask | None) -> int:
    """The number of columns in a strip that one kernel launch does; 0 if the columns are done one by one."""
    if not solver.usable(w_OI) or upper_II.stride(1) != 1 or not isinstance(rounding, Launchable):
        return 0
    strip = rounding.strip(LAUNCH)
    choice = mask.choice(slice(0, 0)) if mask else None
    return strip if choice is None or (choice.fits and strip % choice.m == 0) else 0


def one_by_one(columns: Columns, part: slice, rounding: Rounding, mask: Mask | None) -> None:
    """Change the columns of a strip, and push their errors onto the later columns of the strip."""
    w_BO, u_BB, e_BO = columns.w_BO, columns.u_BB, columns.e_BO
    for j in range(part.start, part.stop, rounding.width):
        if mask and columns.keep_BO is not None:
            mask.reach(j, w_BO, u_BB.diagonal(), columns.keep_BO)
        now, after = slice(j, j + rounding.width), slice(j + rounding.width, part.stop)
        q_BO = rounding.round(columns.start + j, *columns.ahead(j))
        e_BO[now] = left_by(w_BO[now] - q_BO, u_BB[now, now])
        w_BO[now] = q_BO
        w_BO[after].addmm_(u_BB[now, after].T, e_BO[now], alpha=-1)


def in_one_launch(columns: Columns, part: slice, rounding: Rounding, mask: Mask | None) -> None:
    """The same in one kernel launch on a GPU, equal up to rounding in the sums."""
    w_BO, keep_BO = columns.w_BO, columns.keep_BO
    if mask and keep_BO is not None:  # the first grid is fitted to the weights that the first group keeps
        mask.reach(part.start, w_BO, columns.u_BB.diagonal(), keep_BO)
    at = slice(columns.start + part.start, columns.start + part.stop)
    steps = rounding.steps(at, *columns.ahead(part.start)) if isinstance(rounding, Launchable) else None
    codes_BO = solver.sweep(
        w_BO[part], columns.u_BB[part, part], columns.e_BO[part], keep_BO=None if keep_BO is None else keep_BO[part],
        steps=steps, choice=mask.choice(part) if mask else None,
    )  # fmt: skip
    if codes_BO is not None and isinstance(rounding, Launchable):
        rounding.take(at, codes_BO)


def left_by(change_BO: Tensor, u_BB: Tensor) -> Tensor:
    """The errors that a change of these columns leaves for the columns after them, U^-ᵀ (w - q)."""
    if len(u_BB) == 1:
        return change_BO / u_BB
    errors_BO: Tensor = torch.linalg.solve_triangular(u_BB.T, change_BO, upper=False)
    return errors_BO
