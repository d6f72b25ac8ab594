"""DARE: drops entries of a change at random and rescales the others, so that the expected change stays the same."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.merging.method import Change, Density, Method, Scale, Seed, Sieve, elected, total


def thinned(change: Change, density: float, seed: int) -> Sieve:
    """Keep each entry with probability `density`, and divide it by `density`."""
    generator = change.generator(seed)

    def sieve(part_RN: Tensor) -> Tensor:
        return torch.where(torch.rand(part_RN.shape, generator=generator) < density, part_RN / density, 0)

    return sieve


@dataclass(frozen=True, kw_only=True)
class Dare(Method):
    """Drops entries at random; a subclass says how the remaining ones are combined."""

    density: Density = 0.8
    seed: Seed = 0
    scale: Scale = 1.0

    def sieve(self, change: Change, known: float | None) -> Sieve:
        """Drop entries at random and rescale the others."""
        del known
        return thinned(change, self.density, self.seed)


@dataclass(frozen=True, kw_only=True)
class DareLinear(Dare):
    """W0 + scale * sum_k w_k DARE(D_k).

    Source: Yu et al., "Language Models are Super Mario", ICML 2024, section 3.2; by default with the drop rate of 0.2
    at which the authors merge large models. mergekit rescales by the ratio of L1 norms instead.
    """

    name = "dare-linear"
    signed = True

    def fuse(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The weighted sum."""
        return total(changes, weights).mul_(self.scale)


@dataclass(frozen=True, kw_only=True)
class DareTies(Dare):
    """TIES with DARE in place of trimming: drop at random, elect signs, average.

    Source: Yu et al., "Language Models are Super Mario", ICML 2024, section 3.3, with TIES-Merging's steps 2 and 3.
    The mean is over the changes that have the elected sign, as in TIES; mergekit sums by default.
    """

    name = "dare-ties"

    def fuse(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """The mean of the changes that have the elected sign."""
        return elected(changes, weights).mul_(self.scale)
