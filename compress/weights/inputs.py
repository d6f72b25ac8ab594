"""Rounding of the inputs of a linear map at run time, with one dynamic scale per token.

Source: Xiao et al., SmoothQuant, ICML 2023, dynamic per-token activations; e4m3 by the OCP 8-bit floating point
specification. This is not part of the weight expression; it is stored beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from compress.weights.expr import Product, Sum, Weight
from compress.weights.leaves import Diagonal, Hadamard

INPUTS = ("int8", "fp8")
FLOOR = 1e-5  # lower bound of the largest entry of a token, so that a token of zeros has a scale
LEVELS = 127.0
E4M3 = 448.0


def rounded_inputs(x: Tensor, kind: str) -> Tensor:
    """x [..., in] with each token rounded to the grid of `kind`, in its dtype; float32 arithmetic.

    The gradient is that of the identity, as if nothing were rounded.
    """
    with torch.no_grad():
        rounded = on_grid(x, kind)
    return rounded + (x - x.detach()) if x.requires_grad else rounded


def on_grid(x: Tensor, kind: str) -> Tensor:
    """The same, without a gradient; raises ValueError for an unknown `kind`."""
    wide = x.float()
    largest = wide.abs().amax(-1, keepdim=True).clamp(min=FLOOR)
    if kind == "int8":
        scale = largest / LEVELS
        return (wide / scale).round_().mul_(scale).to(x.dtype)
    if kind == "fp8":
        scale = largest / E4M3
        return (wide / scale).clamp_(-E4M3, E4M3).to(torch.float8_e4m3fn).float().mul_(scale).to(x.dtype)
    raise ValueError(f"inputs: {kind!r} is unknown; allowed: {', '.join(INPUTS)}")


def input_transform(weight: Weight) -> Hadamard | Diagonal | None:
    """The rotation or scaling of the input by which a weight, or the first term of a sum that has one, begins."""
    match weight:
        case Product(_, Hadamard() | Diagonal() as transform):
            return transform
        case Sum(terms):
            return next((found for term in terms if (found := input_transform(term)) is not None), None)
        case _:
            return None


def rounded_for(weight: Weight, x: Tensor, kind: str) -> Tensor:
    """The x [..., in] for which `weight` gives what its first factor gives for the rounded, transformed input.

    A rotation or scaling at the input is meant to make rounding harmless, so it is applied before: T^-1 round(T x).
    """
    match input_transform(weight):
        case Hadamard(positive) as turn:
            back = Hadamard(torch.ones_like(positive)).linear(rounded_inputs(turn.linear(x.float()), kind))
            return (back * torch.where(positive, 1.0, -1.0)).to(x.dtype)
        case Diagonal(diagonal):
            wide = diagonal.float()
            return (rounded_inputs(x.float() * wide, kind) / wide).to(x.dtype)
        case _:
            return rounded_inputs(x, kind)
