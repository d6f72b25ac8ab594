"""The interface of a merging method: how each model's change of a tensor is thinned out, and how changes are combined.

A change is D = W - W0, the model's tensor minus the base's, computed in float64 in parts of whole rows, so that a
method never holds more than a few parts besides the tensors themselves. Shape suffixes: R rows, N entries of a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from compress.options import check_options

AT_ONCE = 1 << 16  # entries of a part: about a dozen parts fit a cache, and no allocator maps new pages for one
Sieve = Callable[[Tensor], Tensor]
Scale = Annotated[
    float,
    Field(gt=0, le=100, allow_inf_nan=False, description="factor applied to the merged change (lambda in the papers)"),
]
Density = Annotated[
    float, Field(gt=0, le=1, allow_inf_nan=False, description="share of each change's entries that is kept")
]
Seed = Annotated[int, Field(ge=0, le=2**32 - 1, description="random seed for dropping entries")]


@dataclass(frozen=True, kw_only=True)
class Change:
    """The change that the model with key `model` made to the tensor `name`.

    `base_RN` and `own_RN` are the base's and the model's tensor, both [R, N] in the dtypes of their files.
    """

    name: str
    model: str
    base_RN: Tensor
    own_RN: Tensor

    def part(self, rows: slice) -> Tensor:
        """Some rows of the change, float64."""
        return self.own_RN[rows].double() - self.base_RN[rows].double()

    def magnitudes(self) -> Iterator[Tensor]:
        """|D| in parts, float32, by which entries are compared."""
        for rows in parts(self.base_RN):
            yield magnitude(self.part(rows))

    def generator(self, seed: int) -> torch.Generator:
        """A random generator for this change alone, which is the same whatever else is merged, in whatever order."""
        name = f"{seed}\0{self.model}\0{self.name}"
        return torch.Generator().manual_seed(int.from_bytes(sha256(name.encode()).digest()[:4], "big"))


def parts(matrix_RN: Tensor) -> Iterator[slice]:
    """Slices over the rows of a matrix, with about AT_ONCE entries each."""
    step = max(1, AT_ONCE // max(1, matrix_RN.shape[1]))
    for start in range(0, len(matrix_RN), step):
        yield slice(start, start + step)


def magnitude(change_RN: Tensor) -> Tensor:
    """|D|, float32."""
    return change_RN.abs().float()


@dataclass(frozen=True, kw_only=True)
class Method:
    """A merging method; its fields are its options, which are checked strictly.

    `signed`: weights may be negative. `shared`: the method is a mean, so every tensor needs at least one model with a
    weight above 0.
    """

    name: ClassVar[str]
    signed: ClassVar[bool] = False
    shared: ClassVar[bool] = False

    def __post_init__(self) -> None:
        check_options(self, f"merge.{self.name}")

    def survey(self, models: Mapping[str, Callable[[], Iterator[Tensor]]], size: int) -> dict[str, float]:
        """One number per model that must be known before its first tensor is merged, such as a threshold.

        Each value of `models`, whenever it is called, yields |D| over all tensors of that model in parts, `size`
        entries in total.
        """
        del models, size
        return {}

    def sieve(self, change: Change, known: float | None) -> Sieve:
        """The function that thins out the parts of a change; it is called once with each part, in order.

        `known` is the model's number from `survey`, or None.
        """
        del change, known
        return lambda part_RN: part_RN

    def fuse(self, changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
        """Combine the changes [R, N] of several models into one; their weights are never 0."""
        raise NotImplementedError

    def options(self) -> dict[str, Any]:
        """The options by name."""
        return dict(vars(self))


def total(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_k w_k D_k."""
    summed = weights[0] * changes[0]
    for change, weight in zip(changes[1:], weights[1:], strict=True):
        summed.add_(change, alpha=weight)
    return summed


def elected(changes: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Entry by entry, the weighted mean of the changes with the elected sign: that of sum_k w_k D_k, + if it is 0.

    Source: Yadav et al., "TIES-Merging", NeurIPS 2023, section 3.1, steps 2 and 3; weights and the sign of a zero sum
    as in mergekit.
    """
    positive = total(changes, weights) >= 0
    summed, count = torch.zeros_like(changes[0]), torch.zeros_like(changes[0])
    for change, weight in zip(changes, weights, strict=True):
        agrees = (change != 0) & ((change > 0) == positive)
        summed.add_(torch.where(agrees, change, 0), alpha=weight)
        count.add_(agrees, alpha=weight)
    return torch.where(count > 0, summed / count.where(count > 0, 1), 0)
