"""A module of experts whose stacks are stored expert by expert.

The module stays what its family made it, so any way of running its experts works; only its stacks are no longer
parameters. They are decoded once, or with `low_memory` for the length of each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from compress.model.anatomy import Place
from compress.runtime.linear import StoredWeight


class CompressedExperts:
    """What is mixed into a family's class of experts; `stored[i]` holds the matrix at `places[i]`."""

    stored: nn.ModuleList
    places: Sequence[Place]
    extents: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    decoded: dict[str, Tensor]
    kept: bool

    def prepare(self, dtype: torch.dtype) -> None:
        """Decode every stack once, for computing in `dtype`."""
        self.dtype, self.kept = dtype, True
        self.decoded = self.decode()

    def decode(self) -> dict[str, Tensor]:
        """The stacks [experts, out, in], or [experts, in, out] where the family keeps them so."""
        stacks: dict[str, Tensor] = {}
        for place, stored in zip(self.places, self.stored, strict=True):
            w_OI = cast(StoredWeight, stored).expression.dense()
            stack = stacks.setdefault(
                place.parameter, torch.empty(self.extents[place.parameter], dtype=self.dtype, device=w_OI.device)
            )
            view = stack[place.expert].T if place.transposed else stack[place.expert]
            (view if place.rows is None else view[place.rows[0] : place.rows[1]]).copy_(w_OI)
        return stacks

    def stack(self, name: str) -> Tensor:
        """A stack as it is now; empty of values until it was decoded."""
        if name in self.decoded:
            return self.decoded[name]
        return torch.empty(self.extents[name], dtype=self.dtype, device="meta")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the family computes."""
        if self.kept:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        self.decoded = self.decode()
        try:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.decoded = {}

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move what was decoded with the module."""
        moved = super()._apply(fn, recurse)  # type: ignore[misc]
        self.decoded = {name: fn(stack) for name, stack in self.decoded.items()}
        return moved


def compress_experts(module: Any, stored: Sequence[tuple[Place, dict[str, Any]]], dtype: torch.dtype) -> None:
    """Make `module` keep its stacks as the given weights instead of parameters, in place."""
    names = sorted({place.parameter for place, _ in stored})
    module.extents = {name: tuple(getattr(module, name).shape) for name in names}
    for name in names:
        del module._parameters[name]
    module.stored = nn.ModuleList(StoredWeight(spec) for _, spec in stored)
    module.places, module.dtype, module.decoded, module.kept = [place for place, _ in stored], dtype, {}, False
    stacks = {name: property(partial(CompressedExperts.stack, name=name)) for name in names}
    module.__class__ = type(f"Compressed{type(module).__name__}", (CompressedExperts, type(module)), stacks)
