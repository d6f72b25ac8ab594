"""Which weights may be kept together: the pattern half of `score x pattern x budget`.

A pattern turns a score [out, in] into a mask of the same shape, True = kept. Counts are exact: the number dropped from
a group of n at sparsity s is n * s rounded half to even on the decimal the user wrote. Ties are dropped by lower index
first, so masks nest as s grows and do not depend on the device's sort. In `n:m`, n is the number KEPT of every m
consecutive inputs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_HALF_EVEN, Decimal

import torch
from torch import Tensor

from compress.errors import CalibrationError, RecipeError
from compress_kernels import solver

AT_ONCE = 1 << 20  # entries processed together
FEW = 8  # entries of a group up to which all pairs, here 28, are compared


def drop_count(size: int, sparsity: float) -> int:
    """How many of `size` are dropped: size * sparsity, half to even, in decimal arithmetic."""
    return int((Decimal(size) * Decimal(str(sparsity))).to_integral_value(ROUND_HALF_EVEN))


def drop_between(start: int, end: int, sparsity: float) -> int:
    """How many of the entries `start` to `end` of a longer row are dropped, so that the counts of parts add up."""
    return drop_count(end, sparsity) - drop_count(start, sparsity)


def percent(sparsity: float) -> str:
    """The sparsity as text: `50%`, `12.5%`."""
    return f"{float(Decimal(str(sparsity)) * 100):g}%"


def refuse_nan(score: Tensor) -> None:
    """Raise CalibrationError if a score is NaN."""
    if score.numel() and bool(torch.isnan(score.amax())):  # amax propagates NaN
        raise CalibrationError("a pruning score is NaN; the weights or the calibration statistics are not finite")


def keep_highest(score_GN: Tensor, drop: int) -> Tensor:
    """A mask that drops exactly the `drop` lowest of each row; equal scores are dropped from the left.

    Raises CalibrationError if a score is NaN.
    """
    refuse_nan(score_GN)
    if drop == 0:
        return torch.ones_like(score_GN, dtype=torch.bool)
    if drop == score_GN.shape[1]:
        return torch.zeros_like(score_GN, dtype=torch.bool)
    keep_GN = torch.empty_like(score_GN, dtype=torch.bool)
    step = max(1, AT_ONCE // score_GN.shape[1])
    for start in range(0, len(score_GN), step):  # rows are independent; indices and counts take 8 bytes an entry
        some_GN = score_GN[start : start + step]
        threshold = some_GN.kthvalue(drop, dim=1, keepdim=True).values
        below, level = some_GN < threshold, some_GN == threshold
        missing = drop - below.sum(1, keepdim=True, dtype=torch.int32)
        keep_GN[start : start + step] = ~(below | (level & (level.cumsum(1, dtype=torch.int32) <= missing)))
    return keep_GN


def keep_of_few(score_MG: Tensor, drop: int) -> Tensor:
    """`keep_highest` for each column, for columns of a few entries: each pair is compared once.

    Raises CalibrationError if a score is NaN.
    """
    refuse_nan(score_MG)
    rank_M = torch.arange(len(score_MG), dtype=torch.int8, device=score_MG.device)  # if each is above those before it
    rank_MG = rank_M[:, None].repeat(1, score_MG.shape[1])
    for apart in range(1, len(score_MG)):
        lower_PG = (score_MG[apart:] < score_MG[:-apart]).view(torch.int8)
        rank_MG[:-apart] += lower_PG
        rank_MG[apart:] -= lower_PG
    return rank_MG >= drop


@dataclass(frozen=True, kw_only=True)
class Pattern:
    """A rule about which entries may be kept together."""

    @property
    def name(self) -> str:
        """The short name, as in `2:4` or `50%`."""
        raise NotImplementedError

    def check(self, shape: tuple[int, int]) -> str | None:
        """Why a matrix of this shape cannot follow the pattern, or None."""
        del shape
        return None

    def kept(self, shape: tuple[int, int]) -> int:
        """How many entries of a matrix of this shape are kept."""
        raise NotImplementedError

    def keep(self, score_OI: Tensor) -> Tensor:
        """The mask [out, in] that keeps the highest scores, True = kept."""
        return self.keep_part(score_OI, 0)

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The mask of the columns from `start` of a wider matrix, in a competition of their own.

        The counts of consecutive parts add up to those of the whole matrix.
        """
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class NM(Pattern):
    """Exactly `n` kept of every `m` consecutive inputs of every row."""

    n: int
    m: int

    @property
    def name(self) -> str:
        """`n:m`."""
        return f"{self.n}:{self.m}"

    def check(self, shape: tuple[int, int]) -> str | None:
        """The reason if m does not divide the inputs, or None."""
        return f"{self.name} needs a width divisible by {self.m}, got {shape[1]}" if shape[1] % self.m else None

    def kept(self, shape: tuple[int, int]) -> int:
        """n of every m."""
        return shape[0] * shape[1] // self.m * self.n

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The n highest of each group; raises RecipeError if groups do not divide the width."""
        reason = self.check((score_OB.shape[0], score_OB.shape[1]))
        if reason:
            raise RecipeError(reason)
        score_GM = score_OB.reshape(-1, self.m)
        keep_GM = torch.empty_like(score_GM, dtype=torch.bool)
        step = max(1, AT_ONCE // self.m) if self.in_pairs(score_OB) else max(1, len(score_GM))
        for part in (slice(start, start + step) for start in range(0, len(score_GM), step)):
            keep_GM[part] = self.keep_across(score_GM[part].T).T
        return keep_GM.view(score_OB.shape)

    def keep_across(self, score_MG: Tensor) -> Tensor:
        """The n highest of each column, where each column is a group."""
        if self.in_pairs(score_MG):
            return keep_of_few(score_MG.contiguous(), self.m - self.n)
        score_GM = score_MG.T.contiguous()
        if not solver.usable(score_GM):
            return keep_highest(score_GM, self.m - self.n).T
        refuse_nan(score_GM)
        return solver.keep_nm(score_GM, self.n).T

    def in_pairs(self, score: Tensor) -> bool:
        """Whether the entries of a group are compared pair by pair; on a GPU a kernel for groups is used instead."""
        return self.m <= FEW and not solver.usable(score)


@dataclass(frozen=True, kw_only=True)
class PerRow(Pattern):
    """The same number kept in every row: each output is a competition of its own."""

    sparsity: float

    @property
    def name(self) -> str:
        """`50%`."""
        return percent(self.sparsity)

    def kept(self, shape: tuple[int, int]) -> int:
        """The same number in each row."""
        return shape[0] * (shape[1] - drop_count(shape[1], self.sparsity))

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The highest of each row."""
        return keep_highest(score_OB, drop_between(start, start + score_OB.shape[1], self.sparsity))


@dataclass(frozen=True, kw_only=True)
class PerMatrix(Pattern):
    """One competition over the whole matrix; counts of rows may differ."""

    sparsity: float

    @property
    def name(self) -> str:
        """`50%m`."""
        return f"{percent(self.sparsity)}m"

    def kept(self, shape: tuple[int, int]) -> int:
        """A share of all entries."""
        return shape[0] * shape[1] - drop_count(shape[0] * shape[1], self.sparsity)

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The highest of the matrix."""
        height, width = score_OB.shape
        drop = drop_between(height * start, height * (start + width), self.sparsity)
        return keep_highest(score_OB.reshape(1, -1), drop).view(score_OB.shape)


@dataclass(frozen=True, kw_only=True)
class Blocks(Pattern):
    """Whole tiles of `rows` x `columns` are kept or dropped, by the sum of their scores, over the matrix."""

    rows: int
    columns: int
    sparsity: float

    @property
    def name(self) -> str:
        """`50%b16x16`."""
        return f"{percent(self.sparsity)}b{self.rows}x{self.columns}"

    def check(self, shape: tuple[int, int]) -> str | None:
        """The reason if the tiles do not divide both sides, or None."""
        if shape[0] % self.rows or shape[1] % self.columns:
            return f"blocks of {self.rows}x{self.columns} do not tile a matrix of {shape[0]}x{shape[1]}"
        return None

    def kept(self, shape: tuple[int, int]) -> int:
        """Entries of whole tiles."""
        tiles = (shape[0] // self.rows) * (shape[1] // self.columns)
        return (tiles - drop_count(tiles, self.sparsity)) * self.rows * self.columns

    def keep_part(self, score_OB: Tensor, start: int) -> Tensor:
        """The tiles with the highest total."""
        tiles = score_OB.unflatten(1, (-1, self.columns)).unflatten(0, (-1, self.rows))
        total = tiles.sum((1, 3))
        before = total.shape[0] * (start // self.columns)
        drop = drop_between(before, before + total.numel(), self.sparsity)
        kept = keep_highest(total.reshape(1, -1), drop).view(total.shape)
        return kept[:, None, :, None].expand_as(tiles).reshape(score_OB.shape)


def pattern(sparsity: float | str, scope: str = "row") -> Pattern:
    """The pattern that recipe options define: a fraction with a scope (row, matrix, RxC), or `n:m` with n kept.

    Raises RecipeError if they define none.
    """
    if isinstance(sparsity, str):
        found = re.fullmatch(r"(\d+):(\d+)", sparsity)
        if not found or not 0 < int(found[1]) < int(found[2]) <= 64:
            raise RecipeError(
                f"sparsity: {sparsity!r} is not a pattern; allowed: a fraction such as 0.5, or n:m with n kept of m "
                "and 0 < n < m <= 64, such as 2:4"
            )
        if scope not in ("row", "matrix"):
            raise RecipeError(
                f"scope: {scope!r} cannot be combined with {sparsity}; n:m compares weights within groups of a row"
            )
        return NM(n=int(found[1]), m=int(found[2]))
    if not 0 <= sparsity <= 1:
        raise RecipeError(f"sparsity: {sparsity} is out of range; allowed: 0 to 1, or n:m")
    tile = re.fullmatch(r"(\d+)x(\d+)", scope)
    if tile and int(tile[1]) and int(tile[2]):
        return Blocks(rows=int(tile[1]), columns=int(tile[2]), sparsity=float(sparsity))
    if scope not in ("row", "matrix"):
        raise RecipeError(f"scope: {scope!r} is unknown; allowed: row, matrix, or a block such as 16x16")
    return PerRow(sparsity=float(sparsity)) if scope == "row" else PerMatrix(sparsity=float(sparsity))
