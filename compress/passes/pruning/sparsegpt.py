"""SparseGPT: prune column by column, and compensate each cut in the columns not yet reached."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.base import masked_outline
from compress.passes.factor_pruner import FactorPruner
from compress.passes.feedback import Chosen, Rounding, Unrounded, feed_back
from compress.passes.hessian import shared_factor
from compress.passes.quantization.gptq import PLAIN, grids_of
from compress.stats import Gram
from compress.weights import NM, Dense, Grid, Masked, Quantized, Weight


@dataclass(frozen=True, kw_only=True)
class SparseGPT(FactorPruner, name="sparsegpt"):
    """Score w² / U_jj² in blocks of columns; the kept weights to the right compensate each cut.

    With `bits`, kept weights are rounded in the same sweep, and the rounding errors are compensated too. If no damping
    makes the Gram positive definite, the mask is by magnitude without compensation, and a fallback is recorded; an
    expert that too few tokens reach gets the same.
    Source: Frantar and Alistarh, "SparseGPT", ICML 2023, algorithm 1. Deviations: inputs that never fire are cut first
    but not all of them, where the released code zeroes them; a width that m does not divide is refused.
    """

    requires = (Gram,)
    unfed = "pruned by magnitude and, with bits, rounded to nearest"

    scope: Annotated[
        str,
        Field(
            description="the weights compared within a block of columns: all rows (matrix), each row, or tiles such as "
            "16x16"
        ),
    ] = "matrix"
    damping: Annotated[float, Field(gt=0, le=1, description="share of mean(diag G) added to the diagonal")] = 0.01
    block: Annotated[
        int,
        Field(
            ge=1,
            le=65536,
            description="columns whose mask is chosen at once, with bits at least a group; n:m chooses by group",
        ),
    ] = 128
    update: Annotated[
        bool, Field(description="compensate for each cut weight in later columns; false: only choose the mask")
    ] = True
    bits: Annotated[
        int | None, Field(ge=2, le=8, description="also round the kept weights to integers of this many bits")
    ] = None
    group: Annotated[int, Field(ge=0, description="with bits: inputs that share a scale; 0: a whole row")] = 64
    symmetric: Annotated[bool, Field(description="with bits: no stored zero point")] = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bits is not None and not self.update:
            raise RecipeError(f"{self.name}.bits: rounding is part of the update; it needs update: true")

    @property
    def gives(self) -> str:  # type: ignore[override]
        """Pruned, or with `bits` quantized."""
        return "pruned" if self.bits is None else "quantized"

    def check(self, site: str, shape: tuple[int, int]) -> None:
        """Raise RecipeError unless the pattern and the group fit the matrix, and a block holds whole tiles."""
        super().check(site, shape)
        if self.bits and self.group and shape[1] % self.group:
            raise RecipeError(f"{self.name}: {site}: group {self.group} does not divide its width of {shape[1]}")
        width = getattr(self.pattern(), "columns", 1)
        if self.block % width:
            raise RecipeError(f"{self.name}: {site}: blocks of {self.block} columns do not hold whole tiles of {width}")

    def prune(self, site: Site) -> Weight:
        """The values, compensated unless `update` is off, under the mask chosen along the way."""
        dense, chosen = site.expect(Dense, by=self.name), self.pattern()
        instead = f"pruned by magnitude{'' if self.bits is None else ' and rounded to nearest'}, uncompensated"
        upper_II = shared_factor(site, self.damping, self.name, instead)
        if upper_II is None:
            return self.prune_unfed(site)
        w_OI, dead_I = dense.data.float(), site.stats[Gram].diagonal() == 0
        if not self.update:
            return Masked(dense, mask_only(w_OI, upper_II, Chosen(chosen, dead_I), self.block), chosen.name)
        grids = None if self.bits is None else grids_of(self.grid(w_OI.shape[1], self.bits), w_OI, PLAIN)
        rounding: Rounding = Unrounded() if grids is None else grids
        after_OI, keep_OI, site.ledger["loss"] = feed_back(w_OI, upper_II, rounding, Chosen(chosen, dead_I), self.block)
        if keep_OI is None:
            raise RecipeError(f"{self.name}: no mask was chosen")
        if grids is not None:
            scale, zero = grids.result()
            return Masked(Quantized(grids.codes_OI, scale, zero, grids.grid.bits), keep_OI, chosen.name)
        return Masked(Dense(after_OI.to(dense.data.dtype)), keep_OI, chosen.name)

    def prune_unfed(self, site: Site) -> Weight:
        """The same pattern by magnitude; with `bits` rounded to nearest."""
        weight = super().prune_unfed(site)
        if self.bits is None or not isinstance(weight, Masked):
            return weight
        w_OI = weight.dense().float()
        return Masked(self.grid(w_OI.shape[1], self.bits).quantize(w_OI), weight.mask_OI, weight.pattern)

    def outlined(self, site: Site) -> Weight:
        """Other values under a mask; with `bits` their codes."""
        dense = site.expect(Dense, by=self.name)
        values: Weight = Dense(torch.empty_like(dense.data)) if self.update else dense
        if self.bits is not None:
            values = self.grid(dense.shape[1], self.bits).quantize(dense.data.float())
        return masked_outline(values, self.pattern())

    def grid(self, width: int, bits: int) -> Grid:
        """The grid of kept weights; one grid per row for a factor whose width the group does not divide."""
        fits = self.group > 0 and width % self.group == 0
        return Grid(bits=bits, group=self.group if fits else 0, symmetric=self.symmetric)


def mask_only(w_OI: Tensor, upper_II: Tensor, mask: Chosen, block: int) -> Tensor:
    """The mask by the scores of the uncompensated weights, block by block."""
    if isinstance(mask.pattern, NM):
        return mask.pattern.keep(mask.score(0, w_OI.T, upper_II.diagonal()).T.contiguous())
    parts = range(0, w_OI.shape[1], block)
    diagonal = upper_II.diagonal()
    return torch.cat([mask.enter(at, w_OI[:, at : at + block].T, diagonal[at : at + block]).T for at in parts], 1)
