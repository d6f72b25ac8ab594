"""Shares the preprocessing of an input among projections that read it, such as q, k and v.

A family's code calls the projections one by one. The first transforms and rounds the input; the others reuse the result
if they are called with the same tensor object and it has not been written to since. Each takes the result once, so that
a repeated call computes it anew. The result is dropped when the last projection has taken it, or when the input is
freed. Stacking the matrices as well was tried and left out: on the CPU one product was no faster than three
(docs/speed.md).
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from threading import get_ident
from typing import Any

import torch
from torch import Tensor

Read = Callable[[Tensor], tuple[Tensor, ...]]


@dataclass
class Kept:
    """The result computed from an input, and the members that have not taken it yet."""

    seen: weakref.ref[Tensor]
    version: int
    value: tuple[Tensor, ...]
    waiting: set[int]


class SharedInput:
    """Computes once what `members` modules need of the input they share; safe to use from several threads."""

    def __init__(self, members: int) -> None:
        self.members = members
        self.kept: dict[int, Kept] = {}  # by thread

    def take(self, member: int, x: Tensor, read: Read) -> tuple[Tensor, ...]:
        """`read(x)`, computed by whichever member asks first.

        Computed for this member alone in three cases: if writes to x could not be detected (inference tensors), if a
        gradient is wanted, and under torch.compile, which removes the duplicate work itself.
        """
        if torch.compiler.is_compiling() or x.is_inference() or (x.requires_grad and torch.is_grad_enabled()):
            return read(x)
        thread = get_ident()
        kept = self.kept.get(thread)
        if kept is None or kept.seen() is not x or kept.version != x._version or member not in kept.waiting:
            kept = self.kept[thread] = self.made(x, read, thread)
        kept.waiting.discard(member)
        if not kept.waiting:
            self.kept.pop(thread, None)
        return kept.value

    def made(self, x: Tensor, read: Read, thread: int) -> Kept:
        """Compute `read(x)`, to be forgotten when x is freed."""

        def forget(gone: weakref.ref[Tensor]) -> None:
            kept = self.kept.get(thread)
            if kept is not None and kept.seen is gone:
                del self.kept[thread]

        return Kept(weakref.ref(x, forget), x._version, read(x), set(range(self.members)))

    def __getstate__(self) -> dict[str, Any]:
        """The state of a copy, which starts without cached results."""
        return {"members": self.members, "kept": {}}


__all__ = ["SharedInput"]
