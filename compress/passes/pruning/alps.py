"""ALPS: mask and values together, by the alternating direction method of multipliers (ADMM).

Shape suffixes: O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.base import masked_outline
from compress.passes.factor_pruner import FactorPruner
from compress.passes.hessian import damp, shared_factor
from compress.passes.pruning.reconstruct import least_squares
from compress.stats import Gram
from compress.weights import Dense, Masked, Pattern, Weight

UPDATE_EVERY = 3  # iterations between two updates of the penalty; all numbers here are those of the released code
FAST, SLOW = 0.1, 0.005  # shares of the support that changed
GROWTH = (1.3, 1.2, 1.1)  # factor of the penalty if more than FAST changed, more than SLOW, or less
SHRINK = 5.0  # divisor of the penalty, instead of the last factor or of stopping, while it was never raised
SETTLED = 3e-4  # changed share of the support below which it ends, from iteration EARLIEST on
EARLIEST = 30
POLISH = 10  # conjugate-gradient steps on the final support


@dataclass(frozen=True, kw_only=True)
class ALPS(FactorPruner, name="alps"):
    """Minimise the squared output error over all weights that follow the pattern: ADMM, then least squares on its mask.

    The objective is that of SparseGPT. The eigenvectors of the Gram, computed once for each input, reduce every
    iteration to two matrix products.
    Source: Meng et al., "ALPS: Improved Optimization for Highly Sparse One-Shot Pruning for LLMs", NeurIPS 2024,
    algorithm 1 and section 3.3, with the schedule of the released code.
    """

    requires = (Gram,)

    scope: Annotated[
        str, Field(description="the weights compared with each other: row, matrix, or whole blocks such as 16x16")
    ] = "matrix"
    damping: Annotated[float, Field(gt=0, le=1, description="share of mean(diag G) added to the diagonal")] = 0.01
    iterations: Annotated[int, Field(ge=1, le=10000, description="ADMM iterations, at most")] = 300
    penalty: Annotated[
        float, Field(gt=0, le=1e6, description="rho in the first iteration, for a Gram with unit diagonal")
    ] = 0.1

    def prune(self, site: Site) -> Weight:
        """The best values found under the best mask found."""
        dense, chosen = site.expect(Dense, by=self.name), self.pattern()
        if shared_factor(site, self.damping, self.name, "pruned by magnitude, uncompensated") is None:
            return self.prune_unfed(site)
        damped_II = damp(site.stats[Gram], float(site.ledger["damping"]))
        scale_I = damped_II.diagonal().sqrt()
        unit_II = damped_II / scale_I / scale_I[:, None]
        values_I, vectors_II = site.stats.derived(("eigen", self.damping), lambda: eigen(unit_II))
        scaled_OI = dense.data.float() * scale_I
        mask_OI, taken = admm(scaled_OI, unit_II, values_I, vectors_II, chosen, self.iterations, self.penalty)
        solved_OI, _ = least_squares(scaled_OI, mask_OI, unit_II, scaled_OI * mask_OI, POLISH, 1e-4)
        site.ledger["iterations"] = taken
        return Masked(Dense((solved_OI / scale_I).to(dense.data.dtype)), mask_OI, chosen.name)

    def outlined(self, site: Site) -> Weight:
        """Other values under a mask."""
        dense = site.expect(Dense, by=self.name)
        return masked_outline(Dense(torch.empty_like(dense.data)), self.pattern())


def eigen(gram_II: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues and eigenvectors, computed in float64, returned in float32."""
    values_I, vectors_II = torch.linalg.eigh(gram_II.double())
    return values_I.float(), vectors_II.float()


def admm(
    w_OI: Tensor, gram_II: Tensor, values_I: Tensor, vectors_II: Tensor, pattern: Pattern, iterations: int, rho: float
) -> tuple[Tensor, int]:
    """(the mask, iterations taken) for a Gram of unit diagonal with these eigenvalues and eigenvectors."""
    target_OI = w_OI @ gram_II
    mask_OI = pattern.keep(w_OI.abs())
    kept = max(1, int(mask_OI.sum()))
    start_OI = w_OI * mask_OI
    sparse_OI, dual_OI = start_OI, torch.zeros_like(w_OI)
    free_OI, raised, since_OI = w_OI, False, mask_OI
    for i in range(1, iterations + 1):
        free_OI = (target_OI - dual_OI + rho * sparse_OI) @ vectors_II
        free_OI = (free_OI / (values_I + rho)) @ vectors_II.T
        wanted_OI = free_OI + dual_OI / rho
        mask_OI = pattern.keep(wanted_OI.abs())
        sparse_OI = wanted_OI * mask_OI
        dual_OI = dual_OI + rho * (free_OI - sparse_OI)
        if i % UPDATE_EVERY:
            continue
        moved = int((mask_OI ^ since_OI).sum()) / kept
        since_OI = mask_OI
        if (moved == 0 and raised) or (i >= EARLIEST and moved < SETTLED):
            break
        if moved > SLOW or raised:
            rho *= GROWTH[0] if moved > FAST else GROWTH[1] if moved > SLOW else GROWTH[2]
            raised = True
        else:
            rho /= SHRINK
            if moved > 0:
                sparse_OI, dual_OI = start_OI, torch.zeros_like(w_OI)
    return pattern.keep(free_OI.abs()), i
