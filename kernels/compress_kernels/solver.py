"""The inner loops of compression passes, each as one launch; in plain torch on a GPU they are many small launches.

Contains specifications in plain torch, and the functions that passes call where `usable` returns True; the kernels are
in `gpu/solver.py`. Elsewhere, passes run their own loops in torch.
Shape suffixes: O out, I in, T tokens, B columns of a block, G groups, N groups of M scores, K places of a queue.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_kernels import dispatch

WIDEST = 8  # the largest group of `swap_groups`, all pairs of whose weights a warp holds
STRIP = 16  # columns that a launch of `sweep` processes between two matrix products


def usable(tensor: Tensor) -> bool:
    """Whether the kernels can run on the device of this tensor."""
    return tensor.is_cuda and not dispatch.missing(tensor.device)


@dataclass(frozen=True, eq=False, kw_only=True)
class Steps:
    """The quantization grids of B columns, `scale * (code - zero)`.

    Scales and zero points are float32 [G, O]; without `zero_GO`, zero is 2**(bits - 1). `group_B`, int32, is the group
    of each column.
    """

    bits: int
    scale_GO: Tensor
    zero_GO: Tensor | None
    group_B: Tensor


@dataclass(frozen=True, eq=False, kw_only=True)
class Choice:
    """Keep `n` of every `m` columns by the score (w / U_jj)² when the first one is reached; dead columns score 0."""

    n: int
    m: int
    dead_B: Tensor | None = None

    @property
    def fits(self) -> bool:
        """Whether a strip of `sweep` consists of whole groups."""
        return STRIP % self.m == 0


def sweep_reference(
    w_BO: Tensor, u_BB: Tensor, keep_BO: Tensor | None, steps: Steps | None, choice: Choice | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The specification of `sweep`; returns (values, errors, mask, codes)."""
    w_BO, errors, codes = w_BO.clone(), torch.empty_like(w_BO), None
    keep_BO = torch.ones_like(w_BO, dtype=torch.bool) if choice else None if keep_BO is None else keep_BO.clone()
    codes = None if steps is None else torch.empty_like(w_BO, dtype=torch.uint8)
    for j in range(len(w_BO)):
        if choice and keep_BO is not None and j % choice.m == 0:
            part = slice(j, j + choice.m)
            score_BO = (w_BO[part] / u_BB.diagonal()[part, None]).square()
            score_BO = score_BO if choice.dead_B is None else score_BO.masked_fill(choice.dead_B[part, None], 0)
            keep_BO[part] = keep_nm_reference(score_BO.T, choice.n).T
        value = w_BO[j] if keep_BO is None else w_BO[j] * keep_BO[j]
        if steps is not None and codes is not None:
            group = int(steps.group_B[j])
            scale, middle = steps.scale_GO[group], torch.tensor(2.0 ** (steps.bits - 1), device=w_BO.device)
            middle = middle if steps.zero_GO is None else steps.zero_GO[group]
            code = ((w_BO[j] / scale).round() + middle).clamp(0, 2**steps.bits - 1)
            code = code if keep_BO is None else torch.where(keep_BO[j], code, middle)
            codes[j], value = code, (code - middle) * scale
        errors[j] = (w_BO[j] - value) / u_BB[j, j]
        w_BO[j] = value
        w_BO[j + 1 :] -= u_BB[j, j + 1 :, None] * errors[j]
    return w_BO, errors, keep_BO, codes


def sweep(
    w_BO: Tensor, u_BB: Tensor, e_BO: Tensor, *, keep_BO: Tensor | None = None, steps: Steps | None = None,
    choice: Choice | None = None,
) -> Tensor | None:  # fmt: skip
    """Quantize or prune column after column, adding each column's error to the columns after it; returns uint8 codes.

    Returns None without `steps`. In place, w becomes the new values and e the errors (w - q) / U_jj, which the caller
    must apply to the columns after these B. With `choice`, the chosen mask is written to `keep_BO` (bool); without it,
    `keep_BO` is the mask to use. Everything else is float32; w and e are contiguous.
    Source: Frantar et al., GPTQ, ICLR 2023, algorithm 1; Frantar and Alistarh, SparseGPT, ICML 2023, algorithm 1.
    """
    from compress_kernels.gpu import solver

    return solver.sweep(w_BO, u_BB, e_BO, keep_BO, steps, choice)


def keep_nm_reference(score_NM: Tensor, n: int) -> Tensor:
    """The specification of `keep_nm`: an entry is kept if fewer than n are larger, or equal and further right."""
    place_M = torch.arange(score_NM.shape[1], device=score_NM.device)
    other, own = score_NM[:, None], score_NM[..., None]
    ahead = (other > own) | ((other == own) & (place_M > place_M[:, None]))
    return torch.as_tensor(ahead.sum(2) < n)


def keep_nm(score_NM: Tensor, n: int) -> Tensor:
    """A mask of the n highest scores of each row; of equal scores, the left ones are dropped. No score may be NaN."""
    from compress_kernels.gpu import solver

    return solver.keep_nm(score_NM.contiguous(), n)


def add_gram(sum_II: Tensor, x_TI: Tensor) -> None:
    """Add xᵀ x to the upper triangle of a float32 sum; entries below the diagonal are undefined afterwards.

    x is contiguous and float16 or bfloat16, so that products are exact; sums are float32.
    """
    from compress_kernels.gpu import solver

    solver.add_gram(sum_II, x_TI)


def mirror(sum_II: Tensor) -> None:
    """Copy the entries above the diagonal to those below it, in place."""
    from compress_kernels.gpu import solver

    solver.mirror(sum_II)


@dataclass(frozen=True, eq=False, kw_only=True)
class Queue:
    """The inputs that each row may grow (or drop), best first: one queue for a positive and one for a negative error.

    `value` [2, O, K] is not finite beyond the end of a queue; `index` [2, O, K], int32, holds the inputs.
    """

    value: Tensor
    index: Tensor


def exchange(
    part_OI: Tensor, keep_OI: Tensor, error_O: Tensor, grow: Queue, drop: Queue | Tensor, *, m: int, guarded: bool,
    cycles: int, threshold: float,
) -> Tensor:  # fmt: skip
    """The mask after up to `cycles` exchanges in each row; each grows and drops the first inputs of the row's queues.

    A row stops when the absolute value of its error is at most `threshold`, when a queue is exhausted, or when an
    exchange is not accepted. `guarded` accepts only exchanges that reduce the absolute error; otherwise, under n:m,
    only those that preserve the sign of the error. `part_OI` is the contribution of each weight to the error. Under n:m
    (m not 0), `drop` is a score [O, I] for each weight; dropped is the kept weight with the lowest score in the group
    of the grown one, except for weights that were exchanged before.
    Source: Zhang et al., "Dynamic Sparse No Training", ICLR 2024, algorithm 1; `compress.passes.pruning.dsnot`.
    """
    from compress_kernels.gpu import solver

    return solver.exchange(
        part_OI, keep_OI, error_O, grow, drop, m=m, guarded=guarded, cycles=cycles, threshold=threshold
    )


def swap_groups(
    w_OI: Tensor, kept_OI: Tensor, keep_OI: Tensor, c_OI: Tensor, gram_II: Tensor, loss_O: Tensor, block: slice, m: int,
    gain: float,
) -> Tensor:  # fmt: skip
    """Make the best swap in each group of m columns of a block, from left to right, if it lowers the row's loss enough.

    A swap restores one pruned weight to its value in w and prunes one kept weight; it is made if it changes the loss by
    less than -gain times the loss. `kept_OI`, `keep_OI` and `loss_O` change in place; `c_OI`, (w - kept) G, is that
    from before the block. Returns the number of swaps of each row, int32. Everything is float32 and contiguous, except
    that the mask is bool.
    Source: `compress.passes.pruning.swaps`.
    """
    from compress_kernels.gpu import solver

    return solver.swap_groups(w_OI, kept_OI, keep_OI, c_OI, gram_II, loss_O, block, m, gain)
