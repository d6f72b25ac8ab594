"""Converts a weight expression to the form in which it stays in memory, where possible one that is multiplied packed.

An expression without a form of its own is kept in its stored form (`pack`) and unpacked at every call. All products are
computed in float32. Shapes: N tokens, O out, I in, K tenants.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.runtime.tenants.coded import PIECES, Codes
from compress.runtime.tenants.part import Part, apart
from compress.weights import Dense, Masked, Product, Quantized, Signs, Sum, Weight, pack, specify, unpack

LARGER = 1.5  # how many times the bytes of the stored form codes without their mask may take


@dataclass(frozen=True, eq=False)
class Plain(Part):
    """A matrix in the dtype it is stored in."""

    data: Tensor

    def tensors(self) -> Sequence[Tensor]:
        """The matrix."""
        return (self.data,)

    @property
    def kind(self) -> Hashable:
        """Shape and dtype."""
        return "plain", self.data.shape, self.data.dtype

    @classmethod
    def together(cls, parts: Sequence[Plain], x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """One batched product if all tenants have equally many tokens, otherwise one product per tenant."""
        x_NI = x_NI.float()
        if len(parts) > 1 and min(counts) == max(counts):
            d_KIO = torch.stack([part.data for part in parts]).float().transpose(1, 2)
            return torch.bmm(x_NI.view(len(parts), counts[0], -1), d_KIO).flatten(0, 1)
        y = [F.linear(x, part.data.float()) for x, part in zip(apart(x_NI, counts), parts, strict=True)]
        return torch.cat(y) if len(y) > 1 else y[0]

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix."""
        return self.data[ids].float()

    def describe(self) -> str:
        """`plain`."""
        return "plain"


@dataclass(frozen=True, eq=False)
class Chain(Part):
    """The product of two factors; the right one is applied first."""

    left: Part
    right: Part
    inputs: int

    def tensors(self) -> Sequence[Tensor]:
        """The tensors of both factors."""
        return (*self.left.tensors(), *self.right.tensors())

    @property
    def kind(self) -> Hashable:
        """The kinds of both factors."""
        return "chain", self.left.kind, self.right.kind

    @classmethod
    def together(cls, parts: Sequence[Chain], x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """Two products, one with each factor."""
        inner = parts[0].right.together([part.right for part in parts], x_NI, counts)
        return parts[0].left.together([part.left for part in parts], inner, counts)

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the left factor times the right factor, which is decoded for this."""
        first = next(iter(self.right.tensors()))
        return self.left.rows(ids) @ self.right.linear(torch.eye(self.inputs, device=first.device)).T

    def describe(self) -> str:
        """`plain @ plain`."""
        return f"{self.left.describe()} @ {self.right.describe()}"


@dataclass(frozen=True, eq=False)
class Total(Part):
    """The sum of parts."""

    terms: tuple[Part, ...]

    def tensors(self) -> Sequence[Tensor]:
        """The tensors of all terms."""
        return [tensor for term in self.terms for tensor in term.tensors()]

    @property
    def kind(self) -> Hashable:
        """The kinds of all terms."""
        return "total", *(term.kind for term in self.terms)

    @classmethod
    def together(cls, parts: Sequence[Total], x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """The sum of the products with each term."""
        each = zip(*(part.terms for part in parts), strict=True)
        y_NO: Tensor = reduce(add, (terms[0].together(terms, x_NI, counts) for terms in each))
        return y_NO

    def rows(self, ids: Tensor) -> Tensor:
        """The sum of the rows of all terms."""
        found: Tensor = reduce(add, (term.rows(ids) for term in self.terms))
        return found

    def describe(self) -> str:
        """The terms joined by ` + `."""
        return " + ".join(term.describe() for term in self.terms)


@dataclass(frozen=True, eq=False)
class Stored(Part):
    """Any expression in its stored form, unpacked at every call: always correct, but slow."""

    spec: dict[str, Any]
    held: dict[str, Tensor]
    name: str

    def tensors(self) -> Sequence[Tensor]:
        """The stored tensors."""
        return list(self.held.values())

    @property
    def kind(self) -> Hashable:
        """The shape alone, since the parts of different tenants are computed one by one anyway."""
        return "stored", *self.spec["shape"]

    @classmethod
    def together(cls, parts: Sequence[Stored], x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """The products of the unpacked expressions, one tenant at a time."""
        each = zip(apart(x_NI.float(), counts), parts, strict=True)
        return torch.cat([unpack(part.spec, part.held).linear(x) for x, part in each])

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of the matrix, all of which is decoded for this."""
        return unpack(self.spec, self.held).dense().float()[ids]

    def describe(self) -> str:
        """`unpacked 2:4·int4g64`."""
        return f"unpacked {self.name}"


def undropped(weight: Weight, values: Quantized, mask_OI: Tensor) -> Quantized | None:
    """The same matrix without its mask: pruned entries get the code that decodes to zero.

    None if that would be much larger than the masked form (LARGER), or if no code decodes to exactly zero.
    """
    zero = values.zero
    if values.bits not in PIECES or (zero is not None and zero.is_floating_point()):
        return None
    filled = replace(values, codes=torch.where(mask_OI, values.codes, zeros_of(values)))
    return filled if filled.nbytes() <= LARGER * weight.nbytes() else None


def zeros_of(values: Quantized) -> Tensor:
    """For each entry, the code that decodes to zero."""
    if values.zero is None:
        return torch.full_like(values.codes, 2 ** (values.bits - 1))
    return values.zero.repeat_interleave(values.group, 1).to(values.codes.dtype).expand_as(values.codes)


def resident(weight: Weight) -> Part:
    """The expression in the form in which it stays in memory; it shares no tensor with the expression.

    Quantized values under a mask that keeps about half of them stay without the mask, which takes more memory and is
    many times faster. Raises UnsupportedWeight for an expression that has no stored form.
    """
    match weight:
        case Dense(data):
            return Plain(data.clone())
        case Signs(positive, scale):
            return Codes.of(positive.byte(), 1, scale * 2, 0.5)
        case Quantized(codes, scale, zero, bits) if bits in PIECES:
            return Codes.of(codes, bits, scale.clone(), 2.0 ** (bits - 1) if zero is None else zero.clone())
        case Masked(Quantized() as values, mask_OI, _) if (filled := undropped(weight, values, mask_OI)) is not None:
            return resident(filled)
        case Product(left, right):
            return Chain(resident(left), resident(right), right.shape[1])
        case Sum(terms):
            return Total(tuple(resident(term) for term in terms))
        case _:
            held = {path: tensor.clone() for path, tensor in pack(weight).items()}
            return Stored(specify(weight), held, weight.describe())
