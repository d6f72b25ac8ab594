"""Low rank: a matrix as the product of two thin ones, which keep the output directions that a metric ranks highest.

Low rank is metric x rank budget. A subclass defines the metric. The budget is one share for all matrices (`removed`),
or a share for each, set by a budget that stands before it in the recipe (`ranks`, `welore`, `sensitivity`).
Shape suffixes: O out, I in, R rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import floor, log2
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.base import WeightPass
from compress.passes.whitened import principal, rank_within, weighed
from compress.weights import Dense, Product, Weight


@dataclass(frozen=True, kw_only=True)
class Factorizer(WeightPass):
    """W = A B with A = U, the first r principal directions of the output, and B = Uᵀ W, in the dtype of the model.

    Of all matrices of that rank, U Uᵀ W loses least in the metric of the subclass. The columns of A are orthonormal, so
    one scale serves all of A if it is quantized later.
    """

    unfed = "factored by its weights alone"
    takes = ("dense",)
    gives = "factored"
    shared_out = "removed"

    removed: Annotated[
        float, Field(ge=0, lt=1, description="share of a matrix's parameters removed; 0 leaves it as it is")
    ] = 0.2
    shared: Annotated[bool, Field(description="one B for all matrices that read the same input, such as q, k, v")] = (
        False
    )

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError if not even a rank of one is left; of a shared factor the ranks count together."""
        if not self.shared:
            self.room(site, shape)

    def room(self, site: str, shape: tuple[int, int]) -> int:
        """The rank of a matrix, or of several in one; raises RecipeError if not even a rank of one is left."""
        rank = rank_within(1 - self.removed, shape)
        if rank < 1:
            raise RecipeError(
                f"{self.name}: {site}: {1 - self.removed:g} of {shape[0]}x{shape[1]} leaves no room for rank 1; lower "
                "removed"
            )
        return rank

    @property
    def joint(self) -> bool:
        """True if the matrices that read one input share a factor."""
        return self.shared

    def metric(self, site: Site) -> Tensor | None:
        """The weight of each input [in] or of each pair of inputs [in, in], or None if all count equally."""
        raise NotImplementedError

    def rewrite(self, site: Site) -> Weight:
        """Two factors of its own."""
        return self.factored([site], self.metric(site))[site.name]

    def rewrite_peers(self, sites: Sequence[Site]) -> Mapping[str, Weight]:
        """Two factors for each site, or with `shared` one B for all of them, stored once."""
        if not self.shared:
            return super().rewrite_peers(sites)
        return self.factored(sites, self.metric(sites[0]))

    def outline_peers(self, sites: Sequence[Site]) -> Mapping[str, Weight | None]:
        """The outlines of two factors for each site, or of one B for all."""
        together = [list(sites)] if self.shared else [[site] for site in sites]
        return {name: weight for group in together for name, weight in self.outlined(group).items()}

    def outlined(self, sites: Sequence[Site]) -> dict[str, Weight]:
        """The outlines of matrices that become one product."""
        whole = {site.name: site.expect(Dense, by=self.name) for site in sites}
        if not self.removed:
            return {name: replace(dense) for name, dense in whole.items()}
        shape = sum(site.shape[0] for site in sites), sites[0].shape[1]
        return factors_outline(list(whole), list(whole.values()), self.room(sites[0].name, shape))

    def rewrite_unfed(self, site: Site) -> Weight:
        """Factors without a metric, because nothing is known of the input."""
        return self.factored([site], None)[site.name]

    def factored(self, sites: Sequence[Site], metric: Tensor | None) -> dict[str, Weight]:
        """The matrices, stacked by rows, as one product; unchanged if `removed` is 0."""
        whole = {site.name: site.expect(Dense, by=self.name) for site in sites}
        if not self.removed:
            for site in sites:
                site.ledger["rank"] = "dense"
            return {name: replace(dense) for name, dense in whole.items()}  # a new object: the site counts as rewritten
        shape = sum(site.shape[0] for site in sites), sites[0].shape[1]
        return joined(sites, list(whole.values()), metric, self.room(sites[0].name, shape))

    def spectrum(self, sites: Sequence[Site]) -> Tensor:
        """The falling energies of these matrices taken together; `factored` cuts the last of them."""
        metric = None if sites[0].starved and self.requires else self.metric(sites[0])
        matrices = [site.weight.dense().float() for site in sites]
        units = [unit(w_OI, metric) if len(sites) > 1 else 1.0 for w_OI in matrices]
        return principal(torch.cat([w_OI / u for w_OI, u in zip(matrices, units, strict=True)]), metric)[0]


def joined(sites: Sequence[Site], whole: Sequence[Dense], metric: Tensor | None, rank: int) -> dict[str, Weight]:
    """Matrices that read one input, each as a left factor of its own and one right factor of this rank for all."""
    units = [unit(dense.data.float(), metric) if len(sites) > 1 else 1.0 for dense in whole]
    power = 2.0 ** floor(log2(max(units)))  # only the ratios matter; values near 1 lose nothing in a float16 factor
    units = [u / power for u in units]
    w_OI = torch.cat([dense.data.float() / u for dense, u in zip(whole, units, strict=True)])
    energy_R, basis_OO = principal(w_OI, metric)
    left_OR = basis_OO[:, :rank]
    right = Dense((left_OR.T @ w_OI).to(sites[0].original.data.dtype))
    parts = left_OR.split([site.shape[0] for site in sites])
    lost = float(energy_R[rank:].sum() / energy_R.sum().clamp(min=1e-30))
    for site in sites:
        site.ledger |= {"rank": rank, "energy_lost": lost}
    return {
        site.name: Product(Dense((part * u).to(right.data.dtype)), right)
        for site, part, u in zip(sites, parts, units, strict=True)
    }


def factors_outline(names: Sequence[str], whole: Sequence[Dense], rank: int) -> dict[str, Weight]:
    """The outlines of what `joined` returns for these matrices, by name."""
    right = Dense(whole[0].data.new_empty(rank, whole[0].shape[1]))
    lefts = [Dense(right.data.new_empty(dense.shape[0], rank)) for dense in whole]
    return {name: Product(left, right) for name, left in zip(names, lefts, strict=True)}


def unit(w_OI: Tensor, metric: Tensor | None) -> float:
    """The norm of its output, tr(W G Wᵀ) ** 0.5.

    Matrices that share a factor are divided by it, so that all count equally whatever their size.
    """
    return float((weighed(w_OI, metric) * w_OI).sum().clamp(min=1e-30).sqrt())
