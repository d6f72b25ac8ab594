"""Better values under a fixed mask: the kept weights compensate the cut ones.

Shape suffixes: O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.base import Refiner
from compress.passes.feedback import Given, Unrounded, feed_back
from compress.passes.hessian import damp, shared_factor
from compress.stats import Gram
from compress.weights import Weight

LEFT = 0.05  # share of the loss that a solution may be assumed to leave, where damping hides how much it does


@dataclass(frozen=True, kw_only=True)
class Reconstruct(Refiner, name="reconstruct"):
    """Give the kept weights the values whose output is nearest to that of the original weight.

    `obs` sweeps once from left to right, as SparseGPT does with a given mask; `exact` continues from there to the least
    squares solution of each row, by conjugate gradients on all rows at once. A row whose result, in the dtype it is
    stored in, is no better than before keeps its previous values.
    Source: `obs`: Frantar and Alistarh, SparseGPT, ICML 2023, section 3.1; `exact`: its equation 2, damped, solved by
    preconditioned conjugate gradients (Hestenes and Stiefel, 1952).
    """

    requires = (Gram,)
    moves = False

    method: Annotated[
        Literal["exact", "obs"], Field(description="exact: least squares of each row; obs: one sweep over the columns")
    ] = "exact"
    damping: Annotated[float, Field(gt=0, le=1, description="share of mean(diag G) added to the diagonal")] = 0.01
    steps: Annotated[int, Field(ge=1, le=10000, description="steps of conjugate gradients, at most")] = 50
    tolerance: Annotated[
        float, Field(gt=0, lt=1, description="relative residual at which conjugate gradients stop")
    ] = 1e-3

    def rewrite(self, site: Site) -> Weight:
        """The same mask over better values."""
        before_OI, weight = self.masked(site)
        w_OI, gram_II = site.target.data.float(), site.stats[Gram]
        upper_II = shared_factor(site, self.damping, self.name, "left as it was")
        if upper_II is None:
            return weight
        after_OI, _, _ = feed_back(w_OI, upper_II, Unrounded(), Given(weight.mask_OI))
        after_OI = better(w_OI, before_OI, after_OI, gram_II)
        if self.method == "exact":
            damped_II = damp(gram_II, float(site.ledger["damping"]))
            loss = float(row_loss(w_OI, after_OI, gram_II).sum())
            solved_OI, used = least_squares(w_OI, weight.mask_OI, damped_II, after_OI, self.steps, self.tolerance, loss)
            after_OI = better(w_OI, after_OI, solved_OI, gram_II)
            site.ledger["steps"] = used
        stored_OI = after_OI.to(site.original.data.dtype).float()
        kept_OI = better(w_OI, before_OI, stored_OI, gram_II)
        site.ledger["row_errors"] = [float(row_loss(w_OI, x_OI, gram_II).sum()) for x_OI in (before_OI, kept_OI)]
        return self.remasked(site, kept_OI, weight.mask_OI, weight.pattern)


def row_loss(w_OI: Tensor, now_OI: Tensor, gram_II: Tensor) -> Tensor:
    """(w - w') G (w - w')ᵀ of each row, never below 0."""
    missing_OI = w_OI - now_OI
    return (missing_OI @ gram_II).mul_(missing_OI).sum(1).clamp_(min=0)


def better(w_OI: Tensor, one_OI: Tensor, other_OI: Tensor, gram_II: Tensor) -> Tensor:
    """For each row, the one of two candidates with the smaller loss; the first if they are equal."""
    won_O = row_loss(w_OI, other_OI, gram_II) < row_loss(w_OI, one_OI, gram_II)
    return torch.where(won_O[:, None], other_OI, one_OI)


def least_squares(
    w_OI: Tensor,
    keep_OI: Tensor,
    gram_II: Tensor,
    start_OI: Tensor,
    steps: int = 50,
    tolerance: float = 1e-3,
    loss: float = inf,
) -> tuple[Tensor, int]:
    """(values 0 where `keep_OI` is False that minimise the loss of each row, steps taken), float32.

    Solves G_KK w'_K = (G w)_K for all rows at once by conjugate gradients with the diagonal as preconditioner. Ends
    when both of two criteria are met: the residual of all rows together has fallen to `tolerance` of the residual of a
    start from 0, which one loud input may dominate, and its worth in terms of the loss, r r / diag G, has fallen to
    `tolerance` of the loss. That is at most `loss`, for a damped G the loss of the start without damping: behind tokens
    of huge activations most of the damped loss is damping. Each step costs one product [out, in] @ [in, in]; G must be
    positive definite.
    """
    inverse_I = 1 / gram_II.diagonal()
    now_OI = start_OI * keep_OI
    residual_OI = (w_OI - now_OI) @ gram_II
    loss = min(loss, float((residual_OI * (w_OI - now_OI)).sum()))
    least = LEFT * loss
    residual_OI *= keep_OI
    enough = tolerance * float(((w_OI @ gram_II) * keep_OI).norm())
    scaled_OI = residual_OI * inverse_I
    direction_OI = scaled_OI.clone()
    rho_O = (residual_OI * scaled_OI).sum(1)
    taken = 0
    while taken < steps and (float(residual_OI.norm()) > enough or float(rho_O.sum()) > tolerance * loss):
        image_OI = (direction_OI @ gram_II).mul_(keep_OI)
        step_O = rho_O / (direction_OI * image_OI).sum(1).clamp(min=1e-30)
        loss = max(loss - float((step_O * rho_O).sum()), least)
        now_OI.addcmul_(step_O[:, None], direction_OI)
        residual_OI.addcmul_(step_O[:, None], image_OI, value=-1)
        scaled_OI = residual_OI * inverse_I
        rho_O, before_O = (residual_OI * scaled_OI).sum(1), rho_O
        direction_OI.mul_((rho_O / before_O.clamp(min=1e-30))[:, None]).add_(scaled_OI)
        taken += 1
    return now_OI, taken
