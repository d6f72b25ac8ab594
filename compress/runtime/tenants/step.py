"""One forward pass over a batch of several tenants: which rows need what, worked out once for all layers.

Shapes: B rows of a batch, S tokens of a row, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import UnsupportedWeight
from compress.runtime.tenants.layout import Layout
from compress.runtime.tenants.own import OwnOf, computed, holding, per_row
from compress.runtime.tenants.resident import Added, Alike, Group, Resident, alike
from compress.runtime.tenants.rows import Batch, Rows
from compress.runtime.tenants.slots import NOBODY, Stack, table_of


class Step:
    """The tenants of a batch and their rows; reused as long as batches consist of the same rows.

    The results for an input are cached until another input reaches the modules that share it, or the pass ends.
    """

    def __init__(self, tenants: Batch[Resident] | None, size: int, device: torch.device) -> None:
        self.tenants, self.size, self.device = tenants, size, device
        self.kinds: dict[Group, list[Alike]] = {}
        self.results: dict[Group, tuple[Tensor, list[list[Added | None]]]] = {}
        self.slotted: dict[str, dict[Stack, tuple[int, ...]]] = {}
        self.tables: dict[tuple[tuple[int, ...], int], tuple[Tensor, int]] = {}
        self.rowwise: list[tuple[nn.Module, dict[str, Tensor]]] = []

    def each(self) -> Iterator[tuple[Resident, Rows, Sequence[int]]]:
        """Every tenant with its rows."""
        if self.tenants is not None:
            yield from zip(self.tenants.owners, self.tenants.each, self.tenants.numbers, strict=True)

    def added(self, group: Group, number: int, x_BSI: Tensor) -> list[Added | None]:
        """What is added to the output of module `number` of a group; computed for the whole group at its first call."""
        if self.tenants is None:
            return []
        if group not in self.kinds:
            self.kinds[group] = alike(self.tenants, group, self.device)
        known = self.results.get(group)
        if known is None or known[0] is not x_BSI:
            known = self.results[group] = (x_BSI, [tenants.added(x_BSI) for tenants in self.kinds[group]])
        return [each[number] for each in known[1]]

    def stacks(self, name: str) -> dict[Stack, tuple[int, ...]]:
        """The stacks in which tenants have slots for a module, each with the slot of every row."""
        if name not in self.slotted:
            found: dict[Stack, list[int]] = {}
            for tenant, _, numbers in self.each():
                for slot in tenant.slots.get(name, ()):
                    owners = found.setdefault(slot.stack, [NOBODY] * self.size)
                    for row in numbers:
                        owners[row] = slot.number
            self.slotted[name] = {stack: tuple(owners) for stack, owners in found.items()}
        return self.slotted[name]

    def add_stacked(self, name: str, x_BSI: Tensor, y_BSO: Tensor) -> None:
        """Add to y what is stacked for a module; most modules share one segment table."""
        tokens = x_BSI.shape[1]
        for stack, owners in self.stacks(name).items():
            if (owners, tokens) not in self.tables:
                self.tables[owners, tokens] = table_of(owners, tokens, self.device)
            x_NI = x_BSI.reshape(-1, x_BSI.shape[2]).contiguous()
            stack.add(y_BSO.view(-1, y_BSO.shape[2]), x_NI, *self.tables[owners, tokens])

    def stack(self, name: str, module: nn.Module, dimensions: int) -> None:
        """Prepare row-wise tensors, [B, 1, ..., D], for a module whose input has this many dimensions."""
        found: dict[str, list[Tensor]] = {}
        for tenant, _, numbers in self.each():
            for parameter, tensor in tenant.own.get(name, {}).items():
                each = found.setdefault(parameter, [getattr(module, parameter)] * self.size)
                for row in numbers:
                    each[row] = tensor
        self.rowwise.append((module, {parameter: per_row(each, dimensions) for parameter, each in found.items()}))

    @contextmanager
    def running(self) -> Iterator[None]:
        """A context in which modules hold their row-wise tensors; at its end, or on an error, results are dropped."""
        try:
            with ExitStack() as stack:
                for module, tensors in self.rowwise:
                    stack.enter_context(holding(module, tensors))
                yield
        finally:
            self.results.clear()


def linear_hook(current: Callable[[], Step | None], layout: Layout, name: str) -> Any:
    """A forward hook that adds the tenants' differences to the output of a linear layer."""
    group = layout.groups[name]
    number = group.index(name)

    def hook(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        step = current()
        if step is None:
            return
        x = args[0]
        if x.ndim != 3 or len(x) != step.size:
            wanted = f"expected [{step.size}, tokens, features]"
            raise UnsupportedWeight(f"{name} was given an input of shape {tuple(x.shape)}; {wanted}")
        for found in step.added(group, number, x):
            if found is not None:
                found[0].add(output, found[1])
        step.add_stacked(name, x, output)

    return hook


def lookup_hook(current: Callable[[], Step | None], name: str) -> Any:
    """A forward hook that adds the tenants' differences to the rows that an embedding looks up."""

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        step = current()
        for tenant, rows, _ in step.each() if step is not None else ():
            part = tenant.looked_up.get(name)
            if part is not None:
                rows.add(output, part.rows(rows.take(args[0])) * getattr(module, "embed_scale", 1.0))

    return hook


def own_hook(current: Callable[[], Step | None], name: str, ways: Mapping[OwnOf, str]) -> Any:
    """A forward hook that corrects the output of a module for the rows of tenants that replace its tensors.

    An input that all rows share, such as their positions, is repeated for every row first.
    """

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
        step = current()
        if step is None:
            return None
        changed, x = output, args[0]
        for tenant, rows, _ in step.each():
            own = tenant.own.get(name, {})
            way = ways.get((name, *own)) if own else None
            if way == "anew":
                x, changed = each_row(name, x, step.size), each_row(name, changed, step.size)
                rows.put(changed, computed(module, own, rows.take(x)))
            elif way == "additive":
                rows.add(changed, own["bias"].float() - module.get_parameter("bias").float())
        return None if changed is output else changed

    return hook


def each_row(name: str, x: Tensor, size: int) -> Tensor:
    """The input or output of a module for each row of `size`; raises UnsupportedWeight for another number of rows."""
    if len(x) not in (1, size):
        raise UnsupportedWeight(f"{name} was given {tuple(x.shape)}; expected 1 or {size} rows")
    return x if len(x) == size else x.repeat(size, *[1] * (x.ndim - 1))
