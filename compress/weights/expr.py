"""Weight expressions: an immutable tree that denotes one matrix of shape [out, in].

The common interface is `shape dense() linear(x) nbytes() children() describe()` and is kept that small: a node does not
pretend to be a tensor. Combinators are here, leaves in `leaves.py`, the stored form in `pack.py`.
Shape suffixes: O out, I in, T tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields
from functools import reduce
from operator import add

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import UnsupportedWeight
from compress.weights.kept import kept_of


@dataclass(frozen=True, eq=False)
class Weight:
    """One matrix [out, in], however it is represented."""

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in) of the matrix that this denotes."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """The matrix itself, [out, in]; costs its full size."""
        raise NotImplementedError

    def linear(self, x_TI: Tensor) -> Tensor:
        """`x @ dense().T` for x [..., in], in the dtype of x; the reference path, not the fast one."""
        return F.linear(x_TI, self.dense().to(x_TI.dtype))

    def children(self) -> Iterator[Weight]:
        """The sub-expressions, in field order."""
        for field in fields(self):
            value = getattr(self, field.name)
            yield from (v for v in (value if isinstance(value, tuple) else (value,)) if isinstance(v, Weight))

    def nbytes(self) -> int:
        """Bytes of the stored form, exactly as `pack` writes it.

        For an outline the bytes of a mask of which fewer than half the entries are kept are an estimate.
        """
        from compress.weights.pack import packed_bytes  # it matches on every node, so it must import this module

        return packed_bytes(self)

    def describe(self) -> str:
        """A short name for logs and tables, such as `2:4·int4g128 + r64`."""
        return type(self).__name__.lower()

    def __add__(self, other: Weight) -> Weight:
        return Sum((self, other))

    def __matmul__(self, other: Weight) -> Weight:
        return Product(self, other)


@dataclass(frozen=True, eq=False)
class Sum(Weight):
    """The sum of its terms; `linear` applies them one by one and never materialises the sum."""

    terms: tuple[Weight, ...]

    def __post_init__(self) -> None:
        shapes = {term.shape for term in self.terms}  # empty without terms, which is an error too
        if len(shapes) != 1:
            raise UnsupportedWeight(f"a sum needs terms of one shape; got {sorted(shapes)}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.terms[0].shape

    def dense(self) -> Tensor:
        """The terms, added."""
        return reduce(add, (term.dense() for term in self.terms))

    def linear(self, x_TI: Tensor) -> Tensor:
        """The sum of each term applied to x."""
        return reduce(add, (term.linear(x_TI) for term in self.terms))

    def describe(self) -> str:
        """The terms joined by ` + `."""
        return " + ".join(term.describe() for term in self.terms)


@dataclass(frozen=True, eq=False)
class Product(Weight):
    """`left @ right`: low rank, or a factor that transforms the input or the output."""

    left: Weight
    right: Weight

    def __post_init__(self) -> None:
        if self.left.shape[1] != self.right.shape[0]:
            raise UnsupportedWeight(f"a product needs matching inner sizes; got {self.left.shape} @ {self.right.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out of left, in of right)."""
        return self.left.shape[0], self.right.shape[1]

    def dense(self) -> Tensor:
        """The matrix product, in float32 at least, because float16 cannot hold the product of two float16 factors."""
        left, right = self.left.dense(), self.right.dense()
        dtype = torch.promote_types(torch.promote_types(left.dtype, right.dtype), torch.float32)
        return left.to(dtype) @ right.to(dtype)

    def linear(self, x_TI: Tensor) -> Tensor:
        """`right` first, then `left`: two small products instead of one large one."""
        return self.left.linear(self.right.linear(x_TI))

    def describe(self) -> str:
        """`r64` if the inner size is a true rank, `2:4·r64` if the factors also have such masks, else both factors."""
        rank = self.left.shape[1]
        masks = dict.fromkeys(f"{factor.pattern}·" for factor in (self.left, self.right) if isinstance(factor, Masked))
        return (
            f"{''.join(masks)}r{rank}" if rank < min(self.shape) else f"{self.left.describe()}@{self.right.describe()}"
        )


@dataclass(frozen=True, eq=False)
class Masked(Weight):
    """`values` where the mask is True, exactly zero elsewhere; `pattern` names the mask's rule.

    The part of the name after an `@` distinguishes matrices that get different masks by the same rule. `told` is the
    number of kept entries of an outline, whose mask is on the meta device and has no values.
    """

    values: Weight
    mask_OI: Tensor
    pattern: str
    told: int | None = None

    def __post_init__(self) -> None:
        if tuple(self.mask_OI.shape) != self.values.shape:
            raise UnsupportedWeight(f"a mask of {tuple(self.mask_OI.shape)} does not fit values of {self.values.shape}")

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.values.shape

    @property
    def kept(self) -> int:
        """The number of entries that the mask keeps."""
        return kept_of(self.mask_OI) if self.told is None else self.told

    def dense(self) -> Tensor:
        """The values with the masked-out entries exactly 0, even where a value is not finite."""
        return self.values.dense().masked_fill(~self.mask_OI, 0)

    def describe(self) -> str:
        """The pattern, then the values unless they are plain: `2:4·int4g128`."""
        values, rule = self.values.describe(), self.pattern.partition("@")[0]
        return rule if values == "dense" else f"{rule}·{values}"
