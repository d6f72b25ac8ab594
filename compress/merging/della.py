"""DELLA: drops entries of a change at random, small ones more often than large ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.merging.method import Change, Density, Method, Scale, Seed, Sieve, elected, magnitude


@dataclass(frozen=True, kw_only=True)
class Della(Method):
    """Keep an entry with a probability that grows with its magnitude's rank in its row, and divide it by that.

    The probabilities grow linearly from density - epsilon for the smallest to density + epsilon for the largest entry.
    Signs are then elected and entries averaged as in TIES.

    Source: Deep et al., "DELLA-Merging", 2024, section 3; equal magnitudes rank in order of position.
    """

    name = "della"
    density: Density = 0.5
    epsilon: Annotated[
        float, Field(ge=0, lt=0.5, allow_inf_nan=False, description="half the width of the range of keep probabilities")
    ] = 0.15
    seed: Seed = 0
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density - self.epsilon <= 0 or self.density + self.epsilon > 1:
            raise RecipeError(
                f"merge.della.density: {self.density} - epsilon {self.epsilon} must be above 0 and their sum at most 1"
            )

    def sieve(self, change: Change, known: float | None) -> Sieve:
        """Drop entries at random, by their rank within a row."""
        del known
        generator = change.generator(self.seed)

        def sieve(part_RN: Tensor) -> Tensor:
            keep_RN = self.probabilities(part_RN)
            return torch.where(torch.rand(part_RN.shape, generator=generator) < keep_RN, part_RN / keep_RN, 0)

        return sieve

    def probabilities(self, part_RN: Tensor) -> Tensor:
        """The probability with which each entry is kept, float64."""
        width = part_RN.shape[1]
        if width == 1:
            return torch.full_like(part_RN, self.density)
        order_RN = magnitude(part_RN).argsort(dim=1, stable=True)
        steps_N = torch.linspace(-self.epsilon, self.epsilon, width, dtype=torch.float64) + self.density
        return torch.empty_like(part_RN).scatter_(1, order_RN, steps_N.expand_as(part_RN))

    def fuse(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The mean of the changes that have the elected sign."""
        return elected(changes, weights).mul_(self.scale)
