"""SmoothQuant: outliers that make inputs hard to round are moved into the weights.

Shape suffixes: O out, I in, C channels of a writer, T tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.model.block import Block
from compress.model.scaling import Pair
from compress.passes.base import Quantizer
from compress.passes.equalizer import Equalizer, quantizer_of, rounded
from compress.stats import AbsMax, Sample
from compress.weights import rounded_inputs

SMALLEST = 1e-5  # lower bound of either maximum; the released code bounds max|w| and the scale itself
STRENGTHS = tuple(i / 20 for i in range(6, 20))  # .30 to .95


@dataclass(frozen=True, kw_only=True)
class SmoothQuant(Equalizer, name="smoothquant"):
    """Before a quantizer with rounded `inputs`: divide each channel by max|x|^alpha / max|w|^(1 - alpha).

    Without `alpha` it is searched for each input, on up to 1,024 calibration tokens, with weights and inputs rounded as
    the next quantizer will round them; no scaling is among the candidates.
    Source: Xiao et al., "SmoothQuant", ICML 2023, eq. 4. Deviations: alpha by search, not by model; the inputs of the
    last matrices of attention and MLP are scaled too where the matrix before can take the scale.
    """

    requires = (AbsMax, Sample)

    alpha: Annotated[
        Annotated[float, Field(ge=0, le=1)] | None,
        Field(description="strength of the scaling; null: searched for each input"),
    ] = None

    def best(self, block: Block, pair: Pair, steps: Sequence[Quantizer]) -> tuple[Tensor | None, float]:
        """The scales, or None if the search leaves the pair alone, and their strength, which is then 0."""
        loud_C = pair.largest(pair.readers[0].stats[AbsMax]).clamp(min=SMALLEST)
        heavy_I = torch.stack([site.original.data.float().abs().amax(0) for site in pair.readers]).amax(0)
        heavy_C = pair.largest(heavy_I).clamp(min=SMALLEST)
        if self.alpha is not None:
            return loud_C**self.alpha / heavy_C ** (1 - self.alpha), self.alpha
        tried = [(error(pair, torch.ones_like(loud_C), steps), 0.0)]
        tried += [(error(pair, loud_C**a / heavy_C ** (1 - a), steps), a) for a in STRENGTHS]
        alpha = min(tried)[1]
        return (loud_C**alpha / heavy_C ** (1 - alpha) if alpha else None), alpha


def error(pair: Pair, scale_C: Tensor, steps: Sequence[Quantizer]) -> float:
    """Squared error of the readers' outputs on the sample, with weights and inputs rounded."""
    scale_I, x_TI, total = scale_C[pair.channel_I], pair.readers[0].stats[Sample], 0.0
    for site in pair.readers:
        step, w_OI = quantizer_of(site, steps), site.original.data.float()
        if step is None:
            continue
        given_TI = x_TI / scale_I
        given_TI = given_TI if step.inputs == "full" else rounded_inputs(given_TI, step.inputs)
        total += float((given_TI @ rounded(w_OI * scale_I, site, steps).T - x_TI @ w_OI.T).square().sum())
    return total
