"""The preparation of x for a product, done in one launch (`gpu/prep.py`), with its specification.

An order of the inputs (act-order) is a gather. Zero points need the sum of x over every group, because
`sum scale (code - zero) x = scale (sum code x - zero sum x)`. Codes read as subnormal float16 numbers need x in
float16, with every row and every plane multiplied by a power of two. The row's factor brings its largest number into
[2**14, 2**15); a plane at place s, at most 6, is multiplied by 2**-s. Both are exact unless a float16 becomes
subnormal; the error of x is then at most 2**-33 of the row's largest number, because half a subnormal step is 2**-25
and the largest number stays at least 2**8. The bound also covers bfloat16, which has fewer significant digits. A row
whose largest number is below 2**-87 is less accurate.
Shape suffixes: M rows of x, I in, U units of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_kernels import formats


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a product needs of x, for words in blocks of `block` inputs.

    `unit` is the number of inputs per sum, `low` the bits between two planes of a word, `places` the inputs of a plane.
    """

    block: int
    unit: int
    low: int
    places: int
    ordered: bool
    subnormal: bool
    sums: bool

    @property
    def writes(self) -> bool:
        """Whether x itself is rewritten, not only summed."""
        return self.ordered or self.subnormal

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return self.writes or self.sums

    def dtype(self, x: Tensor) -> torch.dtype:
        """The dtype of the prepared x."""
        return torch.float16 if self.subnormal else x.dtype


@dataclass(frozen=True)
class Prepared:
    """The prepared x [M, I], padded to whole blocks if it was rewritten; float32 `sums` [U, M] and row `factor` [M]."""

    x: Tensor
    sums: Tensor
    factor: Tensor


def reference(x_MI: Tensor, plan: Plan, order: Tensor | None) -> Prepared:
    """The specification. Sums are of the prepared x without the factors of planes, times 2**-24 for subnormal codes."""
    inputs = x_MI.shape[1]
    wide_MI = x_MI.float() if order is None else x_MI.float()[:, order.long()]
    wide_MI = torch.nn.functional.pad(wide_MI, (0, formats.padded(inputs, plan.block) - inputs))
    factor_M = torch.ones(len(x_MI), device=x_MI.device)
    place_I = torch.zeros(wide_MI.shape[1], device=x_MI.device)
    if plan.subnormal:
        exponent_M = torch.frexp(wide_MI.abs().amax(1)).exponent.clamp(-86, 128)  # frexp's fraction is below 1
        factor_M = torch.ldexp(factor_M, exponent_M - 15)
        place_I = torch.arange(wide_MI.shape[1], device=x_MI.device) // plan.places * plan.low % 8
    ready_MI = torch.ldexp(wide_MI / factor_M[:, None], -place_I).to(plan.dtype(x_MI))
    unit = 2.0**-24 if plan.subnormal else 1.0
    sums_UM = (unit * torch.ldexp(ready_MI.float(), place_I)).unflatten(1, (-1, plan.unit)).sum(-1).T
    return Prepared(ready_MI if plan.writes else x_MI, sums_UM[: -(-inputs // plan.unit)], factor_M)
