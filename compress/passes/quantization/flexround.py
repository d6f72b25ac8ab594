"""FlexRound: learned rounding with a separate divisor for each weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from compress.passes.learned import Learned


class Full(nn.Module):
    """D = D2 + d3: one number for each weight, and one for each row."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.each = nn.Parameter(torch.zeros(rows, columns))
        self.row = nn.Parameter(torch.zeros(rows, 1))

    def forward(self) -> Tensor:
        """D [out, in]."""
        return self.each + self.row


@dataclass(frozen=True, kw_only=True)
class FlexRound(Learned, name="flexround"):
    """Divide each weight by exp(D) before it is rounded; D and the steps are learned to match the block's dense output.

    Source: Lee et al., "FlexRound", ICML 2023, equation 2; the objective of Lee et al., LRQ, 2024, section 2: the
    quantized block on its own inputs is to give the output of the dense block on dense hidden states. The paper learns
    for 5000 steps at 5e-4 to 3e-3, 2 windows a step of 512, and keeps the last state. Deviation: it starts from the
    result of any quantizer.
    """

    def divisor(self, shape: tuple[int, int], generator: torch.Generator) -> nn.Module:
        """A full matrix, 0 at first."""
        del generator
        return Full(*shape)
