"""Signs and low-rank factors of all tenants on a GPU, stacked by site: each tenant has a slot, and one launch adds all.

A tenant that is unloaded frees its slots for others. Stacks are reallocated only when a tenant is loaded, never for a
request: with a budget, a stack then has exactly one slot for each of its tenants; without one, free slots stay. Ranks
are padded with zeros to the largest rank, rounded up to a multiple of 16. Factors are rounded to the dtype of the base;
scales are float32.
Shapes: T slots, O out, I in, K rank, N tokens of all rows; words are those of `compress_kernels.formats`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from math import prod
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError
from compress.weights import Dense, Product, Signs, Sum, Weight
from compress_kernels import dispatch, formats, segments
from compress_kernels.given import HALVES

RANKS = 16  # ranks are padded to a multiple of this, the depth of one tensor-core instruction
NOBODY = -1  # the slot of a row whose tenant has no slot in this stack


def on_gpu(like: Tensor) -> bool:
    """Whether the kernels can compute with a model that has this tensor: 16-bit floats, on a device they run on."""
    return like.dtype in HALVES and not dispatch.missing(like.device)


def forms(tree: Mapping[str, Any]) -> list[tuple[str, int]] | None:
    """The form and rank of each term of a weight, given its specification; None if one of them cannot be stacked."""
    match tree:
        case {"kind": "signs"}:
            return [("signs", 0)]
        case {"kind": "product", "left": {"kind": "dense"}, "right": {"kind": "dense", "shape": [rank, _]}}:
            return [("low rank", int(rank))]
        case {"kind": "sum", "terms": terms}:
            found = [forms(term) for term in terms]
            return None if None in found else [form for each in found for form in each or []]
        case _:
            return None


def terms_of(weight: Weight) -> Iterator[Weight]:
    """The terms of a weight, in the order of `forms`."""
    match weight:
        case Sum(terms):
            for term in terms:
                yield from terms_of(term)
        case _:
            yield weight


@dataclass(eq=False)
class Slot:
    """The place of a tenant in a stack; `number` may change when other tenants are loaded."""

    stack: Stack
    number: int
    rank: int

    def describe(self) -> str:
        """`stacked signs`."""
        return f"stacked {self.stack.form}" + (f" {self.rank}" if self.rank else "")


class Stack:
    """One term of the difference at one site, [out, in], for all tenants that have such a term."""

    form = ""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        (self.outputs, self.inputs), self.dtype, self.device = shape, dtype, device
        self.slots: list[Slot | None] = []
        self.rank = 0
        self.held: list[Tensor] = []

    def shapes(self, rank: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """The shapes and dtypes of the tensors of one slot."""
        raise NotImplementedError

    def write(self, number: int, term: Weight) -> None:
        """Write a term into a slot that has been zeroed; raises ArtifactError if the term is of another form."""
        raise NotImplementedError

    def add(self, y_NO: Tensor, x_NI: Tensor, table: Tensor, tile: int) -> None:
        """Add to y the products of x with the terms of the tenants whose segments `table` lists."""
        raise NotImplementedError

    def bytes_for(self, ranks: Sequence[int]) -> int:
        """Bytes of a stack for tenants of these ranks, of which there is at least one."""
        each = self.shapes(formats.padded(max(ranks), RANKS))
        return len(ranks) * sum(prod(shape) * dtype.itemsize for shape, dtype in each)

    def nbytes(self) -> int:
        """Bytes held, including free slots."""
        return sum(int(tensor.nbytes) for tensor in self.held)

    def fit(self, ranks: Sequence[int], *, exact: bool) -> None:
        """Make room for new tenants of these ranks; with `exact`, without leaving further free slots."""
        taken = [slot for slot in self.slots if slot is not None]
        rank = formats.padded(max([*ranks, *(slot.rank for slot in taken)], default=0), RANKS)
        size = len(taken) + len(ranks)
        if not exact:
            rank, size = max(rank, self.rank), max(size, len(self.slots))
        if (rank, size) == (self.rank, len(self.slots)):
            return
        before, self.held = self.held, [
            torch.zeros(size, *shape, dtype=dtype, device=self.device) for shape, dtype in self.shapes(rank)
        ]  # fmt: skip
        for old, new in zip(before, self.held, strict=False):
            both = tuple(slice(min(pair)) for pair in zip(old.shape[1:], new.shape[1:], strict=True))
            for number, slot in enumerate(taken):
                new[number][both] = old[slot.number][both]
        for number, slot in enumerate(taken):
            slot.number = number
        self.rank, self.slots = rank, [*taken, *[None] * (size - len(taken))]

    def put(self, term: Weight, rank: int) -> Slot:
        """Write a tenant's term into a free slot, which `fit` must have provided."""
        slot = Slot(self, self.slots.index(None), rank)
        for tensor in self.held:
            tensor[slot.number].zero_()
        self.write(slot.number, term)
        self.slots[slot.number] = slot
        return slot

    def free(self, slot: Slot) -> None:
        """Mark a slot as free."""
        self.slots[slot.number] = None


class SignStack(Stack):
    """A stack of signs: words [T, B, R, P] with one bit per weight, and scales [T, O]."""

    form = "signs"

    def shapes(self, rank: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """The shapes of words and scales; `rank` is ignored."""
        blocks, rows = -(-self.inputs // formats.block(1)), formats.padded(self.outputs, formats.ROWS)
        return [((blocks, rows, formats.PLACES), torch.int16), ((self.outputs,), torch.float32)]

    def write(self, number: int, term: Weight) -> None:
        """Pack the signs on the device."""
        match term:
            case Signs(positive, scale):
                words, scales = self.held
                words[number] = formats.pack_words(positive.to(self.device), 1)
                scales[number] = scale[:, 0].to(self.device)
            case _:
                raise ArtifactError(f"{term.describe()} is stored, but the specification says signs")

    def add(self, y_NO: Tensor, x_NI: Tensor, table: Tensor, tile: int) -> None:
        """One launch."""
        segments.sign_segments(y_NO, x_NI, *self.held, table, tile)


class FactorStack(Stack):
    """A stack of low-rank products: left factors [T, O, K] and right factors [T, K, I]."""

    form = "low rank"

    def shapes(self, rank: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """The shapes of both factors."""
        return [((self.outputs, rank), self.dtype), ((rank, self.inputs), self.dtype)]

    def write(self, number: int, term: Weight) -> None:
        """Write both factors; entries beyond the tenant's rank stay zero."""
        match term:
            case Product(Dense(left_OK), Dense(right_KI)):
                left, right = self.held
                left[number, :, : left_OK.shape[1]] = left_OK.to(self.device)
                right[number, : right_KI.shape[0]] = right_KI.to(self.device)
            case _:
                raise ArtifactError(f"{term.describe()} is stored, but the specification says two factors")

    def add(self, y_NO: Tensor, x_NI: Tensor, table: Tensor, tile: int) -> None:
        """One launch for each factor."""
        segments.low_rank_segments(y_NO, x_NI, *self.held, table, tile)


STACKS: dict[str, type[Stack]] = {"signs": SignStack, "low rank": FactorStack}
Seats = tuple[tuple[Stack, int], ...]  # the stack of each term of a site, and its rank


@dataclass(frozen=True, eq=False)
class Need:
    """The memory that a tenant needs: slots by site, and `rest`, the bytes of everything that is not stacked."""

    seats: Mapping[str, Seats] = field(default_factory=dict)
    rest: int = 0

    def all(self) -> Iterator[tuple[Stack, int]]:
        """The stack and rank of every slot."""
        return (seat for seats in self.seats.values() for seat in seats)


class Stacks:
    """The stacks of all sites of a model with this dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.found: dict[tuple[str, str, int], Stack] = {}

    def seats(self, site: str, shape: tuple[int, int], tree: Mapping[str, Any]) -> Seats:
        """The stack and rank of each term of a difference, making stacks as needed; empty if one cannot be stacked."""
        each, found = forms(tree) or [], []
        for number, (form, rank) in enumerate(each):
            key = (site, form, [form for form, _ in each[:number]].count(form))
            if key not in self.found:
                self.found[key] = STACKS[form](shape, self.dtype, self.device)
            found.append((self.found[key], rank))
        return tuple(found)

    def nbytes(self) -> int:
        """Bytes held by all stacks."""
        return sum(stack.nbytes() for stack in tuple(self.found.values()))

    def bytes_for(self, needs: Iterable[Need]) -> int:
        """Bytes that the stacks would take for these tenants alone."""
        return sum(stack.bytes_for(ranks) for stack, ranks in ranks_of(needs).items())

    def fit(self, newcomers: Sequence[Need], *, exact: bool) -> None:
        """Make room for these tenants; with `exact`, also release unused slots."""
        ranks = ranks_of(newcomers)
        for stack in self.found.values():
            stack.fit(ranks.get(stack, []), exact=exact)


def ranks_of(needs: Iterable[Need]) -> dict[Stack, list[int]]:
    """The ranks that these tenants need in each stack."""
    ranks: dict[Stack, list[int]] = {}
    for need in needs:
        for stack, rank in need.all():
            ranks.setdefault(stack, []).append(rank)
    return ranks


def table_of(owners: Sequence[int], tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """The table of segments for a batch whose rows belong to these slots, and the tile length it was made for."""
    runs = [(slot, tokens * len(list(rows))) for slot, rows in groupby(owners)]
    longest = max(count for slot, count in runs if slot != NOBODY)
    tile = next((tile for tile in segments.TILES if tile >= longest), segments.TILES[-1])
    table = segments.table([count for _, count in runs], [slot for slot, _ in runs], tile)
    return table[table[:, 2] != NOBODY].to(device), tile
