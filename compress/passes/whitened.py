"""The best low-rank matrix for an input, the best factor beside a given one, and when factors are worth their bits.

An input is given by its Gram [in, in], by the mean squares of independent features [in], or not at all, which means
white.
Shape suffixes: O out, I in, R rank.
"""

from __future__ import annotations

from math import floor, log

import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.passes.hessian import inverse_factor

FAINT = 1e-5  # of the largest energy: float32 directions of smaller ones lose 0.2 % more than the best, then everything
AT_ONCE = 1024  # columns of a Gram converted together
SLIGHT = 1e-5  # damping of least squares
QUIET = 1e-8  # of the output of the loudest direction: below it nothing is left of another one, even in float64


def principal(w_OI: Tensor, metric: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Orthonormal U [out, R] and the energies [R] of W along its columns, falling, for the full R = min(out, in).

    They are the eigenvectors and eigenvalues of W G Wᵀ. The first r of them hold as much of the output energy as any r
    directions can: for A = U Uᵀ W, tr((W - A) G (W - A)ᵀ) is the sum of the energies left out, the least for its rank.
    If there are more outputs than inputs, W = Q R, and the eigenvectors are those of the smaller R multiplied by Q. No
    root of G, which may be singular, is taken. In float32 an energy below a part in 10^6 of the largest is noise. Where
    the first half of the energies comes close to that, as it does behind tokens of huge activations, everything is
    computed again in float64, at two to three times the cost. With a white input this is the singular value
    decomposition.
    Source: Wang et al., SVD-LLM, ICLR 2025, theorem 1, without its inverse: S S^-1 cancels in U Uᵀ W.
    """
    values_R, basis_OR = directions(w_OI, metric)
    if float(values_R[len(values_R) // 2]) < FAINT * float(values_R[0]):
        values_R, basis_OR = (each.to(w_OI.dtype) for each in directions(w_OI.double(), metric))
    return values_R, basis_OR


def directions(w_OI: Tensor, metric: Tensor | None) -> tuple[Tensor, Tensor]:
    """The energies and directions that `principal` returns, computed in the precision of W."""
    if w_OI.shape[0] > w_OI.shape[1]:
        outer_OI, inner_II = torch.linalg.qr(w_OI)
        values_R, basis_IR = directions(inner_II, metric)
        return values_R, outer_OI @ basis_IR
    values_R, basis_OR = torch.linalg.eigh(weighed(w_OI, metric) @ w_OI.T)
    return values_R.flip(0).clamp(min=0), basis_OR.flip(1)


def weighed(w_OI: Tensor, metric: Tensor | None) -> Tensor:
    """W G in the precision of W; a Gram of another dtype is converted in parts, so that no full copy of it is made."""
    if metric is None:
        return w_OI
    if metric.ndim == 1 or metric.dtype == w_OI.dtype:
        return w_OI @ metric if metric.ndim == 2 else w_OI * metric
    return torch.cat([w_OI @ part_IB.to(w_OI.dtype) for part_IB in metric.split(AT_ONCE, 1)], 1)


def answer(rest_OI: Tensor, right_RI: Tensor, gram: Tensor | None) -> tuple[Tensor, Tensor]:
    """The left factor [out, R] that with `right` loses least of `rest`, and the Gram of the output of `right`.

    Behind tokens of huge activations float32 leaves nothing of the quieter directions; they are computed in float64.
    Raises CalibrationError if that does not help.
    """
    for dtype in (torch.float32, torch.float64):
        seen_RI = weighed(right_RI.to(dtype), gram)
        z_RR = seen_RI @ right_RI.to(dtype).T
        left_OR = solved(rest_OI.to(dtype) @ seen_RI.T, z_RR) if bool((z_RR.diagonal() >= 0).all()) else None
        if left_OR is not None:
            return left_OR.float(), z_RR.float()
    raise CalibrationError("the Gram of a right factor's output is not positive definite at any damping")


def solved(target_OR: Tensor, z_RR: Tensor) -> Tensor | None:
    """T Z^-1, slightly damped after Z was scaled to a unit diagonal; None if that is not positive definite.

    A direction without energy gets a column of zeros.
    """
    size_R = z_RR.diagonal().clamp(min=0).sqrt()
    heard_R = size_R > QUIET * size_R.max()
    unit_R = torch.where(heard_R, 1 / size_R.clamp(min=1e-30), 0)
    z_RR = z_RR * unit_R * unit_R[:, None]
    z_RR.diagonal()[~heard_R] = 1
    found = inverse_factor(z_RR, SLIGHT)
    return None if found is None else (target_OR * unit_R) @ found[0].T @ found[0] * unit_R


def output_basis(w_OI: Tensor, metric: Tensor | None, rank: int) -> Tensor:
    """The first `rank` directions found by `principal`, [out, R]; fewer if the matrix has fewer."""
    return principal(w_OI, metric)[1][:, :rank]


def rank_within(share: float, shape: tuple[int, int]) -> int:
    """The largest rank whose two factors hold at most `share` of the parameters of a matrix [out, in]."""
    rows, columns = shape
    return floor(share * rows * columns / (rows + columns) + 1e-9)


def most_rank(shape: tuple[int, int]) -> int:
    """The largest rank whose two factors hold fewer numbers than the matrix [out, in] itself."""
    rows, columns = shape
    return (rows * columns - 1) // (rows + columns)


def bits_saved(was_OI: Tensor, left_OI: Tensor) -> float:
    """Bits a weight by which the codes of the remainder may be shorter for the same output error, log4(|W|² / |R|²).

    With error feedback, the output error grows with the square of the step and with the conditional variances of the
    inputs; only the step depends on the matrix that is coded.
    """
    least = torch.finfo(torch.float32).tiny
    return log(max(float(was_OI.square().sum()), least) / max(float(left_OI.square().sum()), least), 4)
