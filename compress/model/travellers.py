"""Batches of token windows on their way through a model: their hidden states, and what each block is called with.

Windows of a batch are equally long, so there is no padding and none can enter a statistic. Hidden states may be kept
on disk between blocks; only one batch is then in memory. Shape suffixes: B batch, T tokens, D hidden, N windows.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from compress.errors import CalibrationError

BATCH_TOKENS = 4096  # a forward: large enough for GEMM speed, small enough for memory
KEPT = 16  # different recorded tensors of one shape that are compared before another is kept

Call = tuple[tuple[Any, ...], dict[str, Any]]


def batched(windows: Iterable[Tensor], most: int | None = None) -> list[Tensor]:
    """Token windows [N, T], one tensor for each length, in batches of `most`, or of about BATCH_TOKENS tokens."""
    return [
        batch
        for ids_NT in windows
        if len(ids_NT)
        for batch in ids_NT.split(most or max(1, BATCH_TOKENS // ids_NT.shape[1]))
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


class Travellers:
    """A batch of token windows on its way; with `store`, a file, its hidden state lies there between uses."""

    def __init__(self, ids_BT: Tensor, hidden_BTD: Tensor, calls: list[Call], store: Path | None = None) -> None:
        self.ids_BT, self.calls, self.store = ids_BT, calls, store
        self.hidden_BTD = hidden_BTD

    @property
    def hidden_BTD(self) -> Tensor:
        """The hidden state [B, T, D]."""
        if self.store is None:
            return self._hidden
        raw = torch.from_numpy(np.fromfile(self.store, dtype=np.uint8))
        return raw.view(self._hidden.dtype).view(self._hidden.shape).to(self.device)

    @hidden_BTD.setter
    def hidden_BTD(self, hidden_BTD: Tensor) -> None:
        self.device = hidden_BTD.device
        if self.store is not None:
            with self.store.open("wb") as file:  # not `tofile`: it loses the reason when a disk is full
                file.write(hidden_BTD.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
            hidden_BTD = torch.empty_like(hidden_BTD, device="meta")
        self._hidden = hidden_BTD

    def forget(self) -> None:
        """Remove what lies on disk."""
        if self.store is not None:
            self.store.unlink(missing_ok=True)

    def through(
        self, module: nn.Module, index: int, hidden_BTD: Tensor | None = None, dtype: torch.dtype | None = None
    ) -> Tensor:
        """The output [B, T, D] of block `index` on `hidden_BTD`, by default the present state.

        With `dtype`, every float that the block is called with is given in that.
        """
        entering_BTD = self.hidden_BTD if hidden_BTD is None else hidden_BTD
        entering_BTD, args, kwargs = cast((entering_BTD, *self.calls[index]), dtype)
        out = module(entering_BTD, *args, **kwargs)
        return torch.as_tensor(out[0] if isinstance(out, (tuple, list)) else out)  # a tuple before transformers 4.57


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
