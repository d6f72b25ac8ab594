"""OWL: blocks with many outliers keep more weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import Field

from compress.model.globs import matches
from compress.model.site import Site
from compress.model.whole import Whole
from compress.passes.base import Budget, Pruner, Sparsity
from compress.passes.budget import as_asked, centred, density
from compress.stats import ColumnNorm


@dataclass(frozen=True, kw_only=True)
class OWL(Budget, name="owl"):
    """Give each block a sparsity by its share of outliers: scores |w| * ||x|| far above the mean of the block.

    Shares are stretched to a range of 2 x `spread` and shifted so that the mean sparsity is what the next pruner asks
    for; every site of a block gets the same. For n:m the range is that of n / m, and n is rounded.
    Source: Yin et al., "Outlier Weighed Layerwise Sparsity (OWL)", ICML 2024, equations 1-2 and section 3. Deviations:
    the mean is weighted by parameters, and kept by shifting again where a block would leave [1 %, 100 %].
    """

    requires = (ColumnNorm,)

    spread: Annotated[
        float, Field(ge=0, le=0.5, description="largest deviation of a block from the mean sparsity, before centring")
    ] = 0.08
    multiple: Annotated[
        float, Field(gt=0, le=1e6, description="a score this many times the mean counts as an outlier")
    ] = 5.0

    def allocate(self, model: Whole, step: Pruner) -> dict[str, Sparsity]:
        """One sparsity per block, for the sites that `step` selects."""
        shares: dict[str, float] = {}
        members: dict[str, list[str]] = {}
        sizes: dict[str, int] = {}
        for block in model.blocks(self.requires, step.sites):
            sites = [s for s in block.sites.values() if not s.idle and matches(s.name, step.sites)]
            if sites:
                members[block.name] = [site.name for site in sites]
                sizes[block.name] = sum(site.shape[0] * site.shape[1] for site in sites)
                shares[block.name] = outlier_share(sites, self.multiple)
        keep = keep_by_outliers(shares, sizes, density(step.sparsity), self.spread)
        given = as_asked(step.sparsity, keep, sizes)
        return {site: given[name] for name, sites in members.items() for site in sites}


def outlier_share(sites: list[Site], multiple: float) -> float:
    """The share of all scores of these sites that lie above `multiple` times their mean."""
    fed = [site for site in sites if ColumnNorm in site.stats]
    total = sum(float((site.weight.dense().float().abs() * site.stats[ColumnNorm]).sum()) for site in fed)
    size = sum(site.shape[0] * site.shape[1] for site in fed)
    if not size:
        return 0.0
    level = multiple * total / size
    above = sum(int((site.weight.dense().float().abs() * site.stats[ColumnNorm] > level).sum()) for site in fed)
    return above / size


def keep_by_outliers(shares: dict[str, float], sizes: dict[str, int], mean: float, spread: float) -> dict[str, float]:
    """The share kept of each block: outlier shares stretched to [0, 2 x spread], with `mean` as their weighted mean."""
    lowest, highest = min(shares.values(), default=0.0), max(shares.values(), default=0.0)
    if highest == lowest:
        return dict.fromkeys(shares, mean)
    stretched = [2 * spread * (share - lowest) / (highest - lowest) for share in shares.values()]
    weights = [sizes[name] for name in shares]
    middle = sum(s * w for s, w in zip(stretched, weights, strict=True)) / sum(weights)
    return dict(zip(shares, centred([mean + s - middle for s in stretched], weights, mean), strict=True))
