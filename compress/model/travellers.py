"""Batches of token windows on their way through a model: their hidden states, and what each block is called with.

Windows of a batch are equally long, so there is no padding and none can enter a statistic. Hidden states may be kept
on disk between blocks; only one batch is then in memory. Each state is a file of its own, so that one a journal names
stays whole while the next is written. A batch that does not fit into memory goes through a block in parts, half as
large each time, and so does every batch after it. Shape suffixes: B batch, T tokens, D hidden, N windows.
"""

from __future__ import annotations

import gc
import sys
from collections import UserDict
from collections.abc import Callable, Iterable, Iterator, MutableMapping
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import CalibrationError, out_of_memory
from compress.model.memory import give_back, lasting, passing

BATCH_TOKENS = 8192  # a forward on a GPU: with 4096 Python took longer to launch it than the GPU to compute it
CPU_TOKENS = 1024  # on a CPU products are no slower with so few rows, and what lies between them stays near the cache
KEPT = 16  # different recorded tensors of one shape that are compared before another is kept

Call = tuple[tuple[Any, ...], dict[str, Any]]
T = TypeVar("T")


def tokens_at_once(device: torch.device) -> int:
    """The tokens of a forward, about."""
    return CPU_TOKENS if device.type == "cpu" else BATCH_TOKENS


def batched(windows: Iterable[Tensor], tokens: int, most: int | None = None) -> list[Tensor]:
    """Token windows [N, T], one tensor for each length, in batches of `most`, or of about so many tokens."""
    return [
        batch for ids_NT in windows if len(ids_NT) for batch in ids_NT.split(most or max(1, tokens // ids_NT.shape[1]))
    ]


def unpadded(ids_NT: Tensor, mask_NT: Tensor | None) -> list[Tensor]:
    """The windows without their padding, one tensor [N, T] for each length.

    Raises CalibrationError if a window is empty, or if what is left of it is not in one piece.
    """
    if mask_NT is None:
        return [ids_NT]
    if mask_NT.shape != ids_NT.shape:
        raise CalibrationError(f"a mask of {tuple(mask_NT.shape)} does not fit windows of {tuple(ids_NT.shape)}")
    rows: dict[int, list[Tensor]] = {}
    for ids_T, mask_T in zip(ids_NT, mask_NT.bool(), strict=True):
        places = mask_T.nonzero().flatten()
        if not len(places) or int(places[-1] - places[0]) + 1 != len(places):
            raise CalibrationError("a window is all padding, or has padding inside")
        rows.setdefault(len(places), []).append(ids_T[mask_T])
    return [torch.stack(same) for same in rows.values()]


class Fit:
    """How many windows go through a block at once: as many as a batch has, until memory runs out."""

    def __init__(self) -> None:
        self.most = sys.maxsize
        self.tell: Callable[[int], None] = lambda windows: None

    @property
    def halved(self) -> bool:
        """Whether memory ran out."""
        return self.most < sys.maxsize

    def halve(self, windows: int) -> None:
        """So many were too many."""
        self.most = (windows + 1) // 2
        gc.collect()  # an exception may lie in a circle with the frames it came through, and their tensors
        give_back()
        self.tell(self.most)


class Travellers:
    """A batch of token windows on its way; with `store`, its hidden state lies in a file of that name and a number.

    `kept` is a file that must stay, whatever becomes of the batch. `again` gives what blocks are called with for some
    of the windows; without it they cannot be parted.
    """

    def __init__(
        self,
        ids_BT: Tensor,
        hidden_BTD: Tensor,
        calls: list[Call],
        store: Path | None = None,
        fit: Fit | None = None,
        again: Callable[[Tensor], list[Call]] | None = None,
    ) -> None:
        self.ids_BT, self.calls, self.store = ids_BT, calls, store
        self.fit, self.again = fit or Fit(), again
        self.parted: dict[tuple[int, int], list[Call]] = {}
        self.windows = slice(0, len(ids_BT))  # of a part, which of the batch's they are
        self.file: Path | None = None
        self.kept: Path | None = None
        self.sha256, self.turn = "", 0
        self.hidden_BTD = hidden_BTD

    @property
    def hidden_BTD(self) -> Tensor:
        """The hidden state [B, T, D]."""
        if self.file is None:
            return self._hidden
        return read_raw(self.file, self._hidden.dtype, self._hidden.shape).to(self.device)

    @hidden_BTD.setter
    def hidden_BTD(self, hidden_BTD: Tensor) -> None:
        self.device, hidden_BTD = hidden_BTD.device, hidden_BTD.contiguous()  # as it would be read back
        if self.store is not None:
            before, self.turn = self.file, self.turn + 1
            self.file = self.store.with_name(f"{self.store.name}.{self.turn}")
            raw = hidden_BTD.cpu().reshape(-1).view(torch.uint8).numpy().data
            self.sha256 = sha256(raw).hexdigest()
            with self.file.open("wb") as file:  # not `tofile`: it loses the reason when a disk is full
                file.write(raw)
            if before is not None and before != self.kept:
                before.unlink()
            hidden_BTD = torch.empty_like(hidden_BTD, device="meta")
        self._hidden = hidden_BTD if self.again is None else lasting(hidden_BTD)  # a part does not last

    @property
    def dtype(self) -> torch.dtype:
        """That of the hidden state."""
        return self._hidden.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """That of the hidden state."""
        return tuple(self._hidden.shape)

    @property
    def nbytes(self) -> int:
        """Bytes of the hidden state."""
        return int(self._hidden.nbytes)

    def forget(self) -> None:
        """Remove what lies on disk."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def carried(self) -> dict[str, Tensor]:
        """What blocks have left in the mappings they are called with, for blocks behind them, by place and key."""
        return {
            f"{i}.{key}.{j}": tensor
            for i, left in enumerate(mappings(self.calls))
            for key, value in left.items()
            for j, tensor in enumerate(value)
        }

    def carry(self, left: dict[str, Tensor]) -> None:
        """Put back what `carried` gave: each entry a tuple of tensors, as blocks leave it."""
        places = list(mappings(self.calls))
        found: dict[tuple[int, str], dict[int, Tensor]] = {}
        for name, tensor in left.items():
            place, _, rest = name.partition(".")
            key, _, number = rest.rpartition(".")
            found.setdefault((int(place), key), {})[int(number)] = tensor.to(self.device)
        for (i, key), tensors in found.items():
            places[i][key] = tuple(tensors[j] for j in sorted(tensors))

    @property
    def opaque(self) -> str:
        """The type of an argument in which a block may leave something that `carried` cannot see; empty if none."""
        return next((type(value).__name__ for value in values_of(self.calls) if not plain(value)), "")

    def through(
        self, module: nn.Module, index: int, hidden_BTD: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The output [B, T, D] of block `index` on `hidden_BTD`, by default the present state.

        With `dtype`, every float that the block is called with is given in that.
        """
        outs = list(self.in_parts(lambda part: part._forward(module, index, dtype), hidden_BTD))
        return outs[0] if len(outs) == 1 else torch.cat(outs)

    def _forward(self, module: nn.Module, index: int, dtype: torch.dtype | None) -> Tensor:
        """The output of block `index` on all windows at once."""
        entering_BTD, args, kwargs = cast((self.hidden_BTD, *self.calls[index]), dtype)
        with passing() if entering_BTD.device.type == "cpu" else nullcontext():
            out = module(entering_BTD, *args, **kwargs)
        return torch.as_tensor(out[0] if isinstance(out, (tuple, list)) else out)  # a tuple before transformers 4.57

    def in_parts(self, run: Callable[[Travellers], T], hidden_BTD: Tensor | None = None) -> Iterator[T]:
        """`run` of all windows, or of as many at a time as memory holds, on `hidden_BTD`, by default the present state.

        A run that memory did not suffice for is done again with half the windows, so it must change nothing. Raises
        what says so if a single window does not fit.
        """
        entering_BTD = self.hidden_BTD if hidden_BTD is None else hidden_BTD
        start = 0
        while start < len(self.ids_BT):
            stop = min(len(self.ids_BT), start + self.fit.most) if self.divisible else len(self.ids_BT)
            try:
                made = run(self.part(slice(start, stop), entering_BTD))
            except (MemoryError, RuntimeError) as error:
                if not out_of_memory(error) or not self.divisible or stop - start == 1:
                    raise
                too_many = stop - start
            else:
                yield made
                del made  # else it lives on while the next is made
                start = stop
                continue
            self.fit.halve(too_many)  # here the failed forward, which its traceback held, is freed

    @property
    def divisible(self) -> bool:
        """Whether windows can go apart: each has its own row, and no block leaves for another what belongs to all."""
        apart = self.again is not None and next(mappings(self.calls), None) is None
        return apart and self.shape[:2] == tuple(self.ids_BT.shape)

    def part(self, windows: slice, entering_BTD: Tensor | None = None) -> Travellers:
        """Some of the windows, by default in the present state; none of them leaves anything here."""
        entering_BTD = self.hidden_BTD if entering_BTD is None else entering_BTD
        if windows == slice(0, len(self.ids_BT)):
            return Travellers(self.ids_BT, entering_BTD, self.calls)
        ids_BT, key = self.ids_BT[windows], (windows.start, windows.stop)
        if key not in self.parted and self.again is not None:
            self.parted[key] = self.again(ids_BT)
        part = Travellers(ids_BT, entering_BTD[windows], self.parted[key])
        part.windows = windows
        return part


def read_raw(path: Path, dtype: torch.dtype, shape: Iterable[int]) -> Tensor:
    """A tensor from a file that holds nothing but its bytes."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(dtype).view(tuple(shape))


def values_of(calls: Iterable[Call]) -> Iterator[Any]:
    """Every argument, also of tuples in tuples."""
    waiting = [value for args, kwargs in calls for value in (*args, *kwargs.values())]
    while waiting:
        value = waiting.pop(0)
        if type(value) is tuple:
            waiting += value
        else:
            yield value


def mappings(calls: Iterable[Call]) -> Iterator[MutableMapping[Any, Any]]:
    """The mappings that blocks are called with, each once."""
    seen: set[int] = set()
    for value in values_of(calls):
        if isinstance(value, (dict, UserDict)) and id(value) not in seen:
            seen.add(id(value))
            yield value


def plain(value: Any) -> bool:
    """Whether an argument cannot change unseen: a value, a tensor, or a mapping from names to tuples of tensors."""
    if isinstance(value, (dict, UserDict)):
        named = all(isinstance(key, str) and isinstance(entry, tuple) for key, entry in value.items())
        return named and all(isinstance(tensor, Tensor) for entry in value.values() for tensor in entry)
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """A value, or what lies in tuples and mappings of them, with floats in `dtype` if it is given."""
    if dtype is None:
        return value
    match value:
        case Tensor() if value.is_floating_point():
            return value.to(dtype)
        case tuple():
            return tuple(cast(v, dtype) for v in value)
        case dict():
            return {name: cast(v, dtype) for name, v in value.items()}
        case _:
            return value


class Shared:
    """Keeps one copy of what many batches are called with: masks and rotary tables are the same for each."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], list[Tensor]] = {}

    def call(self, call: Call) -> Call:
        """The same call, its tensors replaced by equal ones that are kept already."""
        args, kwargs = call
        return tuple(self.value(a) for a in args), {name: self.value(v) for name, v in kwargs.items()}

    def value(self, value: Any) -> Any:
        """One argument, or a tuple of them."""
        if type(value) is tuple:
            return tuple(self.value(v) for v in value)
        if not isinstance(value, Tensor):
            return value
        same = self.kept.setdefault((value.shape, value.dtype, value.device, value.stride()), [])
        for other in same:
            if other is value or torch.equal(other, value):
                return other
        if len(same) < KEPT:
            same.append(value)
        return value
