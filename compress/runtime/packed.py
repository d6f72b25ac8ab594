"""Weights that stay packed on a GPU: which op of `compress_kernels` computes an expression, and the module around it.

One `match`: what it does not name is decoded by the rules that follow. Not here: CPU forms (`lower.py`), and which way
an op goes for many rows of x, which the op decides.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from compress.weights import Quantized, Weight
from compress_kernels import wq
from compress_kernels.given import HALVES

Linear = Callable[[Any, Tensor, Tensor | None], Tensor]


class Packed(nn.Module):
    """`x @ W.T + b` by an op on a packed form: a dataclass of tensors and numbers."""

    def __init__(self, form: Any, linear: Linear, name: str) -> None:
        super().__init__()
        self.form, self.linear, self.name = form, linear, name

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[..., in] -> [..., out]."""
        return self.linear(self.form, x, bias)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Packed:
        """Move with the module, never cast: the numbers are the format's."""
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.form = moved(self.form, fn)
        return self


def tensors(form: Any) -> dict[str, Tensor]:
    """The tensors among the fields of a dataclass."""
    found = {field.name: getattr(form, field.name) for field in fields(form)}
    return {name: value for name, value in found.items() if isinstance(value, Tensor)}


def moved(form: Any, fn: Callable[[Tensor], Tensor]) -> Any:
    """A dataclass with its tensors where `fn`, which may also cast, would put one of them."""
    there = {name: t.to(fn(torch.empty(0, device=t.device)).device) for name, t in tensors(form).items()}
    return replace(form, **there)


@dataclass(frozen=True)
class Way:
    """How an expression is computed packed: the op's form and function, or why it is not."""

    form: Any = None
    linear: Linear | None = None
    problem: str = ""


def way(weight: Weight) -> Way:
    """The packed form of an expression, or the reason that there is none."""
    match weight:
        case Quantized(codes, scale, None, bits):
            rows = codes.shape[0]
            if problem := wq.unsupported(f"int{bits}", codes.shape[1], 0 if scale.shape[1] == 1 else weight.group):
                return Way(problem=problem)
            return Way(wq.pack(codes, scale.expand(rows, -1), bits), wq.linear)
        case _:
            return Way(problem=f"there is no kernel for {weight.describe()}")


def packed(weight: Weight, dtype: torch.dtype) -> nn.Module | None:
    """The module that computes a weight packed for x of `dtype`, or None: then it is decoded."""
    if dtype not in HALVES:
        return None
    found = way(weight)
    return None if found.linear is None else Packed(found.form, found.linear, weight.describe())
