"""The difference of a fine-tune from its base: what it consists of, and how to read it one tensor at a time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from compress.weights import Weight, specify


@dataclass(frozen=True, eq=False, kw_only=True)
class Difference:
    """`weight(site)` is what is added to the matrix [out, in] of a site; `tensor(name)` replaces a tensor of the base.

    `shape(name)` is the shape of that tensor. `form(site)` returns the specification of that weight and the bytes of
    its stored form without reading a tensor. `nbytes` is the size in bytes of the stored form of all weights and
    tensors.
    """

    sites: Sequence[str]
    weight: Callable[[str], Weight]
    form: Callable[[str], tuple[Mapping[str, Any], int]]
    names: Sequence[str]
    shape: Callable[[str], tuple[int, ...]]
    tensor: Callable[[str], Tensor]
    nbytes: int

    @staticmethod
    def of(weights: Mapping[str, Weight], own: Mapping[str, Tensor] | None = None) -> Difference:
        """A difference made of expressions and tensors that are already in memory."""
        own = own or {}
        return Difference(
            sites=tuple(weights),
            weight=weights.__getitem__,
            form=lambda site: (specify(weights[site]), weights[site].nbytes()),
            names=tuple(own),
            shape=lambda name: tuple(own[name].shape),
            tensor=own.__getitem__,
            nbytes=sum(w.nbytes() for w in weights.values()) + sum(int(t.nbytes) for t in own.values()),
        )
