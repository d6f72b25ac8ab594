"""DARE: drop entries at random and rescale the rest, so that the expected matrix is unchanged.

What a reader would question: it is far from the best way to store one matrix; keeping the largest entries (`magnitude`,
`wanda`) comes much nearer. It is for weights that must stay unbiased, and for a mask that takes no bytes.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, ClassVar, Literal
from zlib import crc32

import torch
from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.base import WeightPass
from compress.stats import ColumnNorm, Statistic
from compress.weights import Dense, Masked, Weight
from compress.weights.chance import drawn, rule_name


@dataclass(frozen=True, kw_only=True)
class DARE(WeightPass, name="dare"):
    """Keep each entry with a probability q and divide what is kept by q: the mean over masks is W.

    `random`: q is the density everywhere, and the mask is regenerated from the seed and the site's name, so it takes no
    bits. `importance`: q = min(1, c |w| rms(x)) with c such that the mean q is the density; this mask is stored. Among
    all q of equal mean, these give the least variance of the output for independent inputs.
    Source: Yu et al., "Language Models are Super Mario", ICML 2024, section 3.2; probabilities that follow importance
    are those of importance sampling (DELLA, 2024, has them linear in the rank of |w|).
    """

    unfed: ClassVar[str] = "sampled by its weights alone"
    takes: ClassVar[tuple[str, ...]] = ("dense",)
    gives: ClassVar[str] = "pruned"

    density: Annotated[float, Field(ge=1e-4, le=1, description="share of entries kept, on average")] = 0.1
    keep: Annotated[
        Literal["random", "importance"],
        Field(description="keep all entries with one probability, or each by |w| * rms(x)"),
    ] = "random"
    seed: Annotated[int, Field(ge=0, lt=1 << 32, description="seed of the random masks; each site draws its own")] = 0

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """Input norms with `importance`, else nothing."""
        return (ColumnNorm,) if self.keep == "importance" else ()

    def rewrite(self, site: Site) -> Weight:
        """The matrix under its mask, with kept entries divided by their probability."""
        return self.cut(site, site.stats[ColumnNorm] if self.keep == "importance" else None)

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same with equal norms for all inputs."""
        return self.cut(site, None)

    def cut(self, site: Site, norm_I: Tensor | None) -> Weight:
        """The dense weight under a mask drawn for this site."""
        w_OI = site.expect(Dense, by=self.name).data.float()
        seed = crc32(site.name.encode(), self.seed)
        share: Tensor | Decimal
        if self.keep == "random":
            share, name = Decimal(str(self.density)), rule_name(self.density, seed)
            kept_OI = w_OI / self.density
        else:
            score_OI = w_OI.abs() if norm_I is None else w_OI.abs() * norm_I
            share, name = probabilities(score_OI, self.density), "drawn"
            kept_OI = (w_OI / share).masked_fill(share == 0, 0)
        mask_OI = drawn(share, site.shape, seed, w_OI.device)
        return Masked(Dense(kept_OI.to(site.original.data.dtype)), mask_OI, name)


def probabilities(score_OI: Tensor, density: float) -> Tensor:
    """min(1, c * score) with the one c for which the mean is `density`; the mean is less only if too many scores are 0.

    Each round fixes the entries that reached 1 and shares the rest of the budget among the others; c only grows, so a
    few rounds suffice.
    """
    share_OI, sure = torch.zeros_like(score_OI), -1
    while True:
        over_OI = share_OI >= 1
        left = float(score_OI.masked_fill(over_OI, 0).sum(dtype=torch.float64))
        before, sure = sure, int(over_OI.sum())
        if sure == before or left == 0:
            return share_OI.clamp(max=1)
        share_OI = score_OI * ((density * score_OI.numel() - sure) / left)
