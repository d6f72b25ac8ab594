"""Tensors that a tenant replaces (norms, biases, embeddings): how one module computes with a different one per row.

There are three ways. `rowwise`: the module accepts one tensor per row in place of its parameter (norms). `additive`:
the output changes by as much as the tensor does (biases). `anew`: the module computes the rows of a tenant again with
the tenant's tensors (embeddings, heads). The first two are verified on random numbers before they are used; the third
is always correct. Shapes: B rows of a batch, D the tensor's own dimensions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from compress.runtime.linear import StoredWeight
from compress.runtime.tenants.layout import PROBE, Given

OwnOf = tuple[str, ...]  # the name of a module, then those of its parameters that a tenant replaces
Tensors = Mapping[str, Tensor]  # parameter -> tensor
SAME = 1e-5  # relative difference allowed between two ways in float32; scaled up for coarser dtypes


@contextmanager
def holding(module: nn.Module, tensors: Tensors) -> Iterator[None]:
    """A context in which the module computes with these tensors in place of its parameters."""
    before = {name: module._parameters[name] for name in tensors}
    module._parameters.update(tensors)  # type: ignore[arg-type]  # a plain tensor computes as a parameter does
    try:
        yield
    finally:
        module._parameters.update(before)


def way_of(module: nn.Module, parameters: Sequence[str], given: Given) -> str:
    """The cheapest way (`rowwise`, `additive` or `anew`) that is correct for these parameters of a module."""
    held = {name: module._parameters[name] for name in parameters}
    if not given.real or given.shape[0] != PROBE[0] or any(t is None or t.ndim != 1 for t in held.values()):
        return "anew"
    known = {name: tensor.detach() for name, tensor in held.items() if tensor is not None}
    generator = torch.Generator().manual_seed(0)
    dtype, device = next(iter(known.values())).dtype, next(iter(known.values())).device

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    x = random(*given.shape)
    each = [{name: tensor + random(*tensor.shape) for name, tensor in known.items()} for _ in x]
    with torch.inference_mode():
        want = torch.cat([computed(module, own, row) for own, row in zip(each, x.split(1), strict=True)])
        stacked = {name: per_row([own[name] for own in each], len(given.shape)) for name in known}
        vectors = not isinstance(module, StoredWeight) and all(
            p is None or p.ndim == 1 for p in module._parameters.values()
        )  # a matrix product could broadcast stacked biases in an unintended way
        if vectors and close(tried(module, stacked, x), want):
            return "rowwise"
        moved = [own["bias"] - known["bias"] for own in each] if list(known) == ["bias"] else []
        if moved and close(module.forward(x) + per_row(moved, len(given.shape)), want):
            return "additive"
    return "anew"


def computed(module: nn.Module, tensors: Tensors, x: Tensor) -> Tensor:
    """The module's output for x with these tensors, without running its hooks."""
    with holding(module, tensors):
        y: Tensor = module.forward(x)
    return y


def tried(module: nn.Module, tensors: Tensors, x: Tensor) -> Tensor | None:
    """The same, or None if the module cannot compute with these tensors."""
    try:
        return computed(module, tensors, x)
    except (RuntimeError, ValueError, TypeError):
        return None


def close(got: Tensor | None, want: Tensor) -> bool:
    """Whether two results are equal up to rounding."""
    if got is None or got.shape != want.shape:
        return False
    error = (got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-30)
    return float(error) <= SAME * max(1.0, torch.finfo(want.dtype).eps / torch.finfo(torch.float32).eps)


def per_row(each: Sequence[Tensor], dimensions: int) -> Tensor:
    """Stack one tensor [D] per row to [B, 1, ..., D] with this many dimensions."""
    stacked_BD = torch.stack(list(each))
    return stacked_BD.view(len(each), *(1,) * (dimensions - 2), -1)
