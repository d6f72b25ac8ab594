"""Lowers a weight expression to the fastest module on its device: a list of rules, of which the first match wins.

The last rule decodes the weight once and computes with a dense matrix. On the CPU, packed forms are kept beside that
matrix where they are faster for few rows of x; on a GPU, a weight that has a kernel stays packed (`packed.py`).
Factored weights stay factored where that is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from compress.errors import RecipeError
from compress.runtime.maps import (
    ByRows,
    FewRows,
    IntegerProduct,
    Matrix,
    Parallel,
    RoundedFirst,
    tensors,
)
from compress.runtime.packed import packed, rounded
from compress.weights import Diagonal, Hadamard, Masked, Product, Quantized, Sum, Weight
from compress_kernels import cpu, dispatch
from compress_kernels.tuning import TuningError

Rule = Callable[[Weight, torch.dtype], nn.Module | None]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a lowering rule; rules registered earlier take precedence."""
    RULES.append(function)
    return function


def lower(weight: Weight, dtype: torch.dtype, inputs: str = "", *, floats: bool = False) -> nn.Module:
    """The module that computes `x @ weight.T` for x of `dtype`, on the device of the expression's tensors.

    With `inputs`, one of compress.weights.INPUTS, x is first rounded, after the weight's transform of its input if it
    has one. With `floats`, the rounded x is multiplied in floating point even where integers are faster.
    """
    if inputs:
        exact = None if floats else integers(weight, dtype, inputs)
        return exact or RoundedFirst(lower(weight, dtype), weight, inputs)
    return next(module for found in RULES if (module := found(weight, dtype)) is not None)


def lower_lean(weight: Weight, dtype: torch.dtype, inputs: str = "") -> nn.Module | None:
    """The module that keeps a weight packed on a GPU, even if that is not faster; None if it must be decoded."""
    if not on_gpu(weight):
        return None
    return rounded(weight, inputs) if inputs else packed(weight, dtype, lean=True)


@rule
def gpu_packed(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """Any weight on a GPU that a kernel reads packed."""
    return packed(weight, dtype) if on_gpu(weight) else None


def on_gpu(weight: Weight) -> bool:
    """Whether an expression's tensors are on a device on which the kernels run."""
    if own := tensors(weight):
        return not dispatch.missing(next(iter(own.values())).device)
    return any(map(on_gpu, weight.children()))


@rule
def cpu_int4(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """Int4 with a group size that ATen supports, x in bf16, and a matrix large enough to gain."""
    match weight:
        case Quantized(codes, scale, zero, bits=4) if (
            dtype == torch.bfloat16
            and codes.device.type == "cpu"
            and weight.group in cpu.GROUPS
            and scale.shape[0] == codes.shape[0]
            and cpu.worth_packing(*weight.shape)
        ):
            few = few_rows(cpu.INT4, weight)
            packed = cpu.Int4.pack(codes, scale, 8.0 if zero is None else zero)
            return FewRows(packed, weight.dense().to(dtype), few) if few else None
        case _:
            return None


@rule
def cpu_int8(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """Symmetric int8 with one scale per row, x in bf16, and a matrix large enough to gain."""
    match weight:
        case Quantized(codes, scale, None, bits=8) if (
            dtype == torch.bfloat16
            and codes.device.type == "cpu"
            and scale.shape == (codes.shape[0], 1)
            and cpu.worth_packing(*weight.shape)
        ):
            few = few_rows(cpu.INT8, weight)
            return FewRows(cpu.Int8.pack(codes, scale[:, 0]), weight.dense().to(dtype), few) if few else None
        case _:
            return None


@rule
def cpu_sparse(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """A large enough matrix with almost all entries pruned (see `cpu.SPARSE`), and x in bf16 or float32."""
    match weight:
        case Masked(_, mask_OI) if (
            dtype in (torch.bfloat16, torch.float32)
            and mask_OI.device.type == "cpu"
            and torch.backends.mkl.is_available()
            and mask_OI.numel() >= cpu.SPARSE_FROM
            and int(mask_OI.count_nonzero()) <= cpu.SPARSE * mask_OI.numel()
        ):
            few, matrix = few_rows(cpu.CSR, weight), weight.dense()
            return FewRows(cpu.Sparse.pack(matrix), matrix.to(dtype), few) if few else None
        case _:
            return None


def few_rows(form: str, weight: Weight) -> int:
    """Rows of x up to which a packed form is chosen; raises RecipeError for a damaged tuning profile."""
    try:
        return cpu.few_rows(form, *weight.shape)
    except TuningError as error:
        raise RecipeError(str(error)) from error


def integers(weight: Weight, dtype: torch.dtype, inputs: str) -> nn.Module | None:
    """The module that multiplies rounded inputs by 8-bit codes, or None where there is none or floats are faster.

    On a CPU, floats are used where `compress tune` found them faster. Raises RecipeError for a damaged tuning profile.
    """
    if on_gpu(weight):
        return rounded(weight, inputs)
    if inputs != "int8" or (product := integer_product(weight)) is None:
        return None
    try:
        found = cpu.measured(cpu.INT8_INT8, *weight.shape)
    except TuningError as error:
        raise RecipeError(str(error)) from error
    if all(found.values()):
        return product
    return ByRows(product, RoundedFirst(lower(weight, dtype), weight, inputs), found) if any(found.values()) else None


def integer_product(weight: Weight) -> IntegerProduct | None:
    """The integer product for a weight of at most 8 bits with one scale per row; None for any other weight.

    None also on a CPU that does not multiply integers exactly.
    """
    match weight:
        case Product(left, Hadamard() | Diagonal() as transform):
            inner = integer_product(left)
            return None if inner is None or inner.transform is not None else IntegerProduct(inner.packed, transform)
        case Quantized(codes, scale, zero, bits) if (
            codes.device.type == "cpu" and scale.shape[1] == 1 and codes.shape[1] <= cpu.WIDEST
        ) and cpu.multiplies_integers():
            middle = 2 ** (bits - 1)
            signed = (codes.short() - middle).to(torch.int8)
            offset = None if zero is None else (middle - zero.float()).expand(len(codes), 1)[:, 0]
            return IntegerProduct(cpu.Integers.pack(signed, scale.expand(len(codes), 1)[:, 0], offset), None)
        case Masked(Quantized(codes, scale, None, bits), mask_OI):
            return integer_product(Quantized(codes.where(mask_OI, 2 ** (bits - 1)), scale, None, bits))
        case _:
            return None


@rule
def factored(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """Products whose factors are cheaper than the whole matrix, and sums of such products and packed terms.

    If any term of a sum would be decoded to a whole matrix, the whole sum is decoded: one product instead of three.
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


def rule_of(weight: Weight, dtype: torch.dtype, inputs: str = "") -> str:
    """The name of the rule that lowers a weight."""
    if inputs and integers(weight, dtype, inputs) is not None:
        return integers.__name__
    return next(found.__name__ for found in RULES if found(weight, dtype) is not None)


__all__ = ["lower", "lower_lean", "rule", "rule_of"]
