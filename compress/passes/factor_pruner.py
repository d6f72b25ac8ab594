"""The base class of pruners that can also prune low-rank factors: `magnitude`, `wanda`, `sparsegpt` and `alps`.

Not here: the scores. One decision a reader would question: the right factor is pruned first, and the left factor then
reads the output of the pruned right one, as any second layer of a model would.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

from pydantic import Field
from torch import Tensor
from torch.nn.functional import pad

from compress.errors import UnsupportedWeight
from compress.model.site import Site
from compress.passes.base import Pruner, masked_outline
from compress.weights import NM, Dense, Product, Sum, Weight

FACTORED = ("factored", "split", "quantized")  # forms that may contain low-rank factors


@dataclass(frozen=True, kw_only=True)
class FactorPruner(Pruner):
    """A pruner that, with `factors`, also prunes low-rank factors, each as a matrix with an input of its own.

    The right factor reads the site's input; the left factor reads the output of the pruned right factor. If the m of
    n:m does not divide the rank, the factors are padded with zeros. Of a sum only the factors are pruned, because
    earlier passes have decided on its other terms.
    """

    factors: Annotated[bool, Field(description="prune low-rank factors too, each scored with its own input")] = False

    @property
    def takes(self) -> tuple[str, ...]:  # type: ignore[override]
        """A dense weight; with `factors` also the forms that may contain low-rank factors."""
        return "dense", *(FACTORED if self.factors else ())

    def leaves(self, form: str) -> str:
        """A pruned weight; a form that contains factors stays what it is."""
        return form if form in FACTORED else self.gives

    def rewrite(self, site: Site) -> Weight:
        """The weight, or its factors, under masks that keep the highest scores."""
        return self.visit(site.weight, site, self.prune)

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same patterns by magnitude."""
        return self.visit(site.weight, site, self.prune_unfed)

    def outline(self, site: Site) -> Weight | None:
        """The weight, or its factors, under masks on the meta device that keep as many entries."""
        return self.visit(site.weight, site, self.outlined)

    def prune(self, site: Site) -> Weight:
        """The pruned dense weight of a site, or a factor given as a site; a subclass may also change the values."""
        return self.cut(site, self.score)

    def prune_unfed(self, site: Site) -> Weight:
        """The same without statistics."""
        return super().rewrite_unfed(site)

    def outlined(self, site: Site) -> Weight:
        """The outline of what `prune` returns."""
        return masked_outline(site.expect(Dense, by=self.name), self.pattern())

    def visit(self, weight: Weight, site: Site, prune: Callable[[Site], Weight]) -> Weight:
        """Prune a dense weight, or with `factors` its factors.

        Raises UnsupportedWeight if the pattern does not fit a factor.
        """
        match weight:
            case Product(Dense(left_OR), Dense(right_RI)) if self.factors:
                left_OR, right_RI = self.filled(left_OR, right_RI)
                right = prune(self.fitting(site.factors(left_OR, right_RI)[1]))
                left = prune(self.fitting(site.factors(left_OR, right.dense())[0]))
                return Product(left, right)
            case Sum(terms) if self.factors and any(map(low_rank, terms)):
                return Sum(tuple(self.visit(t, site, prune) if low_rank(t) else t for t in terms))
            case _:
                return prune(site)

    def filled(self, left_OR: Tensor, right_RI: Tensor) -> tuple[Tensor, Tensor]:
        """Both factors, padded with zeros to the next rank that the m of the pattern divides."""
        chosen = self.pattern()
        more = -len(right_RI) % chosen.m if isinstance(chosen, NM) else 0
        return pad(left_OR, (0, more)), pad(right_RI, (0, 0, 0, more))

    def fitting(self, site: Site) -> Site:
        """A factor as a site; raises UnsupportedWeight if the pattern does not fit it."""
        reason = self.pattern().check(site.shape)
        if reason:
            shape = " x ".join(map(str, site.shape))
            raise UnsupportedWeight(f"{self.name}: {site.name}: a factor of {shape}: {reason}")
        return site


def low_rank(term: Weight) -> bool:
    """Whether a term is a product of two plain factors, neither pruned nor quantized."""
    match term:
        case Product(Dense(), Dense()):
            return True
        case _:
            return False
