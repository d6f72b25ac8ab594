"""The arithmetic of allocating ranks: parts of the model with falling energies share one budget of parameters.

A part is a matrix, or several stacked by rows that share a right factor. Of a part either the first r directions are
kept, at out + in parameters each, or all of it, at out x in: a part whose factors would hold no fewer parameters stays
whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.model.block import Block
from compress.model.globs import matches
from compress.model.site import Site
from compress.passes.factorizer import Factorizer
from compress.passes.whitened import most_rank, rank_within


@dataclass(frozen=True, kw_only=True)
class Part:
    """Sites that are factored together, the shape of them stacked, and a falling number for each direction, float64."""

    sites: tuple[str, ...]
    shape: tuple[int, int]
    falling: Tensor

    @property
    def size(self) -> int:
        """Its parameters if it stays whole."""
        return self.shape[0] * self.shape[1]

    @property
    def step(self) -> int:
        """The parameters of one more rank."""
        return sum(self.shape)

    @property
    def most(self) -> int:
        """The largest rank whose factors hold fewer parameters than the whole."""
        return most_rank(self.shape)

    def removed(self, rank: int | None) -> float:
        """The share of its parameters that this rank removes; None stands for the whole part."""
        return 0.0 if rank is None else 1 - rank * self.step / self.size


def factored_together(block: Block, step: Factorizer) -> Iterator[list[Site]]:
    """The sites of a block that `step` selects, one by one, or with `shared` grouped by the input they read."""
    for group in block.groups:
        chosen = [site for site in group if matches(site.name, step.sites)]
        yield from ([chosen] if chosen else []) if step.shared else ([site] for site in chosen)


def part_of(sites: Sequence[Site], falling: Tensor) -> Part:
    """A part of these sites, with its falling numbers moved to the CPU."""
    shape = sum(site.shape[0] for site in sites), sites[0].shape[1]
    return Part(sites=tuple(site.name for site in sites), shape=shape, falling=falling.double().cpu())


def cheapest(parts: Sequence[Part], budget: int) -> list[int | None]:
    """The rank of each part, None for whole, that keeps most of the sum of `falling` within `budget` parameters.

    The best ratio of energy to parameters is taken first, over all directions of all parts. This is exact for the parts
    that are factored, because energies fall. A part whose factors would need no fewer parameters than the whole stays
    whole, and the budget that is left is allocated again among the others. At least one direction of each part is kept.
    """
    whole: set[int] = set()
    while True:
        left = budget - sum(parts[i].size for i in whole)
        ranks = shared_out([part for i, part in enumerate(parts) if i not in whole], left)
        given = iter(ranks)
        found = [None if i in whole else next(given) for i in range(len(parts))]
        full = {i for i, rank in enumerate(found) if rank is not None and rank > parts[i].most}
        if not full:
            return found
        whole.add(max(full, key=lambda i: (found[i] or 0) / parts[i].most))


def shared_out(parts: Sequence[Part], budget: int) -> list[int]:
    """Ranks in the order of falling ratio of energy to parameters, while they fit; at least one for each part."""
    if not parts:
        return []
    gains = torch.cat([part.falling / part.step for part in parts])
    owner = torch.cat([torch.full((len(part.falling),), i) for i, part in enumerate(parts)])
    first = torch.cat([torch.arange(len(part.falling)) == 0 for part in parts])
    order = torch.argsort(torch.where(first, torch.inf, gains), descending=True, stable=True)
    steps = torch.tensor([part.step for part in parts])[owner[order]]
    fits = steps.cumsum(0) <= budget
    taken = torch.bincount(owner[order][fits], minlength=len(parts)).clamp(min=1)
    return [int(n) for n in taken]


def above(parts: Sequence[Part], level: float) -> list[int | None]:
    """The rank of each part that keeps what lies at or above `level`; None where its factors would be no smaller."""
    counts = [max(1, int((part.falling >= level).sum())) for part in parts]
    return [None if count > part.most else count for count, part in zip(counts, parts, strict=True)]


def parameters(parts: Sequence[Part], ranks: Sequence[int | None]) -> int:
    """Parameters of all parts at these ranks."""
    return sum(p.size if rank is None else rank * p.step for p, rank in zip(parts, ranks, strict=True))


def given(parts: Sequence[Part], ranks: Sequence[int | None]) -> dict[str, float]:
    """The share removed from each site."""
    return {site: p.removed(rank) for p, rank in zip(parts, ranks, strict=True) for site in p.sites}


def budget_of(parts: Sequence[Part], removed: float) -> int:
    """The parameters left of all parts if each loses this share, rounded down to whole ranks."""
    return sum(p.size if not removed else rank_within(1 - removed, p.shape) * p.step for p in parts)
