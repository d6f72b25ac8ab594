"""Delta-CoMe: singular vectors in bands, each with as many bits as its singular values are worth.

What a reader would question: the grids. Each left column is scaled to the step of one grid for the whole factor, and
its scale is merged, with the singular value, into the scale of the right row; so a band stores one scale for each
singular pair and none for its left rows. Levels lie at half-integers, (c - (2**bits - 1) / 2) step, because nothing
here need be exactly 0, and at 2 bits a level at 0 costs a fifth more error. At 16 bits the factors are bfloat16. Groups
of scales along a vector were tried and left out: on the difference of a fine-tune, 64 inputs a group cost 9 % of the
bits for 4 % of the error at 2 bits. Shape suffixes: O out, I in, R rank, W widths.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.codec import Codec
from compress.passes.feedback import feed_back
from compress.passes.hessian import inverse_factor, shared_factor
from compress.passes.unbiased import unbiased
from compress.passes.whitened import answer, principal, solved, weighed
from compress.stats import Gram, Statistic
from compress.weights import Dense, Product, Quantized, Sum, Weight
from compress.weights.bits import packed_size

# the mean squared error of a normal variable of variance 1 on the best 2**bits evenly spaced levels; at 16 bits, what
# rounding to bfloat16 costs at most. Source: Max, "Quantizing for minimum distortion", IRE 1960, table II (to 5 bits);
# the values for 6 and 8 bits are measured
ROUNDING = {16: 2.0**-18, 8: 7.4e-5, 6: 1.041e-3, 5: 3.495e-3, 4: 1.154e-2, 3: 3.744e-2, 2: 0.1188}
SHARES = [2 ** (-i / 8) for i in range(25)]  # ends of the range to try, as shares of the largest |w|: down to an eighth
DAMPING = 0.01  # of error feedback, as in the paper
SIDE = 4096  # side of the matrices for which the paper gives the split
LARGEST, SMALLEST = 2.0**10, 2.0**-14  # limits of the scales of a band, so that they are normal float16 numbers
LEAST = 1e-30
NOTHING = 1e-9  # share of the energy below which a pair is lost in the rounding of the others, or is noise itself
Counts = Mapping[int, int]  # bits -> singular pairs


# -- how many bits ---------------------------------------------------------------------------------


def band_bytes(pairs: int, bits: int, shape: tuple[int, int]) -> int:
    """Bytes of a band: codes of both factors, a scale and a middle for each pair, and the grid of the left factor."""
    if not pairs:
        return 0
    if bits == 16:
        return 2 * pairs * sum(shape)
    return sum(packed_size(pairs * side, bits) for side in shape) + 4 * pairs + 6


def plan_bytes(counts: Counts, shape: tuple[int, int]) -> int:
    """Bytes of all bands."""
    return sum(band_bytes(pairs, bits, shape) for bits, pairs in counts.items())


def counted(bits_R: Tensor) -> dict[int, int]:
    """The number of pairs at each number of bits, from the most bits; dropped pairs are not counted."""
    found = {bits: int((bits_R == bits).sum()) for bits in ROUNDING}
    return {bits: pairs for bits, pairs in found.items() if pairs}


def most(limit: int, fits: Callable[[int], bool]) -> int:
    """The largest number up to `limit` that fits, provided that all below it fit."""
    return bisect_left(range(1, limit + 1), True, key=lambda n: not fits(n))


def lagrangian(energy_R: Tensor, noise_R: Tensor, shape: tuple[int, int], budget: int, dropped: float = 1.0) -> Tensor:
    """The bits of each pair, 0 if it is dropped, within `budget` bytes, int64 [R].

    Minimises the sum of `dropped` x `energy` over the dropped pairs and of d(b) `noise` over the others, at one price
    per byte, which is found by bisection. Bytes left over go to the first pairs, as far as they reach; pairs without
    energy get none.
    Source: lowrank_quant_delta.md section 3.2 after Shoham and Gersho, 1988.
    """
    widths_W = torch.tensor([0, *ROUNDING])
    size_W = torch.tensor([0.0, *(b * sum(shape) + (b < 16) * 32 for b in ROUNDING)], dtype=torch.float64)
    share_W = torch.tensor(list(ROUNDING.values()), dtype=torch.float64)
    energy_R, noise_R = energy_R.double().cpu(), noise_R.double().cpu()
    energy_R = torch.where(energy_R > NOTHING * energy_R.sum(), energy_R, 0.0)
    cost_RW = torch.cat((dropped * energy_R[:, None], noise_R[:, None] * share_W), 1)

    def at(price: float) -> Tensor:
        return widths_W[(cost_RW + price * size_W).argmin(1)]

    def fits(bits_R: Tensor) -> bool:
        return plan_bytes(counted(bits_R), shape) <= budget

    low, high = 0.0, float(cost_RW.max())
    if fits(at(low)):
        return at(low)
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if fits(at(middle)) else (middle, high)
    less_R, more_R = at(high), at(low)
    first = most(len(less_R), lambda n: fits(torch.cat((more_R[:n], less_R[n:]))))
    return torch.cat((more_R[:first], less_R[first:]))


def fits_in(budget: int, bits: int, shape: tuple[int, int], pairs: int) -> bool:
    """Whether a band fits in the budget."""
    return band_bytes(pairs, bits, shape) <= budget


def published(pairs: int, shape: tuple[int, int], budget: int) -> Tensor:
    """2 pairs of 8 bits and 32 of 3 for a side of 4096, in proportion for others; the rest has 2 bits; int64 [R]."""
    part = min(shape) / SIDE
    counts: dict[int, int] = {}
    for bits, wanted in ((8, max(1, round(2 * part))), (3, max(1, round(32 * part))), (2, pairs)):
        left = budget - plan_bytes(counts, shape)
        fits = partial(fits_in, left, bits, shape)
        counts[bits] = most(min(wanted, pairs - sum(counts.values())), fits)
    listed = [bits for bits, number in counts.items() for _ in range(number)]
    return torch.tensor(listed + [0] * (pairs - len(listed)))


# -- grids -----------------------------------------------------------------------------------------


def middle_of(bits: int) -> float:
    """The zero point in units of codes, halfway between the two middle codes."""
    return 2.0 ** (bits - 1) - 0.5


class Halves:
    """A rounding of columns to the levels (c - middle) step, with one step per row, which collects the codes."""

    aligned = 1
    width = 1

    def __init__(self, w_OI: Tensor, step_O: Tensor, bits: int) -> None:
        self.step_O, self.middle = step_O, middle_of(bits)
        self.codes_OI = torch.empty_like(w_OI, dtype=torch.uint8)

    def round(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> Tensor:
        """The levels of a column."""
        del keep_BO
        code_O = nearest(ahead_BO[0], self.step_O, self.middle)
        self.codes_OI[:, column] = code_O
        return (code_O - self.middle) * self.step_O


def nearest(w: Tensor, step: Tensor, middle: float) -> Tensor:
    """The nearest codes, as floats."""
    return (w / step).add_(middle).round_().clamp_(0, 2 * middle)


def encode(w_OI: Tensor, step_O: Tensor, bits: int, upper_II: Tensor | None) -> Tensor:
    """Codes, uint8 [out, in]: with error feedback by the factor of an inverse Gram, or the nearest."""
    if upper_II is None:
        return nearest(w_OI, step_O[:, None], middle_of(bits)).to(torch.uint8)
    rounding = Halves(w_OI, step_O, bits)
    feed_back(w_OI, upper_II, rounding)
    return rounding.codes_OI


def fitted_steps(w_OI: Tensor, bits: int, loud_I: Tensor) -> Tensor:
    """The step of each row, [out]: of 25, the one with the least squared error, each input weighted by `loud`."""
    top_O1, middle = w_OI.abs().amax(1, keepdim=True).clamp(min=LEAST), middle_of(bits)
    best_O = torch.full_like(top_O1[:, 0], torch.inf)
    step_O = torch.empty_like(best_O)
    for share in SHARES:
        step_O1 = top_O1 * (share / 2 ** (bits - 1))
        error_OI = nearest(w_OI, step_O1, middle).sub_(middle).mul_(step_O1).sub_(w_OI)
        cost_O = error_OI.square_() @ loud_I
        step_O = torch.where(cost_O < best_O, step_O1[:, 0], step_O)
        best_O = torch.minimum(cost_O, best_O)
    return step_O


# -- bands -----------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Heard:
    """What is known of the input: its Gram or None, the inverse factor if errors are fed back, and its variances.

    `loud` [in] is the variance of each input; with feedback, only the part that the inputs after it do not explain.
    Rounding a row w costs about d(b) |w|² mean(loud).
    """

    gram: Tensor | None = None
    upper_II: Tensor | None = None
    loud_I: Tensor = field(default_factory=lambda: torch.ones(1))


def energy_of(w_OI: Tensor, gram: Tensor | None) -> Tensor:
    """w G wᵀ of each row, [out]."""
    return (weighed(w_OI, gram) * w_OI).sum(1)


def band_of(rest_OI: Tensor, right_RI: Tensor, bits: int, heard: Heard) -> Product:
    """`right` rounded, then the left factor with the nearest output to that of `rest`, rounded too.

    The errors of the left factor are weighted by the Gram of z = V' x, with the right factor V' as it is stored.
    """
    if bits == 16:
        right = right_RI.to(torch.bfloat16)
        left_OR, _ = answer(rest_OI, right.float(), heard.gram)
        return Product(Dense(left_OR.to(torch.bfloat16)), Dense(right))
    step_R, middle = fitted_steps(right_RI, bits, heard.loud_I), middle_of(bits)
    codes_RI = encode(right_RI, step_R, bits, heard.upper_II)
    left_OR, z_RR = answer(rest_OI, (codes_RI.float() - middle) * step_R[:, None], heard.gram)
    left_R = fitted_steps(left_OR.T.contiguous(), bits, left_OR.new_ones(len(left_OR)))
    unit = torch.exp2(((step_R * left_R).max().clamp(min=LEAST) / LARGEST).log2().floor())
    scale_R = (step_R * left_R / unit).clamp(min=SMALLEST).half()
    left_R = scale_R.float() * unit / step_R  # the step that follows from the rounded scale
    known = None if heard.upper_II is None else inverse_factor(z_RR * left_R * left_R[:, None], DAMPING)
    codes_OR = encode(left_OR / left_R, left_OR.new_ones(len(left_OR)), bits, known and known[0])
    middle_R1 = torch.full_like(scale_R[:, None], middle)
    left = Quantized(codes_OR, unit.view(1, 1), middle_R1[:1].clone(), bits)
    return Product(left, Quantized(codes_RI, scale_R[:, None], middle_R1, bits))


def taken(w_OI: Tensor, band: Product, gram: Tensor | None) -> float:
    """The decrease of tr(W G Wᵀ) when the band is subtracted; only the right factor is multiplied by the Gram."""
    left_OR, right_RI = band.left.dense().float(), band.right.dense().float()
    seen_RI = weighed(right_RI, gram)
    both_OR = 2 * (w_OI @ seen_RI.T) - left_OR @ (right_RI @ seen_RI.T)
    return float((left_OR * both_OR).sum(dtype=torch.float64))


def bands_of(w_OI: Tensor, basis_OR: Tensor, bits_R: Tensor, heard: Heard, rounds: int) -> tuple[Product, ...]:
    """W in bands from the most bits to the fewest, each fitted to the residual of those before it, then refitted.

    In a refit the right factor is the best for the present left factor, and the new band is kept if it loses less.
    """
    rest_OI, made = w_OI, []
    for bits in counted(bits_R):
        band = band_of(rest_OI, basis_OR[:, bits_R.to(w_OI.device) == bits].T @ rest_OI, bits, heard)
        rest_OI = rest_OI - band.dense()
        made.append(band)
    for _ in range(rounds):
        for i, bits in enumerate(counted(bits_R)):
            own_OI = rest_OI + made[i].dense()
            left_OR = made[i].left.dense().float()
            right_IR = solved(own_OI.T @ left_OR, left_OR.T @ left_OR)
            if right_IR is None:
                continue
            again = band_of(own_OI, right_IR.T, bits, heard)
            if taken(own_OI, again, heard.gram) > taken(own_OI, made[i], heard.gram):
                rest_OI, made[i] = own_OI - again.dense(), again
    return tuple(made)


# -- the pass --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class DeltaCoMe(Codec, name="delta-come"):
    """W = sum of Q_b(U) Q_b(S Vᵀ): bands of singular pairs, many bits for the first and few or none for the last.

    U is that of W G Wᵀ unless `whitened` is off. The bits are either `published`, 8, 3 and 2 by the number of the pair,
    or `lagrangian`, those with the least estimated loss: a pair costs `dropped` s² if it is dropped and d(b) (s² + |v|²
    c) at b bits, with c the mean variance that error feedback leaves. At `dropped` 1 that is the output error of a site
    alone, but a larger value is better: on a fine-tune of the built-in model at 1 bit, KL was .0063 nats at 1, .0057 at
    2, .0055 at 3, .0054 at 5, and .0061 with the published bits. Perhaps this is because the error of dropped pairs
    points the same way in all sites, towards no difference; that was not tested. The bytes are those stored, including
    all scales.
    Source: Ping et al., "Delta-CoMe", NeurIPS 2024. Its released code calibrates the second band on outputs of the
    block instead of inputs, because it swaps their buffers once a band; here a block is walked once, so all bands of a
    site are made from one Gram of its input. Deviations: whitening and the allocation are ours; the left factor is the
    best for the rounded right factor, not U; each band is fitted to the residual of those before it, in the directions
    of one decomposition (another one after each band lowered no error by more than 0.2 % at `lagrangian`), and then
    refitted `rounds` times; grids are those of this module; columns keep their order.
    """

    unfed = "factored and rounded to nearest by its weights alone"
    bands: Annotated[
        Literal["lagrangian", "published"],
        Field(
            description="bits of each pair by what they gain, or as published: 8 for 2 pairs, 3 for 32, 2 for the "
            "rest (of 4096)"
        ),
    ] = "lagrangian"
    whitened: Annotated[bool, Field(description="decompose the output, not the weights")] = True
    dropped: Annotated[
        float, Field(ge=1, le=16, description="weight of the error of dropped pairs relative to rounding errors")
    ] = 3.0
    rounding: Annotated[
        Literal["gptq", "nearest"],
        Field(description="gptq: compensate each rounding error in later columns; nearest: do not"),
    ] = "gptq"
    rounds: Annotated[int, Field(ge=0, le=8, description="refits of each band, given the others")] = 1

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """The Gram, unless the weights alone decide."""
        return (Gram,) if self.whitened or self.rounding == "gptq" else ()

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if the budget does not buy one pair."""
        least = band_bytes(1, 8 if self.bands == "published" else min(ROUNDING), shape)
        if self.budget(shape) < least:
            raise RecipeError(
                f"{self.name}: {site}: {self.bits:g} bits per weight of {shape[0]}x{shape[1]} are {self.budget(shape)} "
                f"bytes; one pair of singular vectors takes {least}"
            )

    def rewrite(self, site: Site) -> Weight:
        """The bands, by the Gram of the input if one is needed and it is not 0."""
        if not self.requires or not site.stats[Gram].any():
            return self.banded(site, Heard())
        gram_II, upper_II = site.stats[Gram], None
        if self.rounding == "gptq":
            upper_II = shared_factor(site, DAMPING, self.name, "rounded to nearest")
        loud_I = gram_II.diagonal().clone() if upper_II is None else upper_II.diagonal() ** -2
        return self.banded(site, Heard(gram=gram_II, upper_II=upper_II, loud_I=loud_I))

    def rewrite_unfed(self, site: Site) -> Weight:
        """Bands of the plain singular value decomposition, rounded to nearest."""
        return self.banded(site, Heard())

    def banded(self, site: Site, heard: Heard) -> Weight:
        """The sum of the bands, or the only one."""
        w_OI = site.expect(Dense, by=self.name).data.float()
        self.check(site.name, site.shape)
        heard = heard if heard.gram is not None else Heard(loud_I=w_OI.new_ones(w_OI.shape[1]))
        _, basis_OR = principal(w_OI, heard.gram if self.whitened else None)
        right_RI = basis_OR.T @ w_OI
        energy_R = energy_of(right_RI, heard.gram)
        bits_R = self.allotted(energy_R, energy_R + right_RI.square().sum(1) * heard.loud_I.mean(), site.shape)
        made = bands_of(w_OI, basis_OR, bits_R, heard, self.rounds)
        site.ledger["bands"] = {str(bits): pairs for bits, pairs in counted(bits_R).items()}
        weight: Weight = made[0] if len(made) == 1 else Sum(made)
        return unbiased(weight, w_OI, heard.gram) if self.unbiased else weight

    def allotted(self, energy_R: Tensor, noise_R: Tensor, shape: tuple[int, int]) -> Tensor:
        """The bits of each pair; at least one pair is kept."""
        if self.bands == "published":
            return published(len(energy_R), shape, self.budget(shape))
        bits_R = lagrangian(energy_R, noise_R, shape, self.budget(shape), self.dropped)
        if not bits_R.any():  # nothing to gain: a weight of zeros
            bits_R[0] = min(ROUNDING)
        return bits_R
