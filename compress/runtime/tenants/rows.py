"""Whose the rows of a batch are: sorted by tenant once, so that all layers find each tenant's tokens together.

Shapes: B rows of a batch, n of them of any tenant, S tokens of a row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

Owner = TypeVar("Owner")


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows of a batch, in some order: a slice where they lie together, else their numbers."""

    index: slice | Tensor

    @staticmethod
    def of(numbers: Sequence[int], device: torch.device) -> Rows:
        """These rows."""
        first = numbers[0]
        if list(numbers) == list(range(first, first + len(numbers))):
            return Rows(slice(first, first + len(numbers)))
        return Rows(torch.tensor(numbers, device=device))

    def take(self, x: Tensor) -> Tensor:
        """These rows of x; a view of it where they lie together."""
        return x[self.index] if isinstance(self.index, slice) else x.index_select(0, self.index)

    def put(self, into: Tensor, y: Tensor) -> None:
        """Write y to these rows."""
        if isinstance(self.index, slice):
            into[self.index] = y
        else:
            into.index_copy_(0, self.index, y.to(into.dtype))

    def add(self, into: Tensor, y: Tensor) -> None:
        """Add y to these rows, rounded once."""
        if len(y) == len(into) and isinstance(self.index, slice):
            into.add_(y)
        elif isinstance(self.index, slice):
            into[self.index].add_(y)
        else:
            self.put(into, self.take(into) + y)


@dataclass(frozen=True, eq=False)
class Batch(Generic[Owner]):
    """Tenants, the numbers of their rows, and all these rows in the order of the tenants."""

    owners: tuple[Owner, ...]
    numbers: tuple[tuple[int, ...], ...]
    rows: Rows
    each: tuple[Rows, ...]

    @staticmethod
    def of(numbers: Mapping[Owner, Sequence[int]], device: torch.device) -> Batch[Owner]:
        """The rows of each tenant, rising; there is one at least."""
        return Batch(
            tuple(numbers),
            tuple(tuple(own) for own in numbers.values()),
            Rows.of([row for own in numbers.values() for row in own], device),
            tuple(Rows.of(own, device) for own in numbers.values()),
        )
