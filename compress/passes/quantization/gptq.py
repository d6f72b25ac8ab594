"""GPTQ: rounding that compensates each error in the weights not yet rounded.

The loop itself is `feed_back`; the grids are defined here. Shape suffixes: O out, I in, B columns of a block.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from math import gcd
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from compress.model.site import Site
from compress.passes.base import GridQuantizer
from compress.passes.feedback import Given, feed_back
from compress.passes.hessian import shared_factor
from compress.stats import Gram, Statistic
from compress.weights import Grid, Masked, Quantized, Weight
from compress.weights.grid import narrowed
from compress_kernels.solver import Steps


class Grids:
    """A rounding to grids, which collects the codes of the columns rounded so far."""

    aligned = 1
    width = 1

    def __init__(self, grid: Grid, w_OI: Tensor) -> None:
        self.grid = grid
        self.codes_OI = torch.empty_like(w_OI, dtype=torch.uint8)

    def at(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero [out] of a column."""
        raise NotImplementedError

    def result(self) -> tuple[Tensor, Tensor | None]:
        """All scales and zeros."""
        raise NotImplementedError

    def round(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> Tensor:
        """The grid values of a column; the code of zero where the column is cut."""
        scale, zero = self.at(column, ahead_BO, keep_BO)
        bits = self.grid.bits
        middle = 2.0 ** (bits - 1) if zero is None else zero.float()
        code = ((ahead_BO[0] / scale.float()).round_() + middle).clamp_(0, 2**bits - 1)
        if keep_BO is not None:
            code = torch.where(keep_BO[0], code, middle)
        self.codes_OI[:, column] = code
        return (code - middle) * scale.float()

    def take(self, columns: slice, codes_BO: Tensor) -> None:
        """Store the codes of some columns."""
        self.codes_OI[:, columns] = codes_BO.T


@dataclass(frozen=True, kw_only=True)
class Ranges:
    """How the ranges of grids are found: whether searched, and with a Gram by output error instead of weight error."""

    search: bool = False
    gram_II: Tensor | None = None


PLAIN = Ranges()


class FixedGrids(Grids):
    """Grids fitted before the loop; `order_I` gives the original column at each position."""

    def __init__(self, grid: Grid, w_OI: Tensor, order_I: Tensor | None, ranges: Ranges) -> None:
        super().__init__(grid, w_OI)
        self.scale, self.zero = grid.fit(w_OI, search=ranges.search, gram_II=ranges.gram_II)
        inputs = w_OI.shape[1]
        columns = torch.arange(inputs, device=w_OI.device) if order_I is None else order_I
        self.group_I = columns // (inputs // self.scale.shape[1])
        self.group_of = self.group_I.tolist()

    def at(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero [out] of a column."""
        group = self.group_of[column]
        return self.scale[:, group], None if self.zero is None else self.zero[:, group]

    def strip(self, limit: int) -> int:
        """All columns, because every grid is known."""
        return limit

    @cached_property
    def all_steps(self) -> Steps:
        """The grids of all columns."""
        scale_GO, zero_GO = (
            None if each is None else each.T.float().expand(-1, len(self.codes_OI)).contiguous()
            for each in (self.scale, self.zero)
        )
        return Steps(
            bits=self.grid.bits, scale_GO=torch.as_tensor(scale_GO), zero_GO=zero_GO, group_B=self.group_I.int()
        )

    def steps(self, columns: slice, ahead_BO: Tensor, keep_BO: Tensor | None) -> Steps:
        """The grids of some columns."""
        return replace(self.all_steps, group_B=self.all_steps.group_B[columns])

    def result(self) -> tuple[Tensor, Tensor | None]:
        """All scales and zeros."""
        return self.scale, self.zero


class FittedGrids(Grids):
    """Grids fitted when the loop reaches their first column, to the error-corrected weights.

    `order_I` may reorder groups, and columns within a group, but not mix groups. Deviation from the released code of
    GPTQ: a grid is fitted after the updates from within its block, also if group < block.
    """

    def __init__(self, grid: Grid, w_OI: Tensor, ranges: Ranges, order_I: Tensor | None = None) -> None:
        super().__init__(grid, w_OI)
        self.aligned, self.ranges = grid.width(w_OI.shape[1]), ranges
        self.order_I = torch.arange(w_OI.shape[1], device=w_OI.device) if order_I is None else order_I
        self.row = replace(grid, group=0)
        self.scales: list[Tensor] = []
        self.zeros: list[Tensor] = []

    def at(self, column: int, ahead_BO: Tensor, keep_BO: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Scale and zero [out] of a column; `ahead_BO` holds it and the rest of its block, `keep_BO` their mask."""
        if column % self.aligned == 0:
            group_OB = (ahead_BO if keep_BO is None else ahead_BO * keep_BO)[: self.aligned].T
            scale, zero = self.row.fit(group_OB, search=self.ranges.search, gram_II=self.gram(column))
            self.scales.append(scale)
            if zero is not None:
                self.zeros.append(zero)
        return self.scales[-1][:, 0], self.zeros[-1][:, 0] if self.zeros else None

    def strip(self, limit: int) -> int:
        """The number of columns of a grid, or a divisor of it if it exceeds the limit."""
        return self.aligned if self.aligned <= limit else gcd(self.aligned, limit)

    def steps(self, columns: slice, ahead_BO: Tensor, keep_BO: Tensor | None) -> Steps:
        """The grid of some columns, fitted if they are the first of a group."""
        scale, zero = self.at(columns.start, ahead_BO, keep_BO)
        group_B = torch.zeros(columns.stop - columns.start, dtype=torch.int32, device=ahead_BO.device)
        zero_GO = None if zero is None else zero.float()[None]
        return Steps(bits=self.grid.bits, scale_GO=scale.float()[None], zero_GO=zero_GO, group_B=group_B)

    def gram(self, column: int) -> Tensor | None:
        """The part of the Gram for the group that begins at a column; None if ranges are not searched by a Gram."""
        own_B = self.order_I[column : column + self.aligned]
        return None if self.ranges.gram_II is None else self.ranges.gram_II[own_B][:, own_B]

    def result(self) -> tuple[Tensor, Tensor | None]:
        """All scales and zeros; float32 scales if any group needed them (float16 values stay exact)."""
        back_G = (self.order_I[:: self.aligned] // self.aligned).argsort()
        scale = narrowed(torch.cat([s.float() for s in self.scales], 1)[:, back_G])
        return scale, torch.cat(self.zeros, 1)[:, back_G] if self.zeros else None


def grids_of(
    grid: Grid, w_OI: Tensor, ranges: Ranges, order_I: Tensor | None = None, *, static: bool = False
) -> FixedGrids | FittedGrids:
    """Grids fitted along the way, or beforehand where a grid would have to wait for the whole row."""
    width = grid.width(w_OI.shape[1])
    fixed = static or width == w_OI.shape[1] or grid.group < 0 or not keeps_groups(order_I, width)
    return FixedGrids(grid, w_OI, order_I, ranges) if fixed else FittedGrids(grid, w_OI, ranges, order_I)


def gptq(
    w_OI: Tensor, upper_II: Tensor, grid: Grid, keep_OI: Tensor | None = None, order_I: Tensor | None = None, *,
    static: bool = False, ranges: Ranges = PLAIN, block: int = 128,
) -> tuple[Quantized, float]:  # fmt: skip
    """The weight quantized with error feedback in the order `order_I`, and the loss of `feed_back`.

    Where `keep_OI` is False the code is that of zero, and the resulting error is fed back too. Grids are fitted
    beforehand if `static` is set, if one grid serves a whole row or the matrix, or if the order mixes groups
    (`grids_of`).
    """
    kept_OI = w_OI if keep_OI is None else w_OI * keep_OI
    grids = grids_of(grid, kept_OI, ranges, order_I, static=static)
    if order_I is not None:
        w_OI, keep_OI = w_OI[:, order_I], None if keep_OI is None else keep_OI[:, order_I]
    _, _, loss = feed_back(w_OI, upper_II, grids, None if keep_OI is None else Given(keep_OI), block)
    codes_OI = grids.codes_OI if order_I is None else grids.codes_OI[:, order_I.argsort()]
    scale, zero = grids.result()
    return Quantized(codes_OI, scale, zero, grid.bits), loss


def keeps_groups(order_I: Tensor | None, width: int) -> bool:
    """Whether an order keeps the columns of each group of `width` adjacent."""
    if order_I is None:
        return True
    group_GS = (order_I // width).view(-1, width)
    return bool((group_GS == group_GS[:, :1]).all())


def falling(energy_I: Tensor, width: int | None = None) -> Tensor:
    """Columns in order of falling energy; with `width` only within their groups, and groups by their largest.

    Source of the second: group-aware reordering (GAR) of GPTQModel, 2025.
    """
    if width is None:
        return energy_I.argsort(descending=True, stable=True)
    energy_GS = energy_I.view(-1, width)
    within_GS = energy_GS.argsort(dim=1, descending=True, stable=True)
    groups_G = energy_GS.amax(1).argsort(descending=True, stable=True)
    first_G = width * torch.arange(len(energy_GS), device=energy_I.device)
    order_I: Tensor = (within_GS + first_G[:, None])[groups_G].flatten()
    return order_I


@dataclass(frozen=True, kw_only=True)
class GPTQ(GridQuantizer, name="gptq"):
    """Round columns in order and compensate each error in the columns that follow; masks are kept.

    If no damping makes the Gram positive definite, the site is rounded to nearest and a fallback is recorded.
    Source: Frantar et al., "GPTQ", ICLR 2023, algorithm 1. Order `activation` (falling diag G) uses static groups, so
    that the stored form needs no index per column; `groups` (GAR) needs neither. Deviation: inputs that never fire keep
    their rounded weight, where the released code zeroes it.
    """

    damping: Annotated[float, Field(gt=0, le=1, description="share of mean(diag G) added to the diagonal")] = 0.01
    order: Annotated[
        Literal["natural", "activation", "groups"],
        Field(
            description="natural: columns as they are; activation: by falling diag G; groups: the groups, and the "
            "columns of each, by it"
        ),
    ] = "natural"
    static: Annotated[bool, Field(description="fit all group grids before the first column")] = False
    target: Annotated[
        Literal["weight", "original"],
        Field(description="weight: approximate the weight as it is now; original: also compensate what a mask has cut"),
    ] = "weight"

    @property
    def requires(self) -> tuple[type[Statistic], ...]:  # type: ignore[override]
        """The Gram."""
        return (Gram,)

    def quantize(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """Codes with error feedback; to nearest, with a fallback recorded, if the Gram has no inverse factor."""
        if self.target == "original" and keep_OI is not None and isinstance(site.weight, Masked):
            w_OI = site.target.data  # column errors then include the cut weights, as in SparseGPT with a given mask
        order_I = self.column_order(site.stats[Gram].diagonal())
        upper_II = shared_factor(site, self.damping, self.name, "rounded to nearest", order_I)
        if upper_II is None:
            return self.round(w_OI if keep_OI is None else w_OI * keep_OI, keep_OI, site)
        ranges = Ranges(search=bool(self.search), gram_II=self.gram(site))
        quantized, loss = gptq(w_OI, upper_II, self.grid, keep_OI, order_I, static=self.static, ranges=ranges)
        site.ledger["loss"] = loss
        return quantized

    def round_factor(self, factor: Tensor, keep: Tensor | None, site: Site) -> Weight:
        """A factor with error feedback by the Gram of its own input; one grid per row where groups do not divide it."""
        if Gram not in site.stats or site.starved:
            return super().round_factor(factor, keep, site)
        fits = self.group > 0 and factor.shape[1] % self.group == 0
        return (self if fits else replace(self, group=0)).quantize(factor.float(), keep, site)

    def column_order(self, energy_I: Tensor) -> Tensor | None:
        """The order in which columns are rounded; None for their natural order."""
        if self.order == "natural":
            return None
        within = self.group if self.order == "groups" and 0 < self.group < len(energy_I) else None
        return falling(energy_I, within)
