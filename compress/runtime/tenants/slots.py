"""Signs and low ranks of all tenants on a GPU, stacked by site: a tenant has a slot, and one launch adds what all have.

A tenant that leaves frees its slots for the next. Memory moves only when a tenant is loaded, never for a request: under
a budget a stack then has a slot for each of its tenants and none more, else free ones stay. Ranks are filled with zeros
up to the largest, a multiple of 16; factors are rounded to the dtype of the base, scales are float32.
Shapes: T slots, O out, I in, K rank, N tokens of all rows; words as `compress_kernels.formats` has them.
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

RANKS = 16  # ranks are padded to a multiple of this, a step of a tensor core
NOBODY = -1  # the slot of a row that differs in nothing here


def on_gpu(like: Tensor) -> bool:
    """Whether the model that has this tensor is computed by kernels, which take halves."""
    return like.dtype in HALVES and not dispatch.missing(like.device)


def forms(tree: Mapping[str, Any]) -> list[tuple[str, int]] | None:
    """The form and rank of each term of a specified weight, or None if one of them cannot be stacked."""
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
    """The same terms of the weight itself."""
    match weight:
        case Sum(terms):
            for term in terms:
                yield from terms_of(term)
        case _:
            yield weight


@dataclass(eq=False)
class Slot:
    """The place of a tenant in a stack; the number changes when tenants are loaded."""

    stack: Stack
    number: int
    rank: int

    def describe(self) -> str:
        """`stacked signs`."""
        return f"stacked {self.stack.form}" + (f" {self.rank}" if self.rank else "")


class Stack:
    """One term of the differences of one site, [out, in], of all tenants that have it."""

    form = ""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> None:
        (self.outputs, self.inputs), self.dtype, self.device = shape, dtype, device
        self.slots: list[Slot | None] = []
        self.rank = 0
        self.held: list[Tensor] = []

    def shapes(self, rank: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """What one slot holds."""
        raise NotImplementedError

    def write(self, number: int, term: Weight) -> None:
        """Fill a slot that is zero."""
        raise NotImplementedError

    def add(self, y_NO: Tensor, x_NI: Tensor, table: Tensor, tile: int) -> None:
        """Add to y what the tenants of the segments have."""
        raise NotImplementedError

    def bytes_for(self, ranks: Sequence[int]) -> int:
        """Bytes of slots for tenants of these ranks, one at least, together."""
        each = self.shapes(formats.padded(max(ranks), RANKS))
        return len(ranks) * sum(prod(shape) * dtype.itemsize for shape, dtype in each)

    def nbytes(self) -> int:
        """Bytes that are held, free slots included."""
        return sum(int(tensor.nbytes) for tensor in self.held)

    def fit(self, ranks: Sequence[int], *, exact: bool) -> None:
        """Make room for newcomers of these ranks; with `exact` for nobody else."""
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
        """Give a tenant a free slot, for which there is room."""
        slot = Slot(self, self.slots.index(None), rank)
        for tensor in self.held:
            tensor[slot.number].zero_()
        self.write(slot.number, term)
        self.slots[slot.number] = slot
        return slot

    def free(self, slot: Slot) -> None:
        """Let another tenant have a slot."""
        self.slots[slot.number] = None


class SignStack(Stack):
    """Words [T, B, R, P] of one bit a weight, and a scale for each output."""

    form = "signs"

    def shapes(self, rank: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Words and scales."""
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
                raise ArtifactError(f"{term.describe()} is stored where signs are announced")

    def add(self, y_NO: Tensor, x_NI: Tensor, table: Tensor, tile: int) -> None:
        """One launch."""
        segments.sign_segments(y_NO, x_NI, *self.held, table, tile)


class FactorStack(Stack):
    """Left factors [T, O, K] and right ones [T, K, I]."""

    form = "low rank"

    def shapes(self, rank: int) -> list[tuple[tuple[int, ...], torch.dtype]]:
        """Both factors."""
        return [((self.outputs, rank), self.dtype), ((rank, self.inputs), self.dtype)]

    def write(self, number: int, term: Weight) -> None:
        """Ranks beyond those of a tenant stay zero."""
        match term:
            case Product(Dense(left_OK), Dense(right_KI)):
                left, right = self.held
                left[number, :, : left_OK.shape[1]] = left_OK.to(self.device)
                right[number, : right_KI.shape[0]] = right_KI.to(self.device)
            case _:
                raise ArtifactError(f"{term.describe()} is stored where two factors are announced")

    def add(self, y_NO: Tensor, x_NI: Tensor, table: Tensor, tile: int) -> None:
        """One launch for each factor."""
        segments.low_rank_segments(y_NO, x_NI, *self.held, table, tile)


STACKS: dict[str, type[Stack]] = {"signs": SignStack, "low rank": FactorStack}
Seats = tuple[tuple[Stack, int], ...]  # the stack of each term of a site, and its rank


@dataclass(frozen=True, eq=False)
class Need:
    """What a tenant takes: slots by site, and stored bytes beside them."""

    seats: Mapping[str, Seats] = field(default_factory=dict)
    rest: int = 0

    def all(self) -> Iterator[tuple[Stack, int]]:
        """The stacks and ranks of all sites."""
        return (seat for seats in self.seats.values() for seat in seats)


class Stacks:
    """The stacks of all sites of a model of this dtype."""

    def __init__(self, dtype: torch.dtype, device: torch.device) -> None:
        self.dtype, self.device = dtype, device
        self.found: dict[tuple[str, str, int], Stack] = {}

    def seats(self, site: str, shape: tuple[int, int], tree: Mapping[str, Any]) -> Seats:
        """Where the terms of a difference go; none if one cannot be stacked."""
        each, found = forms(tree) or [], []
        for number, (form, rank) in enumerate(each):
            key = (site, form, [form for form, _ in each[:number]].count(form))
            if key not in self.found:
                self.found[key] = STACKS[form](shape, self.dtype, self.device)
            found.append((self.found[key], rank))
        return tuple(found)

    def nbytes(self) -> int:
        """Bytes that all stacks hold."""
        return sum(stack.nbytes() for stack in tuple(self.found.values()))

    def bytes_for(self, needs: Iterable[Need]) -> int:
        """Bytes of stacks made for these tenants alone."""
        return sum(stack.bytes_for(ranks) for stack, ranks in ranks_of(needs).items())

    def fit(self, newcomers: Sequence[Need], *, exact: bool) -> None:
        """Make room for these tenants; with `exact`, give back what nobody uses."""
        ranks = ranks_of(newcomers)
        for stack in self.found.values():
            stack.fit(ranks.get(stack, []), exact=exact)


def ranks_of(needs: Iterable[Need]) -> dict[Stack, list[int]]:
    """The ranks of all tenants of each stack."""
    ranks: dict[Stack, list[int]] = {}
    for need in needs:
        for stack, rank in need.all():
            ranks.setdefault(stack, []).append(rank)
    return ranks


def table_of(owners: Sequence[int], tokens: int, device: torch.device) -> tuple[Tensor, int]:
    """The segments of the tokens of a batch, of which each row is of the tenant of a slot, and their longest length."""
    runs = [(slot, tokens * len(list(rows))) for slot, rows in groupby(owners)]
    longest = max(count for slot, count in runs if slot != NOBODY)
    tile = next((tile for tile in segments.TILES if tile >= longest), segments.TILES[-1])
    table = segments.table([count for _, count in runs], [slot for slot, _ in runs], tile)
    return table[table[:, 2] != NOBODY].to(device), tile
