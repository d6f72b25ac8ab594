"""AWQ: input channels of large magnitude get finer quantization steps.

Shape suffixes: O out, I in, C channels of a writer, B batch, T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor

from compress.model.block import Block
from compress.model.scaling import Pair, applied
from compress.model.site import energy
from compress.passes.base import Quantizer
from compress.passes.equalizer import Equalizer, rounded
from compress.stats import AbsMean, Gram

SMALLEST = 1e-4  # lower bound of a mean |x|; the released code bounds its power instead


@dataclass(frozen=True, kw_only=True)
class AWQ(Equalizer, name="awq"):
    """Before a quantizer: scale each channel by a power of its mean |x|; the power is searched for each input.

    The search rounds to nearest on the grid of the next quantizer of the recipe (give that `search: output` for AWQ's
    clipping). It measures tr(D G Dᵀ) over the matrices that read the input, or with `exact` the squared error of the
    block's output on all calibration tokens. Power 0 is among the candidates, so by that measure the result is never
    worse than no scaling.
    Source: Lin et al., "AWQ", MLSys 2024, section 3.2. Deviations: the Gram instead of a forward for each candidate;
    `exact` compares the output of the block, not of attention or MLP alone; values are scaled also where several
    queries share them, by the mean over these; a mean |x| below 1e-4 counts as that, where the released code bounds its
    power.
    """

    requires = (AbsMean, Gram)

    steps: Annotated[
        int, Field(ge=2, le=100, description="number of powers tried, evenly spaced from 0 to below 1")
    ] = 20
    exact: Annotated[
        bool, Field(description="measure the error of the block's output instead of that of each matrix")
    ] = False

    def best(self, block: Block, pair: Pair, steps: Sequence[Quantizer]) -> tuple[Tensor | None, float]:
        """The scales with the least error, and their power."""
        loud_C = pair.pooled(pair.readers[0].stats[AbsMean]).clamp(min=SMALLEST)
        measure = BlockError(block, pair) if self.exact else OutputError(pair)
        tried: list[tuple[float, float]] = []
        for power in (i / self.steps for i in range(self.steps)):
            tried.append((measure(normalised(loud_C**power), steps), power))
        power = min(tried)[1]
        return (normalised(loud_C**power) if power else None), power


def normalised(scale_C: Tensor) -> Tensor:
    """Scales divided by one number so that the largest and the smallest are each other's inverse."""
    return scale_C / (scale_C.max() * scale_C.min()).sqrt()


@dataclass(frozen=True)
class OutputError:
    """Sum over the readers of a pair of tr(D G Dᵀ)."""

    pair: Pair

    def __call__(self, scale_C: Tensor, steps: Sequence[Quantizer]) -> float:
        """The error with these scales."""
        scale_I, total = scale_C[self.pair.channel_I], 0.0
        for site in self.pair.readers:
            w_OI = site.original.data.float()
            change_OI = rounded(w_OI * scale_I, site, steps) / scale_I - w_OI
            total += float(energy(change_OI, site.stats[Gram]))
        return total


class BlockError:
    """Squared error of the block's output on all calibration tokens, when only the readers of a pair are rounded.

    It is a sum of the batches' means, each weighted by its number of tokens relative to the largest batch.
    """

    def __init__(self, block: Block, pair: Pair) -> None:
        self.block, self.pair = block, pair
        self.dense = [batch.through(block.module, block.index) for batch in block.batches]
        largest = max((want_BTD.numel() for want_BTD in self.dense), default=1)
        self.shares = [want_BTD.numel() / largest for want_BTD in self.dense]

    def __call__(self, scale_C: Tensor, steps: Sequence[Quantizer]) -> float:
        """The error with these scales."""
        scale_I = scale_C[self.pair.channel_I]
        with ExitStack() as stack:
            stack.enter_context(applied(self.block, self.pair.scales(scale_C)))
            for site in self.pair.readers:
                w_OI = rounded(site.original.data.float() * scale_I, site, steps).to(site.original.data.dtype)
                site.module.weight.data = w_OI.T.contiguous() if site.transposed else w_OI
            return sum(
                share * float((batch.through(self.block.module, self.block.index) - want_BTD).float().square().mean())
                for batch, want_BTD, share in zip(self.block.batches, self.dense, self.shares, strict=True)
            )
