"""A module of experts whose stacks are stored expert by expert.

The module stays what its family made it, so any way of running its experts works; only its stacks are no longer
parameters. They are decoded once, or with `low_memory` for the length of each call.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
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
    replaced: bool  # whether stored tensors came after the stacks were decoded

    def prepare(self, dtype: torch.dtype) -> None:
        """Decode every stack once, for computing in `dtype`."""
        self.dtype, self.kept, self.replaced = dtype, True, False
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
        called = copy(self)  # which another thread does not have
        called.decoded = self.decode()
        return super(CompressedExperts, called).forward(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Note whether other stored tensors come; they are there when `decode_again` is called."""
        super()._load_from_state_dict(state_dict, prefix, *others)  # type: ignore[misc]
        self.replaced = self.kept and any(key.startswith(f"{prefix}stored.") for key in state_dict)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move what was decoded with the module."""
        moved = super()._apply(fn, recurse)  # type: ignore[misc]
        self.decoded = {name: fn(stack) for name, stack in self.decoded.items()}
        return moved


def decode_again(module: Any, _: Any) -> None:
    """Decode the stacks of stored tensors that `load_state_dict` has replaced."""
    if module.replaced:
        module.prepare(module.dtype)


def compress_experts(module: Any, stored: Sequence[tuple[Place, dict[str, Any]]], dtype: torch.dtype) -> None:
    """Make `module` keep its stacks as the given weights instead of parameters, in place."""
    names = sorted({place.parameter for place, _ in stored})
    module.extents = {name: tuple(getattr(module, name).shape) for name in names}
    for name in names:
        del module._parameters[name]
    module.stored = nn.ModuleList(StoredWeight(spec) for _, spec in stored)
    module.places, module.dtype, module.decoded = [place for place, _ in stored], dtype, {}
    module.kept = module.replaced = False
    module.register_load_state_dict_post_hook(decode_again)
    stacks = {name: property(partial(CompressedExperts.stack, name=name)) for name in names}
    module.__class__ = type(f"Compressed{type(module).__name__}", (CompressedExperts, type(module)), stacks)
