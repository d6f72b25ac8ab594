"""Projections that read one input, such as q, k and v: what they do to it first is done once.

A family's code calls them one by one. The first turns and rounds the input; the others take the result if they are
called with the same tensor object, not written to since. Each takes it once, so a repeated call starts anew, and the
last one, or the end of the input, drops it. To stack the matrices too was tried and left out: on the CPU one product
was no faster than three (docs/speed.md).
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
    """What was made of an input, and who has not taken it yet."""

    seen: weakref.ref[Tensor]
    version: int
    value: tuple[Tensor, ...]
    waiting: set[int]


class SharedInput:
    """What `members` modules make of an input that they share; safe to use from several threads."""

    def __init__(self, members: int) -> None:
        self.members = members
        self.kept: dict[int, Kept] = {}  # by thread

    def take(self, member: int, x: Tensor, read: Read) -> tuple[Tensor, ...]:
        """`read(x)`, made by whichever member asks first.

        Made for this member alone where writing to x could not be seen (inference tensors), where a gradient is wanted
        and where a compiler traces, which finds equal work by itself.
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
        """A new value, which goes with x."""

        def forget(gone: weakref.ref[Tensor]) -> None:
            kept = self.kept.get(thread)
            if kept is not None and kept.seen is gone:
                del self.kept[thread]

        return Kept(weakref.ref(x, forget), x._version, read(x), set(range(self.members)))

    def __getstate__(self) -> dict[str, Any]:
        """A copy has nothing kept."""
        return {"members": self.members, "kept": {}}


__all__ = ["SharedInput"]
