"""Repair: a low-rank correction of the error that earlier passes left in a weight.

What a reader would question: there is no root of the Gram and no pseudo-inverse. EoRA's A = U sqrt(S) and B = sqrt(S)
Vᵀ root^+ multiply to U Uᵀ E, which needs only U, and an input that never fires changes nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from compress.model.site import Site
from compress.passes.corrector import Corrector, stored_outline, worth
from compress.weights import Sum, Weight


@dataclass(frozen=True, kw_only=True)
class Repair(Corrector, name="repair"):
    """W' + A B, where A B is the best correction of its rank for W - W', whatever W' is: pruned, quantized or factored.

    The weight before it stays bit for bit, as one term of the sum; where a mask cuts, the sum is no longer 0. Low-rank
    factors that are already there stay too, and those of the correction are added beside them. A weight without error
    is left as it is. The ledger records what the correction saves and costs. `slim` is better where the weight to
    correct can be compressed anew.
    Source: Liu et al., "EoRA", 2024, arXiv 2410.21271 (metric `gram`); Zhang et al., "LQER", ICML 2024, L2QER
    (`diagonal`, there by mean |x|, here by the root mean square); the singular value decomposition (`plain`).
    """

    unfed = "corrected by its weights alone"
    takes = ("pruned", "permuted", "quantized", "signed", "factored")

    def rewrite(self, site: Site) -> Weight:
        """The weight and its correction."""
        return self.corrected(site, self.weighing(site))

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same without a metric, because nothing is known of the input."""
        return self.corrected(site, None)

    def outline(self, site: Site) -> Weight | None:
        """The weight and two factors."""
        terms = site.weight.terms if isinstance(site.weight, Sum) else (site.weight,)
        return Sum((*terms, stored_outline(site.shape, self.rank_of(site.shape), self.precision)))

    def corrected(self, site: Site, metric: Tensor | None) -> Weight:
        """The weight and its correction in one sum; if the weight is a sum already, the correction is one more term."""
        error_OI = site.target.data.float() - site.weight.dense().float()
        if not error_OI.count_nonzero():
            site.ledger["repair"] = "nothing to correct"
            return site.weight
        factors, left_over = self.correction(error_OI, metric)
        site.ledger["repair"] = worth(factors, left_over)
        terms = site.weight.terms if isinstance(site.weight, Sum) else (site.weight,)
        return Sum((*terms, factors))
