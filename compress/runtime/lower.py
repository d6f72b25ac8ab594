"""Lowering: from a weight expression to the fastest module here; a list of rules, first answer wins.

`dense` decodes once and computes with a plain matrix; packed CPU forms are kept beside it where they win for a few
rows; `Recompute` keeps only the stored bits and decodes at each call. Factored weights stay factored.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.weights import Product, Quantized, Sum, Weight
from compress_kernels import cpu

Rule = Callable[[Weight, torch.dtype], nn.Module | None]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a lowering rule; earlier rules win."""
    RULES.append(function)
    return function


def lower(weight: Weight, dtype: torch.dtype) -> nn.Module:
    """The module that computes `x @ weight.T` for x of `dtype`, on the device of the expression's tensors."""
    return next(module for found in RULES if (module := found(weight, dtype)) is not None)


class Matrix(nn.Module):
    """A decoded matrix; buffers are not saved, the packed form is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", weight.contiguous(), persistent=False)
        self.matrix: Tensor

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + b`, rounded once as a plain linear map is."""
        return F.linear(x, self.matrix, bias)


class FewRows(nn.Module):
    """A packed CPU product for up to `cpu.FEW_ROWS` rows of x, a decoded matrix above."""

    def __init__(self, packed: cpu.Int4 | cpu.Int8, matrix: Tensor) -> None:
        super().__init__()
        self.packed, self.many = packed, Matrix(matrix)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + b`; the packed form stays on the CPU and serves only there."""
        if x.device.type == "cpu" and x.dtype == torch.bfloat16 and x.numel() // x.shape[-1] <= cpu.FEW_ROWS:
            y = self.packed.linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        return torch.as_tensor(self.many(x, bias))


class Parallel(nn.Module):
    """The sum of several maps of one input."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """Each part applied, added."""
        y: Tensor = self.parts[0](x)
        for part in self.parts[1:]:
            y = y + part(x)
        return y


@rule
def cpu_int4(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """Int4 in groups ATen knows, bf16, large enough to pay."""
    match weight:
        case Quantized(codes, scale, zero, bits=4) if (
            dtype == torch.bfloat16
            and codes.device.type == "cpu"
            and weight.group in cpu.GROUPS
            and scale.shape[0] == codes.shape[0]
            and cpu.worth_packing(*weight.shape)
        ):
            packed = cpu.Int4.pack(codes, scale, 8.0 if zero is None else zero)
            return FewRows(packed, weight.dense().to(dtype))
        case _:
            return None


@rule
def cpu_int8(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """Symmetric int8 with one scale a row, bf16, large enough to pay."""
    match weight:
        case Quantized(codes, scale, None, bits=8) if (
            dtype == torch.bfloat16
            and codes.device.type == "cpu"
            and scale.shape == (codes.shape[0], 1)
            and cpu.worth_packing(*weight.shape)
        ):
            return FewRows(cpu.Int8.pack(codes, scale[:, 0]), weight.dense().to(dtype))
        case _:
            return None


@rule
def factored(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """Products of which the factors are cheaper than the whole, and sums of such and of packed terms.

    A sum with a term that would be decoded to the whole matrix is decoded with it: one product instead of three.
    """
    match weight:
        case Product(left, right) if sum(map(_cost, (left, right))) < weight.shape[0] * weight.shape[1]:
            return nn.Sequential(lower(right, dtype), lower(left, dtype))
        case Sum(terms) if any(isinstance(term, Product) for term in terms):
            parts = [lower(term, dtype) for term in terms]
            return None if any(isinstance(part, Matrix) for part in parts) else Parallel(parts)
        case _:
            return None


def _cost(weight: Weight) -> int:
    return weight.shape[0] * weight.shape[1]


@rule
def decoded(weight: Weight, dtype: torch.dtype) -> nn.Module:
    """The last rule: decode once."""
    return Matrix(weight.dense().to(dtype))


def explain(weight: Weight, dtype: torch.dtype) -> str:
    """Which rule answers for a weight, by name."""
    return next(found.__name__ for found in RULES if found(weight, dtype) is not None)


def path(module: nn.Module, rows: int) -> str:
    """How a lowered module computes for so many rows of x on the CPU, such as `packed + decoded @ decoded`."""
    match module:
        case FewRows():
            return "packed" if rows <= cpu.FEW_ROWS else "decoded"
        case Matrix():
            return "decoded"
        case nn.Sequential():  # the right factor comes first
            return " @ ".join(path(part, rows) for part in reversed(list(module)))
        case Parallel():
            return " + ".join(path(part, rows) for part in module.parts)
        case _:
            return type(module).__name__.lower()


__all__ = ["FewRows", "Matrix", "Parallel", "explain", "lower", "path", "rule"]
