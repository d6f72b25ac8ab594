"""Uniform integer grids: fitting a scale and a zero to weights, and rounding onto them.

Conventions differ by half a step between tools, so they are stated here. Asymmetric grids include zero,
`step = (max - min) / (2**bits - 1)`, `zero = round(-min / step)`; symmetric grids follow GPTQ,
`step = 2 max|w| / (2**bits - 1)` with the zero at code 2**(bits - 1). Zero is always on the grid, so masks survive. All
arithmetic is float32; the scale is rounded to its stored dtype BEFORE codes are chosen, so the stored values are those
that were optimised. Shape suffixes: O out, I in, G groups, S inputs of a group.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.weights.leaves import Quantized

SMALLEST_NORMAL = 2.0**-14  # of float16; a smaller scale would lose its precision
LARGEST = 65504.0  # of float16
SHRINKS = 80  # candidates of the range search, as in the GPTQ code
AT_ONCE = 1 << 21  # entries processed together
NORM = 2.4  # the exponent of that search
COARSE = 24  # ranges that the search by output error tries in addition to the whole, down to 0.4 of it


@dataclass(frozen=True, kw_only=True)
class Grid:
    """`bits` an entry, one grid per `group` inputs (0 = a whole row, -1 = the whole matrix)."""

    bits: int
    group: int = 0
    symmetric: bool = False

    def width(self, inputs: int) -> int:
        """Inputs covered by one grid."""
        return self.group if self.group > 0 else inputs

    def fit(
        self, w_OI: Tensor, *, search: bool = False, norm: float = NORM, gram_II: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Scale and zero, [out, groups] each (or [1, 1]); zero is None if symmetric.

        With `search`, each range is shrunk to the one of 80 that minimises sum |w - w'|**norm, or with `gram_II` to the
        one of 25 that minimises (w - w') G (w - w')ᵀ within its group. Raises RecipeError if the group does not divide
        the width.
        Source: Frantar et al., GPTQ, ICLR 2023, released quantizer (`find_params`, option mse); Lin et al., AWQ, MLSys
        2024, section 3.2 (clipping by output error).
        """
        if self.group > 0 and w_OI.shape[1] % self.group:
            raise RecipeError(f"group {self.group} does not divide a width of {w_OI.shape[1]}")
        if w_OI.is_meta:
            return self.outline(w_OI)
        if self.group == -1:
            scale, zero = fit_ranges(w_OI.float().reshape(1, 1, -1), self, power_error(norm) if search else None)
            return narrowed(scale), zero
        width = self.width(w_OI.shape[1])
        error = None if not search else power_error(norm) if gram_II is None else output_error(gram_II, width)
        parts = [fit_ranges(w_OI[rows].float().unflatten(1, (-1, width)), self, error) for rows in row_slices(w_OI)]
        zeros = [zero for _, zero in parts if zero is not None]
        return narrowed(torch.cat([scale for scale, _ in parts])), torch.cat(zeros) if zeros else None

    def outline(self, w_OI: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scale and zero without values; the scales fit float16, as those of almost all weights do."""
        groups = (1, 1) if self.group == -1 else (w_OI.shape[0], w_OI.shape[1] // self.width(w_OI.shape[1]))
        scale = w_OI.new_empty(groups, dtype=torch.float16)
        return scale, None if self.symmetric else scale.new_empty(groups, dtype=torch.uint8)

    def encode(self, w_OI: Tensor, scale: Tensor, zero: Tensor | None) -> Tensor:
        """The nearest codes, uint8 [out, in]."""
        codes_OI = torch.empty(w_OI.shape, dtype=torch.uint8, device=w_OI.device)
        for rows in row_slices(w_OI) if not w_OI.is_meta else ():
            own = rows if scale.shape[0] == w_OI.shape[0] else slice(None)
            w_OGS: Tensor = w_OI[rows].float().unflatten(1, (scale.shape[1], -1))
            middle = 2.0 ** (self.bits - 1) if zero is None else zero[own].float()[..., None]
            codes = (w_OGS / scale[own].float()[..., None]).round_().add_(middle)
            codes_OI[rows] = codes.clamp_(0, 2**self.bits - 1).flatten(1)
        return codes_OI

    def quantize(
        self, w_OI: Tensor, *, search: bool = False, norm: float = NORM, gram_II: Tensor | None = None
    ) -> Quantized:
        """The matrix rounded to nearest on a fitted grid."""
        scale, zero = self.fit(w_OI, search=search, norm=norm, gram_II=gram_II)
        return Quantized(self.encode(w_OI, scale, zero), scale, zero, self.bits)


def row_slices(w_OI: Tensor) -> Iterator[slice]:
    """Slices of the rows of a matrix, a few million entries each, so that temporaries stay small and near the cache."""
    step = max(1, AT_ONCE // max(1, w_OI.shape[1]))
    return (slice(start, start + step) for start in range(0, w_OI.shape[0], step))


@dataclass(frozen=True)
class GroupError:
    """The cost [out, groups] of a deviation [out, groups, size]; and the ranges to try, as shares of the whole."""

    cost: Callable[[Tensor], Tensor]
    shares: Sequence[float]


def power_error(norm: float) -> GroupError:
    """Sum of |w - w'|**norm."""
    return GroupError(lambda d_OGS: d_OGS.abs().pow(norm).sum(-1), [1 - step / 100 for step in range(1, SHRINKS)])


def output_error(gram_II: Tensor, width: int) -> GroupError:
    """d G dᵀ with the part of the Gram that belongs to each group."""
    groups = gram_II.shape[0] // width
    gram_GSS = torch.stack([gram_II[g * width : (g + 1) * width, g * width : (g + 1) * width] for g in range(groups)])

    def cost(d_OGS: Tensor) -> Tensor:
        d_GOS = d_OGS.transpose(0, 1)
        return ((d_GOS @ gram_GSS) * d_GOS).sum(-1).T

    return GroupError(cost, [1 - step / 40 for step in range(1, COARSE + 1)])


def fit_ranges(w_OGS: Tensor, grid: Grid, error: GroupError | None) -> tuple[Tensor, Tensor | None]:
    """Scale and zero of every group of w [out, groups, size]; of the whole range, or of the share of least `error`."""
    low, high = w_OGS.amin(-1).clamp(max=0), w_OGS.amax(-1).clamp(min=0)
    if grid.symmetric:
        high = torch.maximum(-low, high)
        low = -high
    empty = high == low
    low, high = low.masked_fill(empty, -1.0), high.masked_fill(empty, 1.0)
    scale, zero = range_to_grid(low, high, grid)
    if error is None:
        return scale, zero
    best = error.cost(deviation(w_OGS, scale, zero, grid))
    for share in error.shares:
        scale_try, zero_try = range_to_grid(low * share, high * share, grid)
        cost = error.cost(deviation(w_OGS, scale_try, zero_try, grid))
        better = cost < best
        best, scale = torch.where(better, cost, best), torch.where(better, scale_try, scale)
        zero = None if zero is None or zero_try is None else torch.where(better, zero_try, zero)
    return scale, zero


def range_to_grid(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor | None]:
    """The stored scale and zero for the ranges [low, high]."""
    scale = stored_scale((high - low) / (2**grid.bits - 1))
    if grid.symmetric:
        return scale, None
    return scale, (-low / scale.float()).round().clamp(0, 2**grid.bits - 1).to(torch.uint8)


def stored_scale(scale: Tensor) -> Tensor:
    """The scale as it will be stored, float32: rounded to float16 where float16 keeps its precision."""
    scale = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return torch.where(fits_half(scale), scale.to(torch.float16).float(), scale)


def fits_half(scale: Tensor) -> Tensor:
    """Whether each scale has full precision in float16."""
    return (scale >= SMALLEST_NORMAL) & (scale <= LARGEST)


def narrowed(scale: Tensor) -> Tensor:
    """Rounded scales in the stored dtype: float16, or float32 if any of them needs it."""
    return scale.to(torch.float16) if bool(fits_half(scale).all()) else scale


def deviation(w_OGS: Tensor, scale: Tensor, zero: Tensor | None, grid: Grid) -> Tensor:
    """w' - w for rounding to nearest."""
    step = scale.float()[..., None]
    middle = 2.0 ** (grid.bits - 1) if zero is None else zero.float()[..., None]
    codes = (w_OGS / step).round_().add_(middle).clamp_(0, 2**grid.bits - 1)
    return codes.sub_(middle).mul_(step).sub_(w_OGS)
