"""SLiM: a mask, a grid and two thin matrices, each fitted to what the others leave.

What a reader would question: the defaults are not the paper's. The paper's mask (Wanda), rounding (to nearest) and
metric (the diagonal) are the options `nearest` and `diagonal`. Choosing mask and codes in one sweep of error feedback,
with the full Gram and several rounds, halves the divergence (recipes/slim-2of4-int4.yaml).
Shape suffixes: O out, I in, N any size, C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError, UnsupportedWeight
from compress.model.site import Site, energy
from compress.passes.base import Sparsity, masked_outline
from compress.passes.corrector import Corrector, stored_outline
from compress.passes.feedback import Chosen, feed_back
from compress.passes.hessian import shared_factor
from compress.passes.quantization.gptq import Ranges, gptq, grids_of
from compress.stats import ColumnNorm, Gram, Statistic
from compress.weights import Dense, Grid, Masked, Pattern, Quantized, Sum, Weight, pattern
from compress.weights.grid import narrowed, stored_scale

COARSE = 11  # clipping values tried first, as in the released code
FEWEST, MOST = 512, 20000  # bins of the histogram: one per thousand weights, between these limits
FINE = 32  # least number of bins per step of the grid: with only a few, the costs of clipping values are noise
AT_ONCE = 1 << 22  # errors computed together
Coder = Callable[[Tensor], Weight]


def best_clip(w_OI: Tensor, bits: int) -> float:
    """The |w| above which to clip: the edge of a histogram bin with the least squared error.

    Each bin is represented by its middle, rounded to the step clip / (2**(bits-1) - 1) with codes from -2**(bits-1).
    Eleven edges are tried first, then all edges between the neighbours of the best.
    Source: Mozaffari et al., "SLiM", ICML 2025, SLiM-Quant. Deviations: signs are kept, because codes reach one step
    further down than up; the rounding error is that of the full step, where the paper takes x - floor(x / h) h for half
    of it, which is the same on average; and the whole range is kept if the weights themselves then have the smaller
    error, because a bin does not represent outliers well.
    """
    top, levels = float(w_OI.abs().max()), 2 ** (bits - 1)
    if top == 0:
        return 1.0
    bins = min(max(w_OI.numel() // 1000, FEWEST, FINE * levels), MOST)
    count_N = torch.histc(w_OI.float(), 2 * bins, -top, top)
    edge_N = torch.arange(1, bins + 1, device=w_OI.device) * (top / bins)
    middle_N = torch.cat((-edge_N.flip(0), edge_N - top / bins)) + top / bins / 2

    def cost(clip_C: Tensor) -> Tensor:
        total_C: Tensor = (deviations(middle_N, clip_C[:, None], levels).square_() * count_N).sum(1)
        return total_C

    coarse_C = torch.linspace(0, bins - 1, COARSE, device=w_OI.device).long()
    at = int(cost(edge_N[coarse_C]).argmin())
    fine_C = edge_N[int(coarse_C[max(at - 1, 0)]) : int(coarse_C[min(at + 1, COARSE - 1)]) + 1]
    costs = torch.cat([cost(part_C) for part_C in fine_C.split(max(1, AT_ONCE // len(count_N)))])
    ends = float(fine_C[int(costs.argmin())]), top
    return min(ends, key=lambda clip: float(deviations(w_OI.float(), clip, levels).square_().sum()))


def deviations(w: Tensor, clip: Tensor | float, levels: int) -> Tensor:
    """w' - w, where w' is the nearest to w of the codes -levels to levels - 1, and levels - 1 stands for `clip`."""
    step = clip / (levels - 1)
    return (w / step).round_().clamp_(-levels, levels - 1).mul_(step).sub_(w)


@dataclass(frozen=True, kw_only=True)
class ClippedGrid(Grid):
    """One symmetric grid for the whole matrix, with the range that `best_clip` finds."""

    group: int = -1
    symmetric: bool = True

    def fit(
        self, w_OI: Tensor, *, search: bool = False, norm: float = 2, gram_II: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """The scale [1, 1], and no zero."""
        del search, norm, gram_II
        step = best_clip(w_OI, self.bits) / (2 ** (self.bits - 1) - 1)
        return narrowed(stored_scale(torch.full((1, 1), step, device=w_OI.device))), None


@dataclass(frozen=True, kw_only=True)
class SLiM(Corrector, name="slim"):
    """W' + A B: W' masked and on a grid, A B the correction of its error, then W' made again for W - A B.

    Mask, codes and factors are fitted in turn, each to what the others leave. The result with the least output error is
    kept, so more rounds are never worse. `feedback` chooses mask and codes as SparseGPT and GPTQ do, anew in each
    round; `nearest` rounds under the mask of Wanda. A mask that an earlier pass chose stays, and the values under it
    are made anew. The mask applies to W' only: W' is exactly 0 where it cuts, the sum with A B is not.
    Source: Mozaffari et al., "SLiM", ICML 2025; the paper is `rounding: nearest`, `metric: diagonal`, `group: -1`,
    `rounds: 1`, without the refit that follows the last codes. Deviations: Wanda's norms of 0 are raised to the
    smallest above 0, which the paper adds to all norms; the first grid too is fitted to the kept weights only, in the
    paper to all weights; factors of 4 bits have one scale for A and one per row of B, not one per tile of 128.
    """

    unfed = "masked by magnitude, rounded to nearest and corrected by its weights alone"
    takes = ("dense", "pruned")
    gives = "quantized"

    sparsity: Annotated[
        Sparsity | None,
        Field(description="fraction dropped, or n:m with n KEPT of every m inputs; null: choose no mask"),
    ] = None
    bits: Annotated[int, Field(ge=2, le=8, description="bits per code")] = 4
    group: Annotated[
        int, Field(ge=-1, description="inputs that share a scale; 0: a whole row, -1: the whole matrix, by SLiM-Quant")
    ] = 64
    search: Annotated[bool, Field(description="shrink the range of each group to minimise |w - w'|**2.4")] = False
    rounding: Annotated[
        Literal["feedback", "nearest"],
        Field(description="feedback: compensate each rounding error in later columns; nearest: do not"),
    ] = "feedback"
    rounds: Annotated[int, Field(ge=1, le=32, description="rounds of refitting W' to W - A B and A B to W - W'")] = 4
    damping: Annotated[float, Field(gt=0, le=1, description="share of mean(diag G) added to the diagonal")] = 0.01

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """The norms for Wanda and the diagonal metric, and the Gram by which results are compared."""
        return ColumnNorm, Gram

    def __post_init__(self) -> None:
        super().__post_init__()
        try:
            self.pattern()
        except RecipeError as error:
            raise RecipeError(f"{self.name}.{error}") from error
        if self.search and self.group < 0:
            raise RecipeError(
                f"{self.name}.search: SLiM-Quant has a search of its own; leave search out, or give a group of 0 or "
                "more"
            )

    def pattern(self) -> Pattern | None:
        """The pattern defined by `sparsity`, or None.

        With `feedback`, a fraction is chosen as in SparseGPT: all rows of a block of columns compete.
        """
        if self.sparsity is None:
            return None
        return pattern(self.sparsity, "matrix" if self.rounding == "feedback" else "row")

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError unless the factors are smaller than the matrix, and the pattern and the group fit it."""
        super().check(site, shape)
        chosen = self.pattern()
        reason = chosen.check(shape) if chosen else None
        if reason:
            raise RecipeError(f"{self.name}: {site}: {reason}")
        if self.group > 0 and shape[1] % self.group:
            raise RecipeError(f"{self.name}: {site}: group {self.group} does not divide its width of {shape[1]}")

    @property
    def grid(self) -> Grid:
        """The grid defined by the options."""
        return ClippedGrid(bits=self.bits) if self.group < 0 else Grid(bits=self.bits, group=self.group)

    def rewrite(self, site: Site) -> Weight:
        """The best result of all rounds by output error."""
        gram_II, w_OI = site.stats[Gram], site.target.data.float()
        code = self.by_feedback(site) if self.rounding == "feedback" else None
        errors: list[float] = []

        def error(result: Weight) -> float:
            errors.append(float(energy(result.dense().float() - w_OI, gram_II)))
            return errors[-1]

        norm_I = site.stats[ColumnNorm]
        code = code or self.to_nearest(site, w_OI.abs() * raised(norm_I))
        best = min(self.tried(w_OI, code, self.weighing(site)), key=error)
        full = float(energy(w_OI, gram_II).clamp(min=1e-30))
        site.ledger["output_errors"] = [(each / full) ** 0.5 for each in errors]
        return best

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same without input statistics: a mask by magnitude, nearest codes and factors of the weight error."""
        w_OI = site.target.data.float()
        made = self.tried(w_OI, self.to_nearest(site, w_OI.abs()), None)
        return min(made, key=lambda result: float((result.dense().float() - w_OI).square().sum()))

    def outline(self, site: Site) -> Weight | None:
        """Codes, under the given or the chosen mask, and two factors."""
        given, chosen = self.masked(site), self.pattern()
        grid = Grid(bits=self.bits, group=self.group, symmetric=self.group < 0)
        coded: Weight = grid.quantize(site.original.data.float())
        if given is not None:
            coded = replace(given, values=coded)
        elif chosen is not None:
            coded = masked_outline(coded, chosen)
        return Sum((coded, stored_outline(site.shape, self.rank_of(site.shape), self.precision)))

    def tried(self, w_OI: Tensor, code: Coder, metric: Tensor | None) -> Iterator[Weight]:
        """The sum after each step: codes for what the factors leave, then factors for what the codes leave."""
        coded = code(w_OI)
        factors, _ = self.correction(w_OI - coded.dense().float(), metric)
        yield Sum((coded, factors))
        for _ in range(self.rounds):
            coded = code(w_OI - factors.dense().float())
            yield Sum((coded, factors))
            factors, _ = self.correction(w_OI - coded.dense().float(), metric)
            yield Sum((coded, factors))

    def masked(self, site: Site) -> Masked | None:
        """The weight if an earlier pass has masked it, None if it is dense; raises UnsupportedWeight for others."""
        match site.weight:
            case Masked(Dense()) as weight if self.sparsity is None:
                return weight
            case Masked(Dense()):
                raise UnsupportedWeight(
                    f"{self.name}: {site.name} is already {site.weight.describe()}; leave out sparsity to keep that "
                    "mask"
                )
            case _:
                site.expect(Dense, by=self.name)
                return None

    def to_nearest(self, site: Site, score_OI: Tensor) -> Coder:
        """A function that rounds to nearest, under the given mask or one that keeps the highest scores."""
        given, chosen = self.masked(site), self.pattern()
        if given is not None:
            mask_OI, name = given.mask_OI, given.pattern
        elif chosen is not None:
            mask_OI, name = chosen.keep(score_OI), chosen.name
        else:
            return lambda w_OI: self.grid.quantize(w_OI, search=self.search)
        return lambda w_OI: Masked(self.grid.quantize(w_OI * mask_OI, search=self.search), mask_OI, name)

    def by_feedback(self, site: Site) -> Coder | None:
        """A function that rounds by GPTQ's sweep under the given mask or none, or by SparseGPT's.

        Returns None, with a fallback recorded, if the Gram has no inverse factor.
        """
        given, chosen = self.masked(site), self.pattern()
        upper_II = shared_factor(site, self.damping, self.name, "rounded to nearest")
        if upper_II is None:
            return None
        dead_I, ranges = site.stats[Gram].diagonal() == 0, Ranges(search=self.search)

        def sweep(w_OI: Tensor) -> Weight:
            if chosen is None:
                keep_OI = None if given is None else given.mask_OI
                quantized, _ = gptq(w_OI, upper_II, self.grid, keep_OI, ranges=ranges)
                return quantized if given is None else Masked(quantized, given.mask_OI, given.pattern)
            grids = grids_of(self.grid, w_OI, ranges)
            _, keep_OI, _ = feed_back(w_OI, upper_II, grids, Chosen(chosen, dead_I))
            scale, zero = grids.result()
            return Masked(Quantized(grids.codes_OI, scale, zero, self.bits), torch.as_tensor(keep_OI), chosen.name)

        return sweep


def raised(norm_I: Tensor) -> Tensor:
    """The norms, with those of 0 raised to the smallest positive one, so that weights of silent inputs still differ."""
    heard_I = norm_I[norm_I > 0]
    return norm_I.clamp(min=float(heard_I.min()) if len(heard_I) else 1.0)
