"""The modules that a weight is lowered to, and the description of how each computes (`path`).

The choice among them is made in `lower.py` and `packed.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from compress.runtime.shared import SharedInput
from compress.weights import Dense, Diagonal, Hadamard, Product, Weight, input_transform, rounded_for
from compress_kernels import cpu
from compress_kernels.tuning import bucket

Linear = Callable[[Any, Tensor, Tensor | None], Tensor]


class Biased(nn.Module):
    """A module that takes the bias together with x, so that the result is rounded once, as in a plain linear layer."""

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + b`."""
        raise NotImplementedError


def applied(module: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
    """`module` applied to x, plus the bias."""
    if isinstance(module, Biased):
        return torch.as_tensor(module(x, bias))
    y: Tensor = module(x)
    return y if bias is None else y + bias


def differentiated(x: Tensor) -> bool:
    """Whether a gradient of x is wanted, which packed CPU products do not have."""
    return x.requires_grad and torch.is_grad_enabled()


class Matrix(Biased):
    """A decoded matrix; it is not in the state dict, because the stored tensors are saved instead."""

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.register_buffer("matrix", weight.contiguous(), persistent=False)
        self.matrix: Tensor

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + b`, rounded once as in a plain linear layer."""
        return F.linear(x, self.matrix, bias)


class FewRows(Biased):
    """A packed CPU product for up to `few` rows of x, and a decoded matrix for more."""

    def __init__(self, packed: cpu.Int4 | cpu.Int8 | cpu.Sparse, matrix: Tensor, few: int) -> None:
        super().__init__()
        self.packed, self.many, self.few = packed, Matrix(matrix), few

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ W.T + b`; the packed form is used only if x has the matrix's dtype and needs no gradient."""
        if x.dtype == self.many.matrix.dtype and x.numel() // x.shape[-1] <= self.few and not differentiated(x):
            y = self.packed.linear(x.reshape(-1, x.shape[-1]).contiguous())
            return (y if bias is None else y + bias).view(*x.shape[:-1], y.shape[-1])
        return torch.as_tensor(self.many(x, bias))


class Rounding(Biased):
    """A module that first transforms and rounds its input, a step that modules of the same input can share."""

    transform: Weight | None
    inputs: str
    shared: SharedInput | None = None
    member = 0

    def read(self, x: Tensor) -> tuple[Tensor, ...]:
        """What the product needs of x: the transformed and rounded input."""
        raise NotImplementedError

    def taken(self, x: Tensor) -> tuple[Tensor, ...]:
        """The result of `read`, computed once for all modules that share it."""
        return self.read(x) if self.shared is None else self.shared.take(self.member, x, self.read)


class IntegerProduct(Rounding):
    """Int8 inputs times int8 weights, exact in integers, after the input transform if any; x has no gradient."""

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
        return (y if bias is None else y.add_(bias)).to(x.dtype).view(*x.shape[:-1], y.shape[-1])


class ByRows(Biased):
    """Integers or floats, whichever `compress tune` measured as faster for the number of rows of x."""

    def __init__(self, integers: IntegerProduct, floats: nn.Module, measured: Mapping[int, bool]) -> None:
        super().__init__()
        self.integers, self.floats, self.measured = integers, floats, dict(measured)

    def chosen(self, rows: int) -> nn.Module:
        """The module for x with this many rows."""
        return self.integers if self.measured[bucket(rows, self.measured)] else self.floats

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`round(x) @ W.T + b`; in floats if a gradient of x is wanted."""
        rows = x.numel() // x.shape[-1]
        return applied(self.floats if differentiated(x) else self.chosen(rows), x, bias)


class RoundedFirst(Rounding):
    """Rounds the inputs and multiplies them in floating point."""

    def __init__(self, product: nn.Module, weight: Weight, inputs: str) -> None:
        super().__init__()
        self.product, self.inputs, self.kept = product, inputs, kept_transform(weight)
        self.transform = self.kept.right if isinstance(self.kept, Product) else None

    def read(self, x: Tensor) -> tuple[Tensor, ...]:
        """The rounded x."""
        return (rounded_for(self.kept, x, self.inputs),)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """The product of the rounded x with the weight, plus the bias."""
        (read,) = self.taken(x)
        return applied(self.product, read, bias)


class Transformed(Biased):
    """Applies a cheap transform to the input (scaling, permutation or rotation) and then another module.

    `wide` transforms in float32, which rounding of the result requires.
    """

    def __init__(self, transform: Weight, then: nn.Module, *, wide: bool = False) -> None:
        super().__init__()
        self.then, self.transform, self.wide = then, transform, wide

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`(T x) @ W.T + b`."""
        return applied(self.then, self.transform.linear(x.float() if self.wide else x), bias).to(x.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Transformed:
        """Move the tensors of the transform along with the module."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.transform = moved(self.transform, fn)
        return self


class Packed(Biased):
    """`x @ W.T + b`, computed by an op on a packed form, which is a dataclass of tensors and numbers."""

    def __init__(self, form: Any, linear: Linear, name: str) -> None:
        super().__init__()
        self.form, self.linear, self.name = form, linear, name

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Map x [..., in] to [..., out]."""
        return self.linear(self.form, x, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Move the packed form along with the module, but never cast it: the format fixes its dtypes."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.form = moved(self.form, fn)
        return self


class Parallel(nn.Module):
    """The sum of several modules applied to one input."""

    def __init__(self, parts: list[nn.Module]) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        """The sum of the outputs of all parts."""
        y: Tensor = self.parts[0](x)
        for part in self.parts[1:]:
            y = y + part(x)
        return y


def kept_transform(weight: Weight) -> Weight:
    """A weight with the same input transform and no rows, which is all that rounding an input needs."""
    nothing = Dense(torch.empty(0, weight.shape[1]))
    transform = input_transform(weight)
    return nothing if transform is None else Product(nothing, transform)


def share(modules: Sequence[nn.Module]) -> None:
    """Make modules of one input transform and round it once, as far as they do so in the same way."""
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
    """Whether two modules transform and round their input in the same way."""
    if (type(one), one.inputs) != (type(other), other.inputs):
        return False
    match one.transform, other.transform:
        case None, None:
            return True
        case (Hadamard(a), Hadamard(b)) | (Diagonal(a), Diagonal(b)):
            return torch.equal(a, b)
        case _:
            return False


def path(module: nn.Module, rows: int) -> str:
    """How a lowered module computes for x with this many rows, for example `packed + decoded @ decoded`."""
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
        case nn.Sequential():  # the right factor is applied first
            return " @ ".join(path(part, rows) for part in reversed(list(module)))
        case Parallel():
            return " + ".join(path(part, rows) for part in module.parts)
        case _:
            return type(module).__name__.lower()


def tensors(form: Any) -> dict[str, Tensor]:
    """The fields of a dataclass that are tensors, by name."""
    found = {field.name: getattr(form, field.name) for field in fields(form)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def moved(form: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with its tensors moved to the device that `fn` moves to; if `fn` also casts, that is ignored."""
    there = {name: t.to(fn(torch.empty(0, device=t.device)).device) for name, t in tensors(form).items()}
    return replace(form, **there)
