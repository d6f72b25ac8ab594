"""What a product wants of x, prepared in one launch (`gpu/prep.py`), with its specification.

An order of the inputs (act-order) is a gather; zero points want the sum of x over every group, for
`sum scale (code - zero) x = scale (sum code x - zero sum x)`. Codes read as subnormal float16 numbers want x in
float16, each plane times a power of two, and each row times another:
a row's largest number is taken into [2**14, 2**15), a plane at place s times 2**-s, s at most 6. Both are exact but
where a float16 gets subnormal: no x is then further off than 2**-33 of the row's largest. (That stays at least 2**8;
half a subnormal step is 2**-25.) Numbers of bfloat16, which have fewer digits, are covered by the same bound; a row
whose largest number is below 2**-87 keeps less.
Shape suffixes: M rows of x, I in, U units of inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from compress_kernels import formats


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What is wanted of x for words of blocks of `block` inputs: `unit` inputs to a sum, `low` bits a place."""

    block: int
    unit: int
    low: int
    places: int
    ordered: bool
    subnormal: bool
    sums: bool

    @property
    def writes(self) -> bool:
        """Whether x itself is changed, not only summed."""
        return self.ordered or self.subnormal

    @property
    def needed(self) -> bool:
        """Whether there is anything to do."""
        return self.writes or self.sums

    def dtype(self, x: Tensor) -> torch.dtype:
        """Of the prepared x."""
        return torch.float16 if self.subnormal else x.dtype


@dataclass(frozen=True)
class Prepared:
    """x [M, inputs, padded to blocks if it was changed], sums [U, M] float32, a factor [M] of each row float32."""

    x: Tensor
    sums: Tensor
    factor: Tensor


def reference(x_MI: Tensor, plan: Plan, order: Tensor | None) -> Prepared:
    """The specification. Sums are of what was written without the planes' powers; for subnormal codes, times 2**-24."""
    inputs = x_MI.shape[1]
    wide_MI = x_MI.float() if order is None else x_MI.float()[:, order.long()]
    wide_MI = torch.nn.functional.pad(wide_MI, (0, formats.padded(inputs, plan.block) - inputs))
    factor_M = torch.ones(len(x_MI), device=x_MI.device)
    place_I = torch.zeros(wide_MI.shape[1], device=x_MI.device)
    if plan.subnormal:
        exponent_M = torch.frexp(wide_MI.abs().amax(1)).exponent.clamp(-86, 128)  # of a fraction below 1
        factor_M = torch.ldexp(factor_M, exponent_M - 15)
        place_I = torch.arange(wide_MI.shape[1], device=x_MI.device) // plan.places * plan.low % 8
    ready_MI = torch.ldexp(wide_MI / factor_M[:, None], -place_I).to(plan.dtype(x_MI))
    unit = 2.0**-24 if plan.subnormal else 1.0
    sums_UM = (unit * torch.ldexp(ready_MI.float(), place_I)).unflatten(1, (-1, plan.unit)).sum(-1).T
    return Prepared(ready_MI if plan.writes else x_MI, sums_UM[: -(-inputs // plan.unit)], factor_M)
