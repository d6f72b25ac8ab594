"""A weight expression as plain data and tensors, from which another process can rebuild the same expression.

Unlike the stored form (`pack.py`) it is exact in everything, including values hidden by a mask, and costs nothing: the
tensors are those of the nodes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import Any

from torch import Tensor

from compress.errors import UnsupportedWeight
from compress.weights.expr import Masked, Product, Sum, Weight
from compress.weights.leaves import (
    Codebook,
    Dense,
    Diagonal,
    External,
    Hadamard,
    Nested,
    Permutation,
    Quantized,
    Scaled,
    Signs,
)

NODES = {
    kind.__name__: kind
    for kind in (
        Codebook, Dense, Diagonal, External, Hadamard, Masked, Nested, Permutation, Product, Quantized, Scaled, Signs,
        Sum,
    )
}  # fmt: skip


def taken_apart(weight: Weight, tensors: list[Tensor]) -> dict[str, Any]:
    """The nodes of an expression as plain data; each tensor is appended to `tensors` and named by its index there.

    Raises UnsupportedWeight for a node that is not of this package.
    """
    if NODES.get(type(weight).__name__) is not type(weight):
        raise UnsupportedWeight(f"{weight.describe()} cannot be sent to another process")

    def told(value: Any) -> Any:
        match value:
            case Tensor():
                tensors.append(value)
                return {"tensor": len(tensors) - 1}
            case Weight():
                return taken_apart(value, tensors)
            case tuple():
                return [told(each) for each in value]
            case _:
                return value

    return {"node": type(weight).__name__, **{f.name: told(getattr(weight, f.name)) for f in fields(weight)}}


def put_together(told: Mapping[str, Any], tensors: Sequence[Tensor]) -> Weight:
    """The expression that was passed to `taken_apart`."""

    def made(value: Any) -> Any:
        match value:
            case {"node": _}:  # tested first, because a node may have a field named `tensor`
                return put_together(value, tensors)
            case {"tensor": number}:
                return tensors[number]
            case list():
                return tuple(made(each) for each in value)
            case _:
                return value

    return NODES[told["node"]](**{name: made(value) for name, value in told.items() if name != "node"})
