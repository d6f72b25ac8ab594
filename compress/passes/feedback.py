"""Error feedback: change columns one by one, pushing each error onto the columns not yet done.

One loop serves GPTQ (what changes a column is a grid), SparseGPT (a mask that is chosen on the way), both at once, and
the compensation of a mask that is given; and vectors of columns that are rounded together. Inside a block it works on
the transposed weight, where a column lies contiguous, in strips: small updates stay within a strip, a product carries
them over the rest of the block.
Shape suffixes: O out, I in, B columns of a block.
"""

from __future__ import annotations

from math import lcm
from typing import Protocol

import torch
from torch import Tensor

from compress.weights.pattern import NM, Blocks, Pattern

STRIP = 16  # columns; two rows of floats of a few thousand outputs then stay in a core's cache


class Rounding(Protocol):
    """What a column becomes, or `width` of them beside each other."""

    aligned: int  # columns that must be up to date when the first of them is rounded, a multiple of `width`
    width: int  # columns rounded together

    def round(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> Tensor:
        """The new values [out] or [width, out]; `ahead_BO` holds the columns and the rest of their block.

        `keep_BO` is the mask of all these.
        """


class Mask(Protocol):
    """What a column may keep."""

    aligned: int

    def enter(self, start: int, w_BO: Tensor, diagonal_B: Tensor) -> Tensor:
        """The mask [B, out] of a block as far as it is known when the block is entered."""

    def reach(self, at: int, w_BO: Tensor, diagonal_B: Tensor, keep_BO: Tensor) -> None:
        """Complete the mask for column `at` of the block, in place."""


class Unrounded:
    """Kept weights stay as they are by then."""

    aligned = 1
    width = 1

    def round(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> Tensor:
        """The column, 0 where it is cut."""
        del column
        return ahead_BO[0] if keep_BO is None else ahead_BO[0] * keep_BO[0]


class Given:
    """A mask known beforehand."""

    aligned = 1

    def __init__(self, keep_OI: Tensor) -> None:
        self.keep_OI = keep_OI

    def enter(self, start: int, w_BO: Tensor, diagonal_B: Tensor) -> Tensor:
        """Its part."""
        return self.keep_OI[:, start : start + len(w_BO)].T.contiguous()

    def reach(self, at: int, w_BO: Tensor, diagonal_B: Tensor, keep_BO: Tensor) -> None:
        """Nothing."""


class Chosen:
    """A mask by the score (w / U_jj)² of the weights as they are when their block, or group of m, is reached.

    Inputs that never fire (`dead_I`) score 0. The pattern counts over a block's columns and all rows, or within each
    row of it, and over all blocks it is exact. Source: Frantar and Alistarh, SparseGPT, ICML 2023, section 3.2.
    """

    def __init__(self, pattern: Pattern, dead_I: Tensor | None = None) -> None:
        self.pattern, self.dead_I = pattern, dead_I
        self.aligned = pattern.m if isinstance(pattern, NM) else pattern.columns if isinstance(pattern, Blocks) else 1
        self.start = 0

    def enter(self, start: int, w_BO: Tensor, diagonal_B: Tensor) -> Tensor:
        """The mask of the block, or nothing cut yet where groups of m decide."""
        self.start = start
        if isinstance(self.pattern, NM):
            return torch.ones_like(w_BO, dtype=torch.bool)
        return self.pattern.keep_part(self.score(0, w_BO, diagonal_B).T.contiguous(), start).T.contiguous()

    def reach(self, at: int, w_BO: Tensor, diagonal_B: Tensor, keep_BO: Tensor) -> None:
        """The mask of a group of m, when its first column is reached."""
        if isinstance(self.pattern, NM) and at % self.pattern.m == 0:
            part = slice(at, at + self.pattern.m)
            keep_BO[part] = self.pattern.keep(self.score(at, w_BO[part], diagonal_B[part]).T.contiguous()).T

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
    """(W', its mask, the loss), columns changed from left to right, float32.

    `upper_II` is the factor of the inverse Gram (`inverse_factor`), in the column order of `w_OI`. The loss, sum of
    e² / 2, equals tr(D H Dᵀ) / 2 exactly for the damped H and D = W' - W. Given the mask, the result does not depend on
    `block`, which is made to hold whole groups of `rounding` and `mask`. A vector of columns leaves the error
    (w - q) U_vv^-1: that is block-LDL, whose unit factor is U_vv^-1 U.
    Source: Frantar et al., GPTQ, ICLR 2023, algorithm 1; Frantar and Alistarh, SparseGPT, ICML 2023, algorithm 1;
    Tseng et al., QuIP#, ICML 2024, section 4.1 (there from last to first).
    """
    group = lcm(rounding.aligned, mask.aligned if mask else 1)
    block = max(group, block // group * group)
    aligned = (rounding.aligned, mask.aligned if mask else 1)
    fits = all(each % STRIP == 0 or STRIP % each == 0 for each in aligned)  # strips hold groups, or groups strips
    strip = STRIP if fits else group * max(1, STRIP // group)
    w = w_OI.float().clone()
    keep_OI = torch.empty_like(w, dtype=torch.bool) if mask else None
    loss = 0.0
    for start in range(0, w.shape[1], block):
        end = min(start + block, w.shape[1])
        w_BO, u_BB = w[:, start:end].T.contiguous(), upper_II[start:end, start:end]
        diagonal_B = u_BB.diagonal()
        keep_BO = mask.enter(start, w_BO, diagonal_B) if mask else None
        e_BO = torch.empty_like(w_BO)
        for first in range(0, end - start, strip):
            last = min(first + strip, end - start)
            for j in range(first, last, rounding.width):
                if mask and keep_BO is not None:
                    mask.reach(j, w_BO, diagonal_B, keep_BO)
                now, after = slice(j, j + rounding.width), slice(j + rounding.width, last)
                q_BO = rounding.round(start + j, w_BO[j:], None if keep_BO is None else keep_BO[j:])
                e_BO[now] = left_by(w_BO[now] - q_BO, u_BB[now, now])
                w_BO[now] = q_BO
                w_BO[after].addmm_(u_BB[now, after].T, e_BO[now], alpha=-1)
            w_BO[last:].addmm_(u_BB[first:last, last:].T, e_BO[first:last], alpha=-1)
        w[:, start:end] = w_BO.T
        if keep_OI is not None and keep_BO is not None:
            keep_OI[:, start:end] = keep_BO.T
        loss += float(e_BO.square().sum(dtype=torch.float64)) / 2
        w[:, end:].addmm_(e_BO.T, upper_II[start:end, end:], alpha=-1)
    return w, keep_OI, loss


def left_by(change_BO: Tensor, u_BB: Tensor) -> Tensor:
    """The errors that a change of these columns leaves to those after them, U^-ᵀ (w - q)."""
    if len(u_BB) == 1:
        return change_BO / u_BB
    errors_BO: Tensor = torch.linalg.solve_triangular(u_BB.T, change_BO, upper=False)
    return errors_BO
