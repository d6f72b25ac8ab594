"""Auto: for each matrix the codec whose output errs least within the bits."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import floor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.base import WeightPass
from compress.passes.delta.bitdelta import BitDelta
from compress.passes.delta.codec import Codec, kept_within
from compress.passes.delta.delta_come import DeltaCoMe
from compress.passes.probes import output_cost
from compress.passes.pruning.magnitude import Magnitude
from compress.passes.pruning.sparsegpt import SparseGPT
from compress.passes.quantization.gptq import GPTQ
from compress.passes.quantization.rtn import RTN
from compress.stats import Gram
from compress.weights import Weight

WIDTHS = (2, 3, 4)  # bits of a code
PLAIN = 16  # of a stored number
Pipeline = tuple[WeightPass, ...]


@dataclass(frozen=True, kw_only=True)
class Auto(Codec, name="auto"):
    """Try every codec that fits the bits, keep that of the least output error.

    They are signs in up to four levels (bitdelta), bands of singular vectors (delta-come), few weights of few bits at
    any place or two of four (sparsegpt with bits), and all of them rounded with error feedback (gptq). Which is best
    depends on the spectrum of what is stored: signs for a flat one, bands for a steep one, single weights where they
    stand out. All that fit are made and measured, tr(D G Dᵀ): an estimate would need the decomposition that is most of
    the cost. Preceded by `sensitivity`, matrices that matter more get more bits.
    Source: lowrank_quant_delta.md section 3.2, on choosing by the spectrum; the portfolio is ours.
    """

    requires = (Gram,)
    unfed = "signs with a scale a row, or the largest weights in four bits, by weights alone"

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Some codec must fit."""
        if not any(fits(pipeline, site, shape) for pipeline in self.pipelines(shape)):
            raise RecipeError(
                f"{self.name}: {site}: no codec stores {shape[0]}x{shape[1]} in {self.bits:g} bits a weight"
            )

    def pipelines(self, shape: tuple[int, int]) -> Iterator[Pipeline]:
        """What may fit."""
        yield (DeltaCoMe(bits=self.bits),)
        if self.bits >= 1:
            for scale in ("row", "matrix"):
                yield (BitDelta(levels=min(4, floor(self.bits)), scale=scale),)
        for width in WIDTHS:
            row = (PLAIN + width) / shape[1]  # bits a weight of a scale and a zero for each row
            if self.bits > row:
                yield (SparseGPT(sparsity=1 - kept_within(self.bits - row, width), bits=width, group=0),)
            if self.bits > width + row:
                yield (GPTQ(bits=width, group=0, search=True),)
            if self.bits > 1 + width / 2 + row:
                yield (SparseGPT(sparsity="2:4", bits=width, group=0),)

    def rewrite(self, site: Site) -> Weight:
        """The best of all within the budget."""
        tried: dict[str, float] = {}
        best: Site | None = None
        for pipeline in self.pipelines(site.shape):
            if not fits(pipeline, site.name, site.shape):
                continue
            trial = attempt(site, pipeline)
            if trial.weight.nbytes() > self.budget(site.shape):
                continue
            tried[named(pipeline)] = error = output_cost(trial)
            if best is None or error < output_cost(best):
                best = trial
        if best is None:
            raise RecipeError(f"{self.name}: {site.name}: no codec stored it in {self.bits:g} bits a weight")
        site.fallbacks += best.fallbacks
        site.ledger |= best.ledger | {"codecs": tried}
        return best.weight

    def rewrite_unfed(self, site: Site) -> Weight:
        """What needs no statistics."""
        sign = BitDelta(levels=1).rewrite_unfed(site)
        if sign.nbytes() <= self.budget(site.shape):
            return sign
        width = 4
        largest = Magnitude(sparsity=1 - kept_within(self.bits, width), scope="matrix")
        return attempt(site, (largest, RTN(bits=width, group=-1))).weight


def attempt(site: Site, pipeline: Pipeline) -> Site:
    """What passes in a row make of a site, beside it; the module and what the site records stay as they are."""
    trial = site.apart(site.weight)
    for step in pipeline:
        weight = step.rewrite(trial)
        trial = trial.apart(weight, keep=True)
    return trial


def fits(pipeline: Pipeline, site: str, shape: tuple[int, int]) -> bool:
    """Whether every pass can handle a matrix of this shape."""
    try:
        for step in pipeline:
            step.check(site, shape)
    except RecipeError:
        return False
    return True


def named(pipeline: Pipeline) -> str:
    """What a pipeline is called in records."""
    return " + ".join(str(step) for step in pipeline)
