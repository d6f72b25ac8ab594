"""LoRA: the adapter that was merged into a fine-tune, at the rank that is found for each matrix, without data.

A merge rounds W + A B to the dtype of the checkpoint, so every entry of the fine-tune confines the entry of A B to an
interval of one rounding step. The product is fitted to all of these intervals, not only to the difference D: truncating
the singular value decomposition of D leaves the rounding error of r (out + in) numbers in the product, and where A B is
smaller than a step, D is no noisy copy of it at all. Optimal shrinkage of the singular values (Gavish and Donoho, 2017)
was tried and was not nearer than truncation: rounding errors are small beside the singular values that can be found.
A difference that the intervals contradict is refused.
Shape suffixes: O out, I in, R rank, K singular vectors computed.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from typing import Annotated, ClassVar, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError, UnsupportedWeight
from compress.model.site import DeltaSite, Site
from compress.passes.base import WeightPass
from compress.passes.factorizer import factors_outline
from compress.passes.whitened import most_rank
from compress.weights import Dense, Product, Weight

PARTIAL = 2  # times the size of an entry, for the errors of its partial sums
STANDS_OUT = 1.2  # times what rounding alone leaves; measured: at most 1.17 without and 2.4 with another direction
NOTHING = 16  # eps of the largest singular value: rounding in the decomposition
SHARE = 0.5  # of the rank at which factors save nothing; higher, they have numbers enough to explain any difference
ENLARGED, NEAR = 12, 0.01  # attempts to enlarge a product until its merge is as large as D, to within this share
RELAXED = 1.8  # over-projection onto the intervals; 1 is plain projection, and 2 a reflection
EXTRA = 8  # directions iterated beyond those asked for
SWEEPS = 8  # of subspace iteration
WITHIN = 0.75  # of a rounding step: half a step is exact, the rest allows for how the merge computed A B
EXPLAINED = 0.99  # share of entries that must be within it
HELD_OUT, TRIAL = 1 / 16, 30  # share of entries to be foretold, and projections of the fit without them
FEWEST = 16  # changed entries among these; with fewer, nothing is foretold
FORETOLD = 0.5  # share that must be; measured: 0.92 to 1 of merged adapters, at most 0.25 of dense changes
INSTEAD = "the difference is not that of a merged adapter; use --method auto or lowrank"


@dataclass(frozen=True, kw_only=True)
class LoRA(WeightPass, name="lora"):
    """W' = A B, the product of least rank that explains a fine-tune up to the rounding of its dtype.

    The rank is the smallest k at which the next singular value of D is no larger than rounding makes it: it is compared
    with that of a merge simulated with the first k directions (a parametric bootstrap, in place of the threshold of
    Gavish and Donoho, which assumes noise of one variance, independent of the product). The product is then moved
    towards the intervals of all entries by relaxed alternating projections, and stored in the model's dtype, the
    singular values split evenly between A and B. Raises RecipeError for a site whose difference is of no such rank, or
    not explained in 99 % of its entries. A float32 checkpoint is computed in float64, because its rounding is as small
    as that of float32 arithmetic; others in float32.
    Source: Goyal, Vetterli and Thao, "Quantized overcomplete expansions in R^N", IEEE Transactions on Information
    Theory 1998, on consistent reconstruction by alternating projections; its use for low rank, and the rank, are ours.
    Compare Gavish and Donoho, "The optimal hard threshold for singular values is 4/sqrt(3)", IEEE TIT 2014.
    """

    takes: ClassVar[tuple[str, ...]] = ("dense",)
    gives: ClassVar[str] = "factored"

    largest: Annotated[int, Field(ge=1, le=4096, description="the largest rank that is accepted")] = 256
    steps: Annotated[
        int, Field(ge=0, le=10000, description="projections onto the rounding intervals; 0 truncates the difference")
    ] = 100

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError for a matrix so narrow that no rank could be told from rounding."""
        if self.most(shape) < 1:
            raise RecipeError(f"{self.name}: {site}: {shape[0]}x{shape[1]} is too narrow to find a rank; leave it out")

    def most(self, shape: tuple[int, int]) -> int:
        """The largest rank that is looked for in a matrix of this shape."""
        return min(self.largest, int(SHARE * most_rank(shape)))

    @property
    def foreseen(self) -> bool:
        """False: the values decide the rank."""
        return False

    def outline(self, site: Site) -> Weight | None:
        """Factors of the largest rank that can be found."""
        dense = site.expect(Dense, by=self.name)
        return factors_outline([site.name], [dense], self.most(site.shape))[site.name]

    def rewrite(self, site: Site) -> Weight:
        """The factors; raises RecipeError if the difference is not that of a merged adapter."""
        self.check(site.name, site.shape)
        merge = merged(site, self.name)
        left_OR, right_RI = self.recovered(merge, site.name)
        dtype = site.original.data.dtype
        made = Product(Dense(left_OR.to(dtype)), Dense(right_RI.to(dtype)))
        again_OI = (merge.base_OI.float() + made.dense().float()).to(merge.dtype)
        site.ledger |= {
            "rank": right_RI.shape[0],
            "steps_left": rms((merge.change_OI - left_OR @ right_RI) / merge.step_OI),
            "reproduced": float((again_OI.to(merge.own_OI.dtype) == merge.own_OI).double().mean()),
        }
        return made

    def recovered(self, merge: Merge, name: str) -> tuple[Tensor, Tensor]:
        """A [out, rank] and B [rank, in] in the precision of the merge; of rank 1 and zero if nothing differs."""
        if not merge.change_OI.any():
            return merge.change_OI[:, :1] * 0, merge.change_OI[:1] * 0
        entries, most = merge.change_OI.numel(), self.most((merge.change_OI.shape[0], merge.change_OI.shape[1]))
        start = least_rank(merge, most)
        if start is None:
            changed = int(merge.change_OI.count_nonzero())
            raise RecipeError(
                f"{self.name}: {name}: {changed:,} of {entries:,} entries are changed, which no product of rank {most} "
                f"or less explains; {INSTEAD}"
            )
        left_OR, right_RI = fitted(merge, *start, self.steps)
        reason = unexplained(merge, left_OR, right_RI)
        if reason:
            raise RecipeError(f"{self.name}: {name}: {reason}; {INSTEAD}")
        return left_OR, right_RI


class Merge(NamedTuple):
    """The matrices of a site before and after fine-tuning and their difference, all [out, in], in one precision.

    `step_OI` is the width of the interval to which rounding to `dtype` confines each entry of the product.
    """

    base_OI: Tensor
    own_OI: Tensor
    change_OI: Tensor
    step_OI: Tensor
    dtype: torch.dtype


def merged(site: Site, by: str) -> Merge:
    """What is known of the merge at a site; a site without a base is its own difference from 0.

    Raises UnsupportedWeight if an earlier pass has changed the weight, because its rounding is then unknown.
    """
    if site.weight is not site.original:
        raise UnsupportedWeight(f"{by} must be the first pass; {site.name} was changed before it")
    if isinstance(site, DeltaSite):
        return merge_of(site.own, site.base.data)
    return merge_of(site.original.data, torch.zeros_like(site.original.data))


def merge_of(own: Tensor, base: Tensor) -> Merge:
    """The matrices of a merge, in float32 if the fine-tune is of 16 bits, else in float64."""
    dtype = grid_of(own)
    precise = torch.float32 if dtype.itemsize == 2 else torch.float64
    own_OI, base_OI = own.to(precise), base.to(precise)
    change_OI = own_OI - base_OI
    # the product is rounded to the dtype, as PEFT does, and then the sum
    return Merge(base_OI, own_OI, change_OI, step_of(own_OI, dtype) + step_of(terms_of(change_OI, dtype), dtype), dtype)


def terms_of(change_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """The size of the numbers whose rounding decides the error of A B: its entries, if it is computed in float32.

    A float32 merge rounds every partial sum too. Their size is taken from the entries of the same row and column.
    """
    size_OI = change_OI.abs()
    if dtype.itemsize == 2:
        return size_OI
    square_OI = change_OI.square()
    rows_O1, columns_1I = (square_OI.mean(side, keepdim=True).sqrt() for side in (1, 0))
    return PARTIAL * torch.maximum(size_OI, torch.maximum(rows_O1, columns_1I))


def grid_of(own: Tensor) -> torch.dtype:
    """The coarsest dtype that holds every value: a float32 file may have been written from a bfloat16 model."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(own.to(dtype).to(own.dtype), own):
            return dtype
    return own.dtype


def step_of(w_OI: Tensor, dtype: torch.dtype) -> Tensor:
    """The distance between the numbers of `dtype` around each entry."""
    limits = torch.finfo(dtype)
    exponent = torch.frexp(w_OI.abs().clamp(min=limits.smallest_normal)).exponent
    return torch.ldexp(torch.full_like(w_OI, limits.eps), exponent - 1)


def leading(w_OI: Tensor, count: int) -> tuple[Tensor, Tensor, Tensor]:
    """U [out, K], the singular values [K] and Vᵀ [K, in] of the first K = `count` directions, falling.

    Exact where the matrix is not much larger than what is asked for, else by subspace iteration on the matrix itself;
    no Gram is made, which would square away small singular values.
    Source: Halko, Martinsson and Tropp, SIAM Review 2011, algorithm 4.4.
    """
    few = count + EXTRA
    if 4 * few >= min(w_OI.shape):
        left_OK, values_K, right_KI = torch.linalg.svd(w_OI, full_matrices=False)
        return left_OK[:, :count], values_K[:count], right_KI[:count]
    drawn = torch.randn(w_OI.shape[1], few, generator=torch.Generator().manual_seed(0), dtype=w_OI.dtype)
    right_IK = drawn.to(w_OI.device)
    for _ in range(SWEEPS):
        left_OK = torch.linalg.qr(w_OI @ right_IK).Q
        right_IK = torch.linalg.qr((left_OK.T @ w_OI).T).Q  # W.T @ U takes up to 30 times as long on a CPU
    turn_KK, values_K, right_KI = torch.linalg.svd(left_OK.T @ w_OI, full_matrices=False)
    return (left_OK @ turn_KK)[:, :count], values_K[:count], right_KI[:count]


def least_rank(merge: Merge, most: int) -> tuple[Tensor, Tensor] | None:
    """The first k directions of D, as U S [out, k] and Vᵀ [k, in], for the least k that suffices; None beyond `most`.

    k is doubled until it suffices, then halved into; that takes about 2 log2(k) simulated merges.
    """
    low, high = 0, 1  # low does not suffice
    left_OK, values_K, right_KI = leading(merge.change_OI, min(most, 2 * EXTRA) + 1)
    while not suffices(merge, left_OK, values_K, right_KI, high):
        if high == most:
            return None
        low, high = high, min(2 * high, most)
        if high >= len(values_K):
            left_OK, values_K, right_KI = leading(merge.change_OI, min(most, 2 * high) + 1)
    while high - low > 1:
        middle = (low + high) // 2
        if suffices(merge, left_OK, values_K, right_KI, middle):
            high = middle
        else:
            low = middle
    return left_OK[:, :high] * values_K[:high], right_KI[:high]


def suffices(merge: Merge, left_OK: Tensor, values_K: Tensor, right_KI: Tensor, rank: int) -> bool:
    """Whether a merge of the first `rank` directions, by rounding alone, has as large a singular value after them."""
    nothing = NOTHING * torch.finfo(values_K.dtype).eps
    if len(values_K) <= rank or values_K[rank] <= nothing * values_K[0]:
        return True
    u_OK, v_KI = left_OK[:, :rank], right_KI[:rank]
    again_OI = simulated(merge, (u_OK * values_K[:rank]) @ v_KI)
    rest_OI = again_OI - u_OK @ (u_OK.T @ again_OI)
    rest_OI -= (rest_OI @ v_KI.T) @ v_KI
    return bool(values_K[rank] <= STANDS_OUT * leading(rest_OI, 1)[1][0])


def simulated(merge: Merge, product_OI: Tensor) -> Tensor:
    """The difference that merging this product would leave, the product first enlarged to what it has to be.

    A product whose entries are smaller than a step is mostly rounded away, so that the directions of a difference are
    shorter than those of the product that was merged. It is enlarged until its merge holds as much of them.
    """
    whole, factor = float(product_OI.square().sum()), 1.0
    for _ in range(ENLARGED):
        again_OI = (merge.base_OI + (factor * product_OI).to(merge.dtype)).to(merge.dtype).to(
            product_OI.dtype
        ) - merge.base_OI
        share = float((again_OI * product_OI).sum()) / whole
        if abs(share - 1) < NEAR:
            break
        factor *= min(2.0, 1 / share) if share > 0 else 2.0
    return again_OI


def fitted(merge: Merge, left_OR: Tensor, right_RI: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """A [out, R] and B [R, in] whose product lies in as many of the intervals as `steps` projections achieve.

    In turn, the product is moved past the nearest point of every interval, and back to rank R by one step of subspace
    iteration from its present directions; each costs 4 out x in x R operations.
    """
    low_OI, high_OI = merge.change_OI - merge.step_OI / 2, merge.change_OI + merge.step_OI / 2
    for _ in range(steps):
        product_OI = left_OR @ right_RI
        moved_OI = product_OI.lerp(torch.clamp(product_OI, low_OI, high_OI), RELAXED)
        basis_IR = torch.linalg.qr((torch.linalg.qr(left_OR).Q.T @ moved_OI).T).Q
        left_OR, right_RI = moved_OI @ basis_IR, basis_IR.T
    return balanced(left_OR, right_RI)


def unexplained(merge: Merge, left_OR: Tensor, right_RI: Tensor) -> str:
    """Why a product is not what was merged, or "" if nothing speaks against it."""
    entries, rank = merge.change_OI.numel(), right_RI.shape[0]
    off = int(((merge.change_OI - left_OR @ right_RI).abs() > WITHIN * merge.step_OI).sum())
    if off > (1 - EXPLAINED) * entries:
        return (
            f"{off:,} of {entries:,} entries are more than {WITHIN} of a rounding step from the base plus a product of "
            f"rank {rank}"
        )
    right = foretold(merge, rank)
    if right < FORETOLD:
        return (
            f"a product of rank {rank} fits, but foretells only {right:.0%} of the changed entries it was not fitted to"
        )
    return ""


def foretold(merge: Merge, rank: int) -> float:
    """The share of changed entries that a product foretells, to half of the change or to within its rounding.

    It is fitted to all but a sixteenth of the entries, and judged by the changed ones among these; 0 if there are too
    few. Changes of about one step can be fitted by chance, but not foretold.
    """
    drawn_OI = torch.rand(merge.change_OI.shape, generator=torch.Generator().manual_seed(0))
    out_OI = (drawn_OI < HELD_OUT).to(merge.change_OI.device)
    asked_OI = out_OI & (merge.change_OI != 0)
    if int(asked_OI.sum()) < FEWEST:
        return 0.0
    rest = merge._replace(
        change_OI=merge.change_OI.masked_fill(out_OI, 0), step_OI=merge.step_OI.masked_fill(out_OI, torch.inf)
    )
    left_OK, values_K, right_KI = leading(rest.change_OI, rank)
    left_OR, right_RI = fitted(rest, left_OK * values_K, right_KI, TRIAL)
    reach_OI = torch.maximum(WITHIN * merge.step_OI, merge.change_OI.abs() / 2)
    near_OI = (merge.change_OI - left_OR @ right_RI).abs() <= reach_OI
    return float(near_OI[asked_OI].double().mean())


def balanced(left_OR: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor]:
    """The same product, its singular values split evenly between the factors, so that float16 holds both."""
    outer_OR, left_RR = torch.linalg.qr(left_OR)
    inner_IR, right_RR = torch.linalg.qr(right_RI.T)
    u_RR, values_R, v_RR = torch.linalg.svd(left_RR @ right_RR.T)
    root_R = values_R.sqrt()
    return outer_OR @ (u_RR * root_R), (root_R[:, None] * v_RR) @ inner_IR.T


def rms(w_OI: Tensor) -> float:
    """The root mean square of the entries."""
    return float(torch.linalg.vector_norm(w_OI)) / sqrt(w_OI.numel())
