"""Chooses the next token of a sequence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are sampled.

    Temperature 0 takes the likeliest token. `top_p` keeps only the likeliest tokens that together reach this
    probability.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def generator(self) -> torch.Generator:
        """The random generator of one request; without a seed it differs each time."""
        generator = torch.Generator()
        if self.seed is None:
            generator.seed()
        else:
            generator.manual_seed(self.seed)
        return generator


def choose(logits_V: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    """The next token, given its logits."""
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    below_V = logits_V.double().cpu() - float(logits_V.max())  # at most 0, so that no temperature overflows softmax
    p_V = (below_V / sampling.temperature).softmax(-1)
    if sampling.top_p < 1:
        falling, order = p_V.sort(descending=True)
        beyond = falling.cumsum(-1) - falling >= sampling.top_p  # never the likeliest token
        p_V = p_V.index_fill(0, order[beyond], 0.0)
    return int(torch.multinomial(p_V, 1, generator=generator))
