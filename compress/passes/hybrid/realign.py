"""Realign: aim at the output of the dense model, not at what the dense matrix would give for the drifted input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from compress.model.site import Site
from compress.passes.base import WeightPass
from compress.passes.hessian import damp
from compress.stats import Cross, Gram
from compress.weights import Dense, Weight


@dataclass(frozen=True, kw_only=True)
class Realign(WeightPass, name="realign"):
    """Set the target of all later passes to the matrix whose output on the drifted input is nearest to the dense one.

    Everything before a site has been compressed, so its input x' differs from the dense model's x. Pruning and rounding
    usually approximate W x'. The least-squares matrix W* = W (x x'ᵀ) (x' x'ᵀ)^-1, damped towards W, approximates
    W x instead, so later matrices compensate for earlier ones. Costs a second copy of the calibration activations and
    of each forward. An expert is left as it is, because other tokens reach it than in the dense model.
    Source: the asymmetric objective of Li et al., "GPTAQ", 2025, section 3, solved in closed form before any other pass
    instead of inside one: followed by `gptq` it comes nearer to the dense output than GPTAQ's own update at 2, 3 and 4
    bits (tests/passes/test_realign.py), so `gptq` has no option for that.
    """

    requires = (Gram, Cross)
    unfed = "left as it was"
    takes = ("dense",)
    gives = "dense"
    on_differences = False  # the output of the dense model does not depend on the difference alone

    damping: Annotated[
        float,
        Field(
            gt=0,
            le=1,
            description="share of mean(diag G) added to the diagonal; more of it stays closer to the original",
        ),
    ] = 0.01

    def rewrite(self, site: Site) -> Weight:
        """The realigned matrix."""
        dense = site.expect(Dense, by=self.name)
        if Cross not in site.stats:
            return dense
        gram_II, w_OI = site.stats[Gram], site.original.data.float()
        shift_II = site.stats[Cross] - gram_II
        factor_II, failed = torch.linalg.cholesky_ex(damp(gram_II, self.damping))
        if failed.item():
            site.fall_back(self.name, "the damped Gram is not positive definite; left as it was")
            return dense
        moved_OI = w_OI + torch.cholesky_solve((w_OI @ shift_II).T, factor_II).T
        site.ledger["realigned"] = float((moved_OI - w_OI).norm() / w_OI.norm().clamp(min=1e-30))
        site.target = Dense(moved_OI)
        return site.target

    def outline(self, site: Site) -> Weight | None:
        """Another plain matrix."""
        return Dense(torch.empty_like(site.expect(Dense, by=self.name).data))

    def rewrite_unfed(self, site: Site) -> Weight:
        """The weight as it is."""
        return site.weight
