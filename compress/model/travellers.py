"""Batches of token windows on their way through a model: their hidden states and the arguments of each block.

Windows of a batch have the same length, so there is no padding that could enter a statistic. Hidden states may be kept
on disk between blocks, with only one batch in memory. Each state is a file of its own, so that a file that a journal
names stays intact while the next one is written. A batch that does not fit into memory goes through a block in parts,
halved until they fit, and so does every batch after it. Shape suffixes: B batch, T tokens, D hidden, N windows.
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

BATCH_TOKENS = 8192  # per forward pass on a GPU: with 4096, launching from Python took longer than computing
CPU_TOKENS = 1024  # on a CPU, products are no slower with so few rows, and activations mostly stay in cache
KEPT = 16  # different recorded tensors of one shape that are kept for sharing

Call = tuple[tuple[Any, ...], dict[str, Any]]
T = TypeVar("T")


def tokens_at_once(device: torch.device) -> int:
    """The approximate number of tokens in a forward pass on this device."""
    return CPU_TOKENS if device.type == "cpu" else BATCH_TOKENS


def batched(windows: Iterable[Tensor], tokens: int, most: int | None = None) -> list[Tensor]:
    """Split windows [N, T], one tensor per length, into batches of `most` windows, or of about `tokens` tokens."""
    return [
        batch for ids_NT in windows if len(ids_NT) for batch in ids_NT.split(most or max(1, tokens // ids_NT.shape[1]))
    ]


def unpadded(ids_NT: Tensor, mask_NT: Tensor | None) -> list[Tensor]:
    """The windows without their padding, one tensor [N, T] for each length.

    Raises CalibrationError if the mask has another shape, or if a window is all padding or has padding inside.
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
    """The number of windows that go through a block at once: a whole batch, halved whenever memory runs out."""

    def __init__(self) -> None:
        self.most = sys.maxsize
        self.tell: Callable[[int], None] = lambda windows: None

    @property
    def halved(self) -> bool:
        """Whether memory has run out."""
        return self.most < sys.maxsize

    def halve(self, windows: int) -> None:
        """Halve the limit, because memory ran out with this many windows; frees memory and calls `tell`."""
        self.most = (windows + 1) // 2
        gc.collect()  # the exception may be in a reference cycle with its frames, which hold tensors
        give_back()
        self.tell(self.most)


class Travellers:
    """A batch of token windows on its way through the model, with its hidden state and the arguments of each block.

    With `store`, the hidden state is kept in a file of that name plus a number. `kept` is a file that must not be
    deleted, because a record names it. `again` computes the arguments of the blocks for some of the windows; without
    it the batch cannot be divided.
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
        self.windows = slice(0, len(ids_BT))  # for a part: which windows of the batch it holds
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
        self.device, hidden_BTD = hidden_BTD.device, hidden_BTD.contiguous()  # the layout it has when read from a file
        if self.store is not None:
            before, self.turn = self.file, self.turn + 1
            self.file = self.store.with_name(f"{self.store.name}.{self.turn}")
            raw = hidden_BTD.cpu().reshape(-1).view(torch.uint8).numpy().data
            self.sha256 = sha256(raw).hexdigest()
            with self.file.open("wb") as file:  # not `tofile`, whose error hides that a disk is full
                file.write(raw)
            if before is not None and before != self.kept:
                before.unlink()
            hidden_BTD = torch.empty_like(hidden_BTD, device="meta")
        self._hidden = hidden_BTD if self.again is None else lasting(hidden_BTD)  # a part is short-lived

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the hidden state."""
        return self._hidden.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the hidden state."""
        return tuple(self._hidden.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the hidden state."""
        return int(self._hidden.nbytes)

    def forget(self) -> None:
        """Remove the file of the hidden state, if there is one."""
        if self.file is not None:
            self.file.unlink(missing_ok=True)

    def carried(self) -> dict[str, Tensor]:
        """The tensors that blocks have stored in mappings among their arguments, for later blocks, by place and key."""
        return {
            f"{i}.{key}.{j}": tensor
            for i, left in enumerate(mappings(self.calls))
            for key, value in left.items()
            for j, tensor in enumerate(value)
        }

    def carry(self, left: dict[str, Tensor]) -> None:
        """Restore what `carried` returned; each entry becomes a tuple of tensors, as blocks store it."""
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
        """The type of an argument in which a block may store state that `carried` cannot see; empty for none."""
        return next((type(value).__name__ for value in values_of(self.calls) if not plain(value)), "")

    def through(
        self, module: nn.Module, index: int, hidden_BTD: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The output [B, T, D] of block `index` on `hidden_BTD`, by default the current hidden state.

        With `dtype`, the input and all floating-point arguments of the block are cast to it.
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
        """The results of `run` on all windows, or on as many at a time as fit in memory.

        It runs on `hidden_BTD`, by default the current hidden state. A run that exceeds memory is repeated with half
        the windows, so it must have no side effects. Raises the out-of-memory error if a single window does not fit.
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
                del made  # otherwise it stays in memory while the next result is computed
                start = stop
                continue
            self.fit.halve(too_many)  # here, because the traceback that held the failed forward pass is gone

    @property
    def divisible(self) -> bool:
        """Whether the windows can run separately: each has its own row, and blocks pass no state on in mappings."""
        apart = self.again is not None and next(mappings(self.calls), None) is None
        return apart and self.shape[:2] == tuple(self.ids_BT.shape)

    def part(self, windows: slice, entering_BTD: Tensor | None = None) -> Travellers:
        """A batch of some of the windows, by default with their current hidden state; running it never changes this."""
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
    """A tensor from a file that holds only its bytes."""
    return torch.from_numpy(np.fromfile(path, dtype=np.uint8)).view(dtype).view(tuple(shape))


def values_of(calls: Iterable[Call]) -> Iterator[Any]:
    """Every argument of the calls; nested tuples are flattened."""
    waiting = [value for args, kwargs in calls for value in (*args, *kwargs.values())]
    while waiting:
        value = waiting.pop(0)
        if type(value) is tuple:
            waiting += value
        else:
            yield value


def mappings(calls: Iterable[Call]) -> Iterator[MutableMapping[Any, Any]]:
    """The distinct mappings among the arguments of the blocks."""
    seen: set[int] = set()
    for value in values_of(calls):
        if isinstance(value, (dict, UserDict)) and id(value) not in seen:
            seen.add(id(value))
            yield value


def plain(value: Any) -> bool:
    """Whether an argument cannot hide state: a plain value, a tensor, or a mapping of names to tuples of tensors."""
    if isinstance(value, (dict, UserDict)):
        named = all(isinstance(key, str) and isinstance(entry, tuple) for key, entry in value.items())
        return named and all(isinstance(tensor, Tensor) for entry in value.values() for tensor in entry)
    return value is None or isinstance(value, (Tensor, bool, int, float, str, torch.dtype, torch.device))


def cast(value: Any, dtype: torch.dtype | None) -> Any:
    """The value, with floating-point tensors, also in tuples and mappings, cast to `dtype` if it is given."""
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
    """Keeps one copy of tensors that many batches share as arguments, such as masks and rotary tables."""

    def __init__(self) -> None:
        self.kept: dict[tuple[Any, ...], list[Tensor]] = {}

    def call(self, call: Call) -> Call:
        """The same call, with its tensors replaced by equal ones that are already kept."""
        args, kwargs = call
        return tuple(self.value(a) for a in args), {name: self.value(v) for name, v in kwargs.items()}

    def value(self, value: Any) -> Any:
        """One argument, or a tuple of them, with tensors replaced by equal ones that are already kept."""
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
