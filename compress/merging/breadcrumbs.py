"""Breadcrumbs: drops both the smallest and the very largest entries of a change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.merging.method import Change, Density, Method, Scale, Sieve, magnitude, total
from compress.merging.threshold import level, share
from compress.weights.pattern import drop_count


@dataclass(frozen=True, kw_only=True)
class Breadcrumbs(Method):
    """Drop, per tensor, the share `gamma` of largest entries, keep the next `density`, drop the rest; sum the changes.

    Source: Davari and Belilovsky, "Model Breadcrumbs", ECCV 2024, section 3; shares as in mergekit. Entries equal in
    magnitude to the largest or the smallest one kept are kept too.
    """

    name = "breadcrumbs"
    signed = True
    density: Density = 0.9
    gamma: Annotated[
        float, Field(ge=0, lt=1, allow_inf_nan=False, description="share of the largest entries that is dropped")
    ] = 0.01
    scale: Scale = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density + self.gamma > 1:
            raise RecipeError(f"merge.breadcrumbs.density: {self.density} + gamma {self.gamma} must be at most 1")

    def sieve(self, change: Change, known: float | None) -> Sieve:
        """Drop entries that are too small or too large."""
        del known
        size = change.base_RN.numel()
        outliers = min(drop_count(size, self.gamma), size - 1)  # 0 for a small tensor, which then has no outliers
        most = level(change.magnitudes, outliers + 1)
        least = level(change.magnitudes, min(size, outliers + share(size, self.density)))

        def sieve(part_RN: Tensor) -> Tensor:
            size_RN = magnitude(part_RN)
            return torch.where((size_RN >= least) & (size_RN <= most), part_RN, 0)

        return sieve

    def fuse(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted sum."""
        return total(changes, weights).mul_(self.scale)
