"""OATS: a matrix as a sparse term plus a low-rank term, fitted alternately.

What a reader would question: the sparse term gets every parameter that whole ranks leave over, and its values are the
difference between the weight and the factors as they are stored. So kept weights are exact up to one rounding, and
without factors the pass is Wanda. Shape suffixes: O out, I in, R rank, J some inputs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.base import Pruner, masked_outline
from compress.passes.budget import density
from compress.passes.hessian import damp
from compress.passes.pruning.reconstruct import least_squares
from compress.passes.subspace import Subspace
from compress.passes.whitened import output_basis, rank_within
from compress.stats import ColumnNorm, Gram, Statistic
from compress.weights import Dense, Masked, Pattern, Product, Sum, Weight, pattern

FAINTEST = 1e-4  # least norm of an input, relative to the median norm of those that occurred
DAMPING = 0.01  # share of mean(diag G) added to the diagonal, as in the other solvers


@dataclass(frozen=True, kw_only=True)
class OATS(Pruner, name="oats"):
    """W = S + A B by least squares of (W - S - A B) D, D the norms of the inputs, alternating between A B and S.

    Of the parameters that `sparsity` leaves, the share `rank_share` goes to A B; a matrix too small for rank 1 is only
    pruned, by the score of Wanda. With n:m the pattern is that of S, and A B is added to it: 2:4 with a rank_share of
    0.25 keeps two thirds of the parameters. `refit` then minimises the error of the output itself, first over the
    values of S, then over A B.
    Source: Zhang and Papyan, "OATS: Outlier-Aware Pruning Through Sparse and Low Rank Decomposition", ICLR 2025,
    algorithm 1. Deviations: a warm-started subspace replaces the decomposition in each iteration; parameters saved by
    rounding the rank down go to S; inputs without a norm are handled; `refit` is ours.
    """

    unfed = "split by its weights alone"
    gives = "split"

    rank_share: Annotated[
        float, Field(ge=0, lt=1, description="share of the kept parameters that goes to the factors")
    ] = 0.25
    iterations: Annotated[int, Field(ge=1, le=10000, description="alternations between fitting A B and S")] = 80
    refit: Annotated[
        bool, Field(description="finally refit to the output by least squares: the values of S, then A B")
    ] = False

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """Norms of the input; with `refit` also its Gram."""
        return (ColumnNorm, Gram) if self.refit else (ColumnNorm,)

    @property
    def kept(self) -> float:
        """The share of parameters that S, A and B may hold together."""
        share = density(self.sparsity)
        return share / (1 - self.rank_share) if isinstance(self.sparsity, str) else share

    def rank(self, shape: tuple[int, int]) -> int:
        """The number of columns of A; 0 where nothing is removed, or where the budget buys no rank."""
        return rank_within(self.rank_share * self.kept, shape) if self.kept < 1 else 0

    def remainder(self, shape: tuple[int, int]) -> Pattern:
        """The pattern of S: the n:m asked for, or the fraction that A and B leave of the budget."""
        if isinstance(self.sparsity, str):
            return self.pattern()
        return pattern(self.sparsity + self.rank(shape) * sum(shape) / (shape[0] * shape[1]), self.scope)

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError unless the pattern fits and both terms have a part, together smaller than the matrix."""
        super().check(site, shape)
        if self.kept >= 1 and isinstance(self.sparsity, str) and self.rank_share:
            raise RecipeError(
                f"{self.name}: {site}: {self.sparsity} with a rank_share of {self.rank_share:g} keeps "
                f"{self.kept:.0%} of the parameters; keep fewer, or lower rank_share"
            )
        left = self.kept - self.rank(shape) * sum(shape) / (shape[0] * shape[1])
        if self.rank(shape) and left * shape[1] < 1:
            raise RecipeError(
                f"{self.name}: {site}: rank {self.rank(shape)} leaves less than one weight per row of {shape[1]} "
                "for the sparse term; lower rank_share"
            )

    def score(self, site: Site) -> Tensor:
        """|w| * ||x||, float32; used where there are no factors."""
        return site.weight.dense().float().abs() * site.stats[ColumnNorm]

    def rewrite(self, site: Site) -> Weight:
        """Both terms, or the masked weight alone."""
        if not self.rank(site.shape):
            return self.cut(site, self.score)
        w_OI, norm_I = site.expect(Dense, by=self.name).data.float(), loudness(site.stats[ColumnNorm])
        left_OR, right_RI, mask_OI = self.split(w_OI * norm_I)
        name = self.remainder(site.shape).name
        if not self.refit:
            return stored(site, left_OR, right_RI / norm_I, mask_OI, name)
        factors_OI, gram_II = left_OR @ (right_RI / norm_I), damp(site.stats[Gram], DAMPING)
        sparse_OI, _ = least_squares(w_OI - factors_OI, mask_OI, gram_II, (w_OI - factors_OI) * mask_OI)
        left_OR = output_basis(w_OI - sparse_OI, gram_II, left_OR.shape[1])
        return stored(site, left_OR, left_OR.T @ (w_OI - sparse_OI), mask_OI, name, sparse_OI)

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same with equal norms for all inputs, and without a refit."""
        if not self.rank(site.shape):
            return super().rewrite_unfed(site)
        w_OI = site.expect(Dense, by=self.name).data.float()
        return stored(site, *self.split(w_OI), self.remainder(site.shape).name)

    def outline(self, site: Site) -> Weight | None:
        """Both terms, or the masked weight alone."""
        dense, rank = site.expect(Dense, by=self.name), self.rank(site.shape)
        if not rank:
            return super().outline(site)
        (rows, columns), like = site.shape, dense.data
        factors = Product(Dense(like.new_empty(rows, rank)), Dense(like.new_empty(rank, columns)))
        return Sum((masked_outline(Dense(torch.empty_like(like)), self.remainder(site.shape)), factors))

    def split(self, a_OI: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(A, B, mask of S) for a matrix in which all entries count equally."""
        shape = a_OI.shape[0], a_OI.shape[1]
        return by_turns(a_OI, self.rank(shape), self.remainder(shape), self.iterations)


def stored(
    site: Site, left_OR: Tensor, right_RI: Tensor, mask_OI: Tensor, name: str, sparse_OI: Tensor | None = None
) -> Weight:
    """Both terms in the dtype of the model, or S alone if the rank is 0.

    If `sparse_OI` is not given, S is the difference between the weight and the rounded factors.
    """
    kind = site.original.data.dtype
    left, right = Dense(left_OR.contiguous().to(kind)), Dense(right_RI.to(kind))
    if sparse_OI is None:
        sparse_OI = site.weight.dense().float() - left.data.float() @ right.data.float()
    site.ledger["rank"] = left_OR.shape[1]
    sparse = Masked(Dense((sparse_OI * mask_OI).to(kind)), mask_OI, name)
    return Sum((sparse, Product(left, right))) if left_OR.shape[1] else sparse


def by_turns(a_OI: Tensor, rank: int, chosen: Pattern, iterations: int) -> tuple[Tensor, Tensor, Tensor]:
    """(A [out, rank] orthonormal, B [rank, in], mask [out, in] of S), fitted alternately from S = 0.

    A' - S - A B| never grows, where A' is `a_OI`.
    """
    subspace, sparse_OI = Subspace(a_OI, rank), torch.zeros_like(a_OI)
    for _ in range(iterations):
        left_OR, right_RI = subspace.follow(a_OI - sparse_OI)
        rest_OI = a_OI - left_OR @ right_RI
        mask_OI = chosen.keep(rest_OI.abs())
        sparse_OI = rest_OI * mask_OI
    return left_OR, right_RI, mask_OI


def loudness(norm_I: Tensor) -> Tensor:
    """The norms of the inputs, clamped below at a small share of the median of the positive ones; 1 if all are 0."""
    came_J = norm_I[norm_I > 0]
    return norm_I.clamp(min=FAINTEST * float(came_J.median())) if len(came_J) else torch.ones_like(norm_I)
