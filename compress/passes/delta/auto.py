"""Auto: for each matrix, the codec with the least output error within the bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor
from typing import Annotated

from pydantic import Field

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.base import WeightPass
from compress.passes.codec import Codec, kept_within
from compress.passes.delta.bitdelta import BitDelta
from compress.passes.delta.delta_come import DeltaCoMe
from compress.passes.probes import output_cost
from compress.passes.pruning.magnitude import Magnitude
from compress.passes.pruning.sparsegpt import SparseGPT
from compress.passes.quantization.gptq import GPTQ
from compress.passes.quantization.rtn import RTN
from compress.passes.unbiased import unbiased
from compress.stats import Gram
from compress.weights import Weight
from compress.weights.bits import packed_size

WIDTHS = (2, 3, 4)  # bits of a code
PLAIN = 16  # bits of an unquantized number
TRIES = 3  # attempts with a codec that takes more bits than asked for, because its positions do
MARGIN = 0.97  # safety factor on the bits asked for in the next attempt
SCALE = 2  # bytes of a stored scale


@dataclass(frozen=True, kw_only=True)
class Auto(Codec, name="auto"):
    """Try every codec that fits the bits, and keep the one with the least output error.

    The codecs are signs in up to four levels (bitdelta), bands of singular vectors (delta-come), few weights of few
    bits at any place or two of four (sparsegpt with bits), and all weights rounded with error feedback (gptq). Which is
    best depends on the spectrum of the matrix: signs for a flat one, bands for a steep one, single weights where they
    stand out. All codecs that fit are run and measured by tr(D G Dᵀ), because an estimate would need the decomposition
    that is most of the cost. With `sensitivity` before it, matrices that matter more get more bits. At a whole number
    of `bits` codes of that many bits do not fit, because their scales count too: 1.05 admits signs where 1 does not.
    Source: lowrank_quant_delta.md section 3.2, on choosing by the spectrum; the portfolio is ours.
    """

    unbiased: Annotated[
        bool,
        Field(
            description="rescale what is stored so that its error is orthogonal to the weight (no shrinkage towards 0)"
        ),
    ] = True

    requires = (Gram,)
    unfed = "signs with one scale per row, or the largest weights in four bits, chosen by the weights alone"

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if no codec fits."""
        codecs, budget = self.codecs(shape, self.bits), self.budget(shape)
        if not any(least_bytes(step, shape) <= budget and fits(step, site, shape) for step in codecs):
            raise RecipeError(
                f"{self.name}: {site}: no codec stores {shape[0]}x{shape[1]} in {self.bits:g} bits per weight"
            )

    def codecs(self, shape: tuple[int, int], bits: float) -> Iterator[WeightPass]:
        """The codecs that may fit in `bits` a weight, in an order that does not depend on `bits`."""
        yield DeltaCoMe(bits=bits)
        for scale in ("row", "matrix"):
            yield BitDelta(levels=min(4, max(1, floor(bits))), scale=scale)
        for width in WIDTHS:
            yield GPTQ(bits=width, group=0, search=True)
            yield SparseGPT(sparsity="2:4", bits=width, group=0)
            row = (PLAIN + width) / shape[1]  # bits a weight for the scale and the zero of each row
            yield SparseGPT(sparsity=1 - kept_within(max(0.0, bits - row), width), bits=width, group=0)

    def rewrite(self, site: Site) -> Weight:
        """The best of all results within the budget."""
        made = [self.within(site, i) for i in range(len(list(self.codecs(site.shape, self.bits))))]
        found = [(output_cost(trial), str(step), trial) for step, trial in filter(None, made)]
        if not found:
            raise RecipeError(f"{self.name}: {site.name}: no codec stored it in {self.bits:g} bits per weight")
        best = min(found, key=lambda row: row[0])[2]
        site.fallbacks += best.fallbacks
        site.ledger |= best.ledger | {"codecs": {name: cost for cost, name, _ in found}}
        if not self.unbiased:
            return best.weight
        return unbiased(best.weight, site.target.data, site.stats[Gram])

    def within(self, site: Site, index: int) -> tuple[WeightPass, Site] | None:
        """The result of a codec for a site, with fewer bits asked for if it took too many; None if it does not fit."""
        asked, aim, budget = None, self.bits, self.budget(site.shape)
        for _ in range(TRIES):
            step = list(self.codecs(site.shape, aim))[index]
            if step == asked or least_bytes(step, site.shape) > budget or not fits(step, site.name, site.shape):
                return None
            trial = site.apart(site.weight)
            trial = trial.apart(step.rewrite(trial), keep=True)
            if trial.weight.nbytes() <= budget:
                return step, trial
            asked, aim = step, aim * MARGIN * budget / trial.weight.nbytes()
        return None

    def rewrite_unfed(self, site: Site) -> Weight:
        """A result without statistics: signs in as many levels as fit, or as many of the largest weights as fit."""
        budget, levels = self.budget(site.shape), min(4, floor(self.bits))
        for fewer in range(levels, 0, -1):
            sign = BitDelta(levels=fewer).rewrite_unfed(site)
            if sign.nbytes() <= budget:
                return sign
        aim, width = self.bits, 4
        while True:
            largest = Magnitude(sparsity=1 - kept_within(aim, width), scope="matrix")
            coded = RTN(bits=width, group=-1).rewrite_unfed(site.apart(largest.rewrite_unfed(site)))
            if coded.nbytes() <= budget or aim < self.bits / 100:
                return coded
            aim *= MARGIN * budget / coded.nbytes()


def least_bytes(step: WeightPass, shape: tuple[int, int]) -> int:
    """The least bytes that a codec takes, by its codes or its scales alone: if that is too much, it need not be run."""
    entries = shape[0] * shape[1]
    match step:
        case BitDelta(levels=bits) | GPTQ(bits=bits):
            return packed_size(entries, bits)
        case SparseGPT(sparsity=str(), bits=int(bits)):
            return packed_size(entries // 2, bits) + packed_size(entries, 1)
        case SparseGPT():
            return SCALE * shape[0]
        case _:
            return 0


def fits(step: WeightPass, site: str, shape: tuple[int, int]) -> bool:
    """Whether a codec can handle a matrix of this shape."""
    try:
        step.check(site, shape)
    except RecipeError:
        return False
    return True
