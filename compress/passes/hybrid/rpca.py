"""Robust PCA: a low-rank term and a sparse term that add up to a matrix, both determined by one weight, lambda.

What a reader would question: whether it compresses. It finds the structure that is there and has no budget. Trained
matrices are not low-rank plus sparse: for those of the built-in model both terms take 1.4 to 2.1 times the bytes of the
matrix (lam 1 and 2), so each stays whole and the run says so. To meet a budget use `oats`, which takes the same two
steps with hard thresholds. This pass is for a matrix that was made that way. Shape suffixes: O out, I in, R rank, N the
shorter side, M the other.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import sqrt
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.base import WeightPass
from compress.passes.hybrid.oats import loudness, stored
from compress.stats import ColumnNorm, Statistic
from compress.weights import Dense, Weight
from compress.weights.pattern import percent

GROWTH = 1.5  # factor of the penalty in each step; with START the schedule of the released inexact_alm_rpca
START = 1.25
STEPS = 100


@dataclass(frozen=True, kw_only=True)
class RPCA(WeightPass, name="rpca"):
    """W = S + A B with the least |A B|_* + lambda |S|_1, by the inexact augmented Lagrange multiplier method.

    If both terms together take no fewer bytes than the matrix, it stays as it is and a fallback is recorded. With
    `scaled` the decomposed matrix is that of `oats`, W D with D the norms of the inputs.
    Source: Lin, Chen and Ma, "The Augmented Lagrange Multiplier Method for Exact Recovery of Corrupted Low-Rank
    Matrices", 2010, algorithm 5. Deviations: singular values come from the Gram of the shorter side, in float64; the
    iteration ends at `tolerance`, because stored weights are rounded, and down to 1e-7 the rounding is neither sparse
    nor of low rank.
    """

    unfed = "split by its weights alone"
    takes = ("dense",)
    gives = ""  # split, or unchanged

    lam: Annotated[float, Field(gt=0, le=1000, description="lambda in units of 1 / sqrt(the longer side)")] = 1.0
    scaled: Annotated[bool, Field(description="weight each input by its norm")] = True
    tolerance: Annotated[float, Field(gt=0, lt=1, description="stop when |W - S - A B| / |W| is at most this")] = 0.01

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """Norms of the input with `scaled`, else nothing."""
        return (ColumnNorm,) if self.scaled else ()

    def rewrite(self, site: Site) -> Weight:
        """Both terms, or the unchanged matrix."""
        return self.split(site, loudness(site.stats[ColumnNorm]) if self.scaled else None)

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same without norms."""
        return self.split(site, None)

    @property
    def foreseen(self) -> bool:
        """False: it has no budget."""
        return False

    def outline(self, site: Site) -> Weight | None:
        """The matrix, which is the most that the result can take."""
        return replace(site.expect(Dense, by=self.name))

    def split(self, site: Site, norm_I: Tensor | None) -> Weight:
        """Both terms if they take fewer bytes; otherwise the matrix, with a fallback recorded."""
        dense = site.expect(Dense, by=self.name)
        w_OI = dense.data.float()
        scale_I = torch.ones_like(w_OI[0]) if norm_I is None else norm_I
        left_OR, right_RI, mask_OI = decompose(w_OI * scale_I, self.lam / sqrt(max(w_OI.shape)), self.tolerance)
        kept = float(mask_OI.float().mean())
        both = stored(site, left_OR, right_RI / scale_I, mask_OI, percent(round(1 - kept, 4)))
        if both.nbytes() < dense.nbytes():
            return both
        share = both.nbytes() / dense.nbytes()
        cost = f"rank {left_OR.shape[1]} and {kept:.0%} of the entries take {share:.2f} times its bytes"
        site.fall_back(self.name, f"left unchanged: {cost}")
        return dense


def decompose(a_OI: Tensor, lam: float, tolerance: float) -> tuple[Tensor, Tensor, Tensor]:
    """(A [out, rank], B [rank, in], mask of S [out, in]) of the matrix, float32; `lam` is lambda itself."""
    size = float(torch.linalg.vector_norm(a_OI))
    if not size:
        return a_OI[:, :0], a_OI[:0], torch.zeros_like(a_OI, dtype=torch.bool)
    largest = float(torch.linalg.matrix_norm(a_OI, 2))
    penalty = START / largest
    dual_OI, sparse_OI = a_OI / max(largest, float(a_OI.abs().max()) / lam), torch.zeros_like(a_OI)
    for _ in range(STEPS):
        left_OR, right_RI = shrunk(a_OI - sparse_OI + dual_OI / penalty, 1 / penalty)
        rest_OI = a_OI - left_OR @ right_RI
        wanted_OI = rest_OI + dual_OI / penalty
        sparse_OI = wanted_OI.sign() * (wanted_OI.abs() - lam / penalty).clamp(min=0)
        left_out_OI = rest_OI - sparse_OI
        if float(left_out_OI.norm()) <= tolerance * size:
            break
        dual_OI += penalty * left_out_OI
        penalty *= GROWTH
    return left_OR, right_RI, sparse_OI != 0


def shrunk(a_OI: Tensor, by: float) -> tuple[Tensor, Tensor]:
    """The factors, one orthonormal, of a matrix with each singular value `by` less, without those that reach 0."""
    wide = a_OI.shape[0] <= a_OI.shape[1]
    a_NM = (a_OI if wide else a_OI.T).double()
    squares_N, basis_NN = torch.linalg.eigh(a_NM @ a_NM.T)
    values_N = squares_N.clamp(min=0).sqrt()
    kept = values_N > by
    basis_NR = basis_NN[:, kept]
    other_RM = (1 - by / values_N[kept])[:, None] * (basis_NR.T @ a_NM)
    basis_NR, other_RM = basis_NR.float(), other_RM.float()
    return (basis_NR, other_RM) if wide else (other_RM.T.contiguous(), basis_NR.T.contiguous())
