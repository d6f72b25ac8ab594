"""RIA: the size of a weight relative to its row and its column, times the norm of its input.

Shape suffixes: O out, I in.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.base import Pruner
from compress.stats import ColumnNorm, Statistic
from compress.weights import NM, Dense, Masked, Permutation, Product, Weight


@dataclass(frozen=True, kw_only=True)
class RIA(Pruner, name="ria"):
    """Score (|w| / sum of its column + |w| / sum of its row) * ||x||^power; no whole row or column is cut first.

    With `permute`, inputs are assigned to the groups of n:m so that important ones do not share a group. The weight is
    then a product with the permutation, which is a gather of the input at run time. If that order retains no more of
    the score than the original order, the inputs stay in the original order.
    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for LLMs", ICLR 2024, equations 1-2
    and section 4.2. Deviation: each stripe is assigned once, in one sweep.
    """

    scope: Annotated[
        str, Field(description="the weights compared with each other: row, matrix, or whole blocks such as 16x16")
    ] = "matrix"
    power: Annotated[float, Field(ge=0, le=4, description="exponent of the input norm; 0 needs no data")] = 0.5
    permute: Annotated[bool, Field(description="permute the inputs before forming the groups of n:m")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.permute and not isinstance(self.sparsity, str):
            raise RecipeError(f"{self.name}.permute: only with n:m are there groups that a permutation changes")

    @property
    def gives(self) -> str:  # type: ignore[override]
        """Pruned, or with `permute` permuted."""
        return "permuted" if self.permute else "pruned"

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """Norms of the input, unless their power is 0."""
        return (ColumnNorm,) if self.power else ()

    def score(self, site: Site) -> Tensor:
        """Relative importance times the powered input norm, float32."""
        size_OI = site.weight.dense().float().abs()
        relative_OI = size_OI / size_OI.sum(0).clamp(min=1e-30) + size_OI / size_OI.sum(1, keepdim=True).clamp(
            min=1e-30
        )
        return relative_OI * site.stats[ColumnNorm] ** self.power if self.power else relative_OI

    @property
    def foreseen(self) -> bool:
        """False with `permute`, because a permutation that retains no more of the score is left out."""
        return not self.permute

    def outline(self, site: Site) -> Weight | None:
        """The mask; with `permute` also an order of the inputs."""
        masked = super().outline(site)
        if not self.permute or masked is None:
            return masked
        return Product(masked, Permutation(torch.empty(site.shape[1], dtype=torch.int64, device="meta")))

    def rewrite(self, site: Site) -> Weight:
        """The same values under the mask; with `permute` in another order of inputs."""
        chosen = self.pattern()
        if not self.permute or not isinstance(chosen, NM):
            return super().rewrite(site)
        dense, score_OI = site.expect(Dense, by=self.name), self.score(site)
        order_I = deal(score_OI, chosen)
        plain, dealt = retained(score_OI, chosen), retained(score_OI[:, order_I], chosen)
        site.ledger["retained_score"] = [plain, max(plain, dealt)]
        if dealt <= plain:
            return super().rewrite(site)
        values = Dense(dense.data[:, order_I])
        return Product(Masked(values, chosen.keep(score_OI[:, order_I]), chosen.name), Permutation(order_I))


def retained(score_OI: Tensor, chosen: NM) -> float:
    """The share of all scores that the pattern keeps."""
    return float((score_OI * chosen.keep(score_OI)).sum() / score_OI.sum().clamp(min=1e-30))


def deal(score_OI: Tensor, chosen: NM) -> Tensor:
    """An order of the inputs in which the pattern keeps more of the score.

    Columns are ranked by their total score and dealt over the groups in snake order, so that each group gets one of
    every rank. Then, rank by rank, the columns of that rank are reassigned to the groups so that as much score as
    possible is retained.
    """
    from scipy.optimize import linear_sum_assignment  # takes half a second to import

    groups = score_OI.shape[1] // chosen.m
    ranked = score_OI.sum(0).argsort(descending=True, stable=True).view(chosen.m, groups)
    ranked[1::2] = ranked[1::2].flip(1)
    held_GM = ranked.T.contiguous()
    for rank in range(chosen.m):
        others_GM = torch.cat((held_GM[:, :rank], held_GM[:, rank + 1 :]), 1)
        columns_G = held_GM[:, rank]
        offered_GO = score_OI.T[columns_G]
        gain_GG = torch.stack([gains(offered_GO, score_OI.T[others_M], chosen.n) for others_M in others_GM])
        _, chosen_G = linear_sum_assignment(gain_GG.cpu().numpy(), maximize=True)
        held_GM[:, rank] = columns_G[torch.from_numpy(chosen_G).to(columns_G.device)]
    return held_GM.flatten()


def gains(offered_GO: Tensor, others_MO: Tensor, n: int) -> Tensor:
    """The score that a group gains with each column offered: what of it exceeds the group's n-th best, [groups]."""
    return (offered_GO - others_MO.topk(n, 0).values[-1]).clamp_(min=0).sum(1)
