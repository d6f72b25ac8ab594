"""LRQ: learned rounding with low-rank divisors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.passes.learned import Learned


class LowRank(nn.Module):
    """D = L U + r + c; L, r and c are 0 at first, U is uniform within 1 / sqrt(columns)."""

    def __init__(self, rows: int, columns: int, rank: int, generator: torch.Generator) -> None:
        super().__init__()
        uniform = 2 * torch.rand(rank, columns, generator=generator) - 1
        self.left = nn.Parameter(torch.zeros(rows, rank))
        self.right = nn.Parameter(uniform / columns**0.5)
        self.row = nn.Parameter(torch.zeros(rows, 1))
        self.column = nn.Parameter(torch.zeros(1, columns))

    def forward(self) -> Tensor:
        """D [out, in]."""
        return torch.addmm(self.row + self.column, self.left, self.right)


@dataclass(frozen=True, kw_only=True)
class LRQ(Learned, name="lrq"):
    """Divide each weight by exp(D) before it is rounded, D of low rank, so that fewer numbers are learned than weights.

    Source: Lee et al., "LRQ", 2024 (arXiv 2407.11534), section 2. The paper learns for 5000 steps at 4e-4 to 9e-4, 2
    windows a step of 512, of rank 1024 in models of 4096 inputs. D has low rank for every matrix, as in the paper; the
    released code leaves some full. Deviation: it starts from the result of any quantizer.
    """

    lr: Annotated[
        float, Field(gt=0, le=1, description="initial learning rate, of D and of the logarithms of the steps")
    ] = 1e-2
    rank: Annotated[int, Field(ge=1, description="rank of the product L U in D")] = 64

    def divisor(self, shape: tuple[int, int], generator: torch.Generator) -> nn.Module:
        """Two factors, a row and a column."""
        return LowRank(*shape, self.rank, generator)
