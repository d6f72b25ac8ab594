"""HQQ: grids whose real-valued zero is optimised group by group, without data.

The zero of a group is a real number, so 0 is not on its grid: a mask stays outside, and entries that it cuts do not
count. Shape suffixes: O out, I in, G groups, S inputs of a group, 1 a kept dimension.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.model.site import Site
from compress.passes.base import GridQuantizer
from compress.weights import Quantized, Weight
from compress.weights.grid import narrowed, row_slices, stored_scale

ITERATIONS = 20
POWER, BETA = 0.7, 10.0  # p of the norm |e|**p and weight of the quadratic, as in the released code
FAR = 256.0  # distance of a group's values from 0, in codes, that a float16 zero still represents well


@dataclass(frozen=True, kw_only=True)
class HQQ(GridQuantizer, name="hqq"):
    """Round to grids whose zero reduces sum |w - w'|**0.7, found by half-quadratic splitting. Needs no data.

    Deviations from the released code: float32, and zeros are rounded to the stored float16 before they are judged; of
    all iterations each group keeps the zero with the least mean |w - w'| (there the last one counts); errors are
    measured in units of the matrix's RMS, so that weights of any size meet the same threshold; a 4-bit zero is not
    rounded to a code first.
    Source: Badri and Shaji, "Half-Quadratic Quantization of Large Machine Learning Models", 2023 (its half-quadratic
    solver).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.symmetric or self.search or self.group < 0:
            raise RecipeError(
                f"{self.name}: it fits zero points by row or group; leave out symmetric and search, or give a group "
                "of 0 or more"
            )

    def round(self, w_OI: Tensor, keep_OI: Tensor | None, site: Site) -> Weight:
        """Codes, scales and zeros of every group, computed a few rows at a time."""
        if w_OI.is_meta:
            plain = self.grid.quantize(w_OI)
            return replace(plain, zero=plain.scale.half())
        keep_OI = torch.ones_like(w_OI, dtype=torch.bool) if keep_OI is None else keep_OI
        width = self.grid.width(w_OI.shape[1])
        total = torch.linalg.vector_norm(w_OI, dtype=torch.float64)
        unit = float(total / max(1, int(keep_OI.sum())) ** 0.5) or 1.0
        parts = [
            half_quadratic(
                w_OI[rows].float().unflatten(1, (-1, width)), keep_OI[rows].unflatten(1, (-1, width)), self.bits, unit
            )
            for rows in row_slices(w_OI)
        ]
        codes_OI, scale_OG, zero_OG = (torch.cat(part) for part in zip(*parts, strict=True))
        return Quantized(codes_OI, narrowed(scale_OG), zero_OG, self.bits)

    def round_factor(self, factor: Tensor, keep: Tensor | None, site: Site) -> Weight:
        """A factor by the same solver, with one grid per row where the group does not divide its width."""
        return (replace(self, group=0) if factor.shape[1] % (self.group or 1) else self).round(factor, keep, site)


def half_quadratic(w_OGS: Tensor, keep_OGS: Tensor, bits: int, unit: float) -> tuple[Tensor, Tensor, Tensor]:
    """Codes [out, in], scales and float16 zeros [out, groups]; errors are shrunk in units of `unit`.

    Each iteration splits the error into a sparse part and a rest, and the zero absorbs the mean of the rest.
    """
    count_OG1 = keep_OGS.sum(-1, keepdim=True).clamp(min=1)
    scale_OG1, zero_OG1 = first_grid(w_OGS, keep_OGS, 2**bits - 1)
    w_OGS = w_OGS / scale_OG1  # from here on in steps of the grid
    step_OG1 = scale_OG1 / unit

    def encode(zero_OG1: Tensor) -> tuple[Tensor, Tensor]:
        codes_OGS = (w_OGS + zero_OG1).round_().clamp_(0, 2**bits - 1)
        return codes_OGS, (w_OGS + zero_OG1).sub_(codes_OGS).mul_(keep_OGS)

    codes_OGS, error_OGS = encode(zero_OG1)
    cost_OG1, best_OG1 = error_OGS.abs().sum(-1, keepdim=True), zero_OG1
    for _ in range(ITERATIONS):
        rest_OGS = error_OGS - shrunk(error_OGS * step_OG1) / step_OG1
        zero_OG1 = (zero_OG1 - rest_OGS.sum(-1, keepdim=True) / count_OG1).half().float()
        codes_OGS, error_OGS = encode(zero_OG1)
        new_OG1 = error_OGS.abs().sum(-1, keepdim=True)
        better_OG1 = new_OG1 < cost_OG1
        if not bool(better_OG1.any()):
            break
        cost_OG1 = torch.where(better_OG1, new_OG1, cost_OG1)
        best_OG1 = torch.where(better_OG1, zero_OG1, best_OG1)
    codes_OGS, _ = encode(best_OG1)
    return codes_OGS.to(torch.uint8).flatten(1), scale_OG1[..., 0], best_OG1[..., 0].half()


def first_grid(w_OGS: Tensor, keep_OGS: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Scale and float16 zero, [out, groups, 1], that span the kept entries of a group.

    The span of a group that lies far from 0 for its range includes 0; a group of zeros gets the scale 1.
    """
    low = w_OGS.masked_fill(~keep_OGS, torch.inf).amin(-1, keepdim=True)
    high = w_OGS.masked_fill(~keep_OGS, -torch.inf).amax(-1, keepdim=True)
    low, high = low.masked_fill(low > high, 0), high.masked_fill(low > high, 0)
    far = torch.maximum(-high, low) / FAR > (high - low) / levels
    low, high = torch.where(far, low.clamp(max=0), low), torch.where(far, high.clamp(min=0), high)
    scale = stored_scale(((high - low) / levels).masked_fill(high == low, 1.0))
    return scale, (-low / scale).half().float()


def shrunk(error: Tensor) -> Tensor:
    """The sparse part of an error: sign(e) max(|e| - |e|**(p - 1) / beta, 0)."""
    size = error.abs()
    return error.sign() * (size - size.pow(POWER - 1) / BETA).clamp_(min=0)
