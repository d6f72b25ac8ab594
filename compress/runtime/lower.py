"""Lowering: from a weight expression to the fastest module here; a list of rules, first answer wins.

`dense` decodes once and computes with a plain matrix; packed CPU forms are kept beside it where they win for a few
rows; `Recompute` keeps only the stored bits and decodes at each call. Factored weights stay factored.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.errors import RecipeError
from compress.runtime.packed import Packed, moved, packed, tensors
from compress.runtime.shared import SharedInput
from compress.weights import (
    Dense,
    Diagonal,
    Hadamard,
    Masked,
    Permutation,
    Product,
    Quantized,
    Sum,
    Weight,
    rounded_for,
)
from compress_kernels import cpu
from compress_kernels.tuning import TuningError, bucket

Rule = Callable[[Weight, torch.dtype], nn.Module | None]
RULES: list[Rule] = []


def rule(function: Rule) -> Rule:
    """Register a lowering rule; earlier rules win."""
    RULES.append(function)
    return function


def lower(weight: Weight, dtype: torch.dtype, inputs: str = "", *, floats: bool = False) -> nn.Module:
    """The module that computes `x @ weight.T` for x of `dtype`, on the device of the expression's tensors.

    With `inputs`, one of compress.weights.INPUTS, x is rounded first, behind a transform at the input if there is one;
    with `floats`, it is computed with in floating point even where integers are faster.
    """
    if inputs:
        return (None if floats else integers(weight, dtype, inputs)) or RoundedFirst(
            lower(weight, dtype), weight, inputs
        )
    return next(module for found in RULES if (module := found(weight, dtype)) is not None)


class Biased(nn.Module):
    """A map that takes a bias with x, and so rounds once as a plain linear map does."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + b`."""
        raise NotImplementedError


def applied(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """`module` of x, and the bias added."""
    if isinstance(module, (Biased, Packed)):
        return torch.as_tensor(module(x, bias))
    y: Tensor = module(x)
    return y if bias is None else y + bias


def differentiated(x: Tensor) -> bool:
    """Whether a gradient of x is wanted, which packed products do not have."""
    return x.requires_grad and torch.is_grad_enabled()


class Matrix(Biased):
    """A decoded matrix; buffers are not saved, the packed form is."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", weight.contiguous(), persistent=False)
        self.matrix: Tensor

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + b`, rounded once as a plain linear map is."""
        return F.linear(x, self.matrix, bias)


class FewRows(Biased):
    """A packed CPU product for up to `few` rows of x, a decoded matrix above."""

    def __init__(self, packed: cpu.Int4 | cpu.Int8 | cpu.Sparse, matrix: Tensor, few: int) -> None:
        super().__init__()
        self.packed, self.many, self.few = packed, Matrix(matrix), few

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + b`; the packed form serves x of the matrix' dtype without a gradient."""
        if x.dtype == self.many.matrix.dtype and x.numel() // x.shape[-1] <= self.few and not differentiated(x):
            y = self.packed.linear(x.reshape(-1, x.shape[-1])).view(*x.shape[:-1], -1)
            return y if bias is None else y + bias
        return torch.as_tensor(self.many(x, bias))


class Rounding(Biased):
    """A map that turns and rounds its input first; what other maps of that input share with it."""

    transform: Weight | None
    inputs: str
    shared: SharedInput | None = None
    member = 0

    def read(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the product needs of x."""
        raise NotImplementedError

    def taken(self, x: Tensor) -> tuple[Tensor, ...]:
        """The same, made once for all that share it."""
        return self.read(x) if self.shared is None else self.shared.take(self.member, x, self.read)


class IntegerProduct(Rounding):
    """Int8 inputs times int8 weights, exactly, behind the transform at the input; x has no gradient."""

    inputs = "int8"

    def __init__(self, packed: cpu.Integers, transform: Weight | None) -> None:
        super().__init__()
        self.packed, self.transform = packed, transform

    def read(self, x: Tensor) -> tuple[Tensor, ...]:
        """Codes and scales of the transformed x."""
        x_MI = x.reshape(-1, x.shape[-1])
        return cpu.rounded(x_MI if self.transform is None else self.transform.linear(x_MI.float()))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`round(T x) @ W.T + b`, rounded once to the dtype of x."""
        codes_MI, scale_M1 = self.taken(x)
        y = self.packed.linear(codes_MI, scale_M1)
        return (y if bias is None else y.add_(bias)).to(x.dtype).view(*x.shape[:-1], -1)


class ByRows(Biased):
    """One of two ways for each number of rows of x, as `compress tune` found them faster."""

    def __init__(self, integers: IntegerProduct, floats: nn.Module, measured: Mapping[int, bool]) -> None:
        super().__init__()
        self.integers, self.floats, self.measured = integers, floats, dict(measured)

    def chosen(self, rows: int) -> nn.Module:
        """The module for so many rows."""
        return self.integers if self.measured[bucket(rows, self.measured)] else self.floats

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`round(x) @ W.T + b`."""
        rows = x.numel() // x.shape[-1]
        return applied(self.floats if differentiated(x) else self.chosen(rows), x, bias)


class RoundedFirst(Rounding):
    """Inputs rounded, and computed with in floating point."""

    def __init__(self, product: nn.Module, weight: Weight, inputs: str) -> None:
        super().__init__()
        self.product, self.inputs, self.kept = product, inputs, kept_transform(weight)
        self.transform = self.kept.right if isinstance(self.kept, Product) else None

    def read(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rounded x."""
        return (rounded_for(self.kept, x, self.inputs),)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of the rounded x, and the bias."""
        (read,) = self.taken(x)
        return applied(self.product, read, bias)


class Transformed(Biased):
    """A map behind a transform of its input that costs little: a scaling, an order, a rotation."""

    def __init__(self, transform: Weight, then: nn.Module) -> None:
        super().__init__()
        self.then, self.transform = then, transform

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`(T x) @ W.T + b`."""
        return applied(self.then, self.transform.linear(x), bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformed:
        """Move the transform with the module."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.transform = moved(self.transform, fn)
        return self


def kept_transform(weight: Weight) -> Weight:
    """A weight of the same transform at the input, that holds nothing else."""
    match weight:
        case Product(left, Hadamard() | Diagonal() as right):
            return Product(Dense(torch.empty(0, left.shape[1])), right)
        case _:
            return Dense(torch.empty(0, weight.shape[1]))


def share(modules: Sequence[nn.Module]) -> None:
    """Let maps of one input turn and round it once, those that do it alike."""
    alike: list[list[Rounding]] = []
    for module in modules:
        if isinstance(module, Rounding):
            group = next((group for group in alike if begins_alike(group[0], module)), None)
            if group is None:
                alike.append([module])
            else:
                group.append(module)
    for group in alike:
        shared = SharedInput(len(group)) if len(group) > 1 else None
        for member, module in enumerate(group):
            module.shared, module.member = shared, member


def begins_alike(one: Rounding, other: Rounding) -> bool:
    """Whether two maps do the same to their input."""
    if (type(one), one.inputs) != (type(other), other.inputs):
        return False
    match one.transform, other.transform:
        case None, None:
            return True
        case (Hadamard(a), Hadamard(b)) | (Diagonal(a), Diagonal(b)):
            return torch.equal(a, b)
        case _:
            return False


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
def gpu_packed(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """Whatever has a kernel that reads it packed, on a GPU; a transform of the input is applied before."""
    if not on_gpu(weight):
        return None
    match weight:
        case Product(left, Hadamard() | Diagonal() | Permutation() as transform):
            then = gpu_packed(left, dtype)
            return None if then is None else Transformed(transform, then)
        case _:
            return packed(weight, dtype)


def on_gpu(weight: Weight) -> bool:
    """Whether an expression's tensors are on a CUDA device."""
    if own := tensors(weight):
        return next(iter(own.values())).device.type == "cuda"
    return any(map(on_gpu, weight.children()))


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
            few = few_rows(cpu.INT4, weight)
            packed = cpu.Int4.pack(codes, scale, 8.0 if zero is None else zero)
            return FewRows(packed, weight.dense().to(dtype), few) if few else None
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
            few = few_rows(cpu.INT8, weight)
            return FewRows(cpu.Int8.pack(codes, scale[:, 0]), weight.dense().to(dtype), few) if few else None
        case _:
            return None


@rule
def cpu_sparse(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """Almost all entries pruned, bf16 or float32, large enough to pay."""
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
    """Rows up to which a packed form is chosen; raises RecipeError for a damaged tuning profile."""
    try:
        return cpu.few_rows(form, *weight.shape)
    except TuningError as error:
        raise RecipeError(str(error)) from error


def integers(weight: Weight, dtype: torch.dtype, inputs: str) -> nn.Module | None:
    """Int8 inputs times a weight that has an exact integer form, where `compress tune` did not find floats faster."""
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
    """A weight of at most 8 bits with one scale a row, on a CPU that multiplies integers exactly."""
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


def rule_of(weight: Weight, dtype: torch.dtype, inputs: str = "") -> str:
    """Which rule answers for a weight, by name."""
    if inputs and integers(weight, dtype, inputs) is not None:
        return integers.__name__
    return next(found.__name__ for found in RULES if found(weight, dtype) is not None)


def path(module: nn.Module, rows: int) -> str:
    """How a lowered module computes for so many rows of x on the CPU, such as `packed + decoded @ decoded`."""
    match module:
        case FewRows():
            return "packed" if rows <= module.few else "decoded"
        case Matrix():
            return "decoded"
        case Packed():
            return f"packed {module.name}"
        case Transformed():
            return f"{module.transform.describe()}, {path(module.then, rows)}"
        case IntegerProduct():
            return "integers"
        case ByRows():
            return path(module.chosen(rows), rows)
        case RoundedFirst():
            return f"rounded, {path(module.product, rows)}"
        case nn.Sequential():  # the right factor comes first
            return " @ ".join(path(part, rows) for part in reversed(list(module)))
        case Parallel():
            return " + ".join(path(part, rows) for part in module.parts)
        case _:
            return type(module).__name__.lower()


__all__ = [
    "Biased", "ByRows", "FewRows", "IntegerProduct", "Matrix", "Parallel", "RoundedFirst", "applied", "differentiated",
    "lower", "path", "rule", "rule_of", "share",
    ]  # fmt: skip
