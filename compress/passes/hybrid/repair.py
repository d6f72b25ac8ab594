"""Repair: two thin matrices that make up for whatever was done to a weight before.

What a reader would question: there is no root of the Gram and no pseudo-inverse. EoRA's A = U sqrt(S) and
B = sqrt(S) Vᵀ root^+ multiply to U Uᵀ E, which needs only U, and an input that never fires changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.passes.corrector import Corrector, stored_outline, worth
from compress.weights import Sum, Weight


@dataclass(frozen=True, kw_only=True)
class Repair(Corrector, name="repair"):
    """W' + A B, with A B the best correction of its rank of W - W', whatever W' is: pruned, quantized, factored.

    The weight before it stays bit for bit, as one term of the sum; where a mask cut, the sum is no longer 0. Factors
    that are there already stay too, and those of the correction come beside them. A weight without error is left as it
    is. The ledger says what the correction saves and costs; `slim` is better where what is corrected can be made anew.
    Source: Liu et al., "EoRA", 2024, arXiv 2410.21271 (metric `gram`); Zhang et al., "LQER", ICML 2024, L2QER
    (`diagonal`, there by mean |x|, here by the root mean square); the singular value decomposition (`plain`).
    """

    unfed = "corrected by its weights alone"
    takes = ("pruned", "permuted", "quantized", "signed", "factored")

    def rewrite(self, site: Site) -> Weight:
        """The weight and its correction."""
        return self.corrected(site, self.weighing(site))

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same in no metric: nothing is known of its input."""
        return self.corrected(site, None)

    def outline(self, site: Site) -> Weight | None:
        """The weight beside two factors."""
        terms = site.weight.terms if isinstance(site.weight, Sum) else (site.weight,)
        return Sum((*terms, stored_outline(site.shape, self.rank_of(site.shape), self.precision)))

    def corrected(self, site: Site, metric: Tensor | None) -> Weight:
        """The weight and its correction, in one sum with what was a sum already."""
        error_OI = site.target.data.float() - site.weight.dense().float()
        if not error_OI.count_nonzero():
            site.ledger["repair"] = "nothing to correct"
            return site.weight
        factors, left_over = self.correction(error_OI, metric)
        site.ledger["repair"] = worth(factors, left_over)
        terms = site.weight.terms if isinstance(site.weight, Sum) else (site.weight,)
        return Sum((*terms, factors))
