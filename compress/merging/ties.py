"""TIES: keeps only large changes, and merges only those whose sign agrees with the weighted majority."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.merging.method import Change, Density, Method, Scale, Sieve, elected, magnitude
from compress.merging.threshold import level, share


@dataclass(frozen=True, kw_only=True)
class Ties(Method):
    """Trim each change to its largest entries, elect a sign for every entry, and average the changes that have it.

    Source: Yadav et al., "TIES-Merging", NeurIPS 2023, algorithm 1. Deviations: entries equal in magnitude to the
    smallest one kept are kept too, so that no position is preferred; models may have weights, as in mergekit.
    """

    name = "ties"
    density: Density = 0.2
    scope: Annotated[
        Literal["model", "tensor"],
        Field(
            description="compare entries within the whole model, as in the paper, or within each tensor, as in mergekit"
        ),
    ] = "model"
    scale: Scale = 1.0

    def survey(self, models: Mapping[str, Callable[[], Iterator[Tensor]]], size: int) -> dict[str, float]:
        """The smallest magnitude kept of each model, if entries compete across the whole model; otherwise empty."""
        if self.scope == "tensor" or self.density == 1:
            return {}
        return {model: level(magnitudes, share(size, self.density)) for model, magnitudes in models.items()}

    def sieve(self, change: Change, known: float | None) -> Sieve:
        """Drop entries below the smallest magnitude kept."""
        if self.density == 1:
            return lambda part_RN: part_RN
        least = level(change.magnitudes, share(change.base_RN.numel(), self.density)) if known is None else known
        return lambda part_RN: torch.where(magnitude(part_RN) >= least, part_RN, 0)

    def fuse(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The mean of the changes that have the elected sign."""
        return elected(changes, weights).mul_(self.scale)
