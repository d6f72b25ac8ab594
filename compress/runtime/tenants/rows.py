"""Which rows of a batch belong to which tenant; ordered by tenant once, for all layers of a step.

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
    """Rows of a batch in some order: a slice if they are consecutive, otherwise a tensor of their indices."""

    index: slice | Tensor

    @staticmethod
    def of(numbers: Sequence[int], device: torch.device) -> Rows:
        """The rows with these indices, of which there is at least one."""
        first = numbers[0]
        if list(numbers) == list(range(first, first + len(numbers))):
            return Rows(slice(first, first + len(numbers)))
        return Rows(torch.tensor(numbers, device=device))

    def take(self, x: Tensor) -> Tensor:
        """These rows of x; a view if they are consecutive."""
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
    """The tenants of a batch and their rows.

    `numbers` holds the row indices of each tenant, `each` the same as `Rows`, and `rows` all of them, tenant by tenant.
    """

    owners: tuple[Owner, ...]
    numbers: tuple[tuple[int, ...], ...]
    rows: Rows
    each: tuple[Rows, ...]

    @staticmethod
    def of(numbers: Mapping[Owner, Sequence[int]], device: torch.device) -> Batch[Owner]:
        """A batch from the row indices of each tenant, in rising order; there must be at least one tenant."""
        return Batch(
            tuple(numbers),
            tuple(tuple(own) for own in numbers.values()),
            Rows.of([row for own in numbers.values() for row in own], device),
            tuple(Rows.of(own, device) for own in numbers.values()),
        )
