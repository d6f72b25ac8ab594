"""Expert modules (MoE) whose stacked weights are stored compressed, expert by expert.

The module keeps its family's code, so that every way in which the family runs its experts still works; only the stacks
are no longer parameters. They are decoded once, or, with `low_memory`, for the duration of each call.
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
    """Base class mixed into a family's expert class; `stored[i]` holds the compressed matrix for `places[i]`."""

    stored: nn.ModuleList
    places: Sequence[Place]
    extents: dict[str, tuple[int, ...]]
    dtype: torch.dtype
    decoded: dict[str, Tensor]
    kept: bool
    replaced: bool  # whether stored tensors were loaded after the stacks had been decoded

    def prepare(self, dtype: torch.dtype) -> None:
        """Decode every stack once, in `dtype`."""
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
        """The decoded stack, or a tensor on the meta device if it has not been decoded."""
        if name in self.decoded:
            return self.decoded[name]
        return torch.empty(self.extents[name], dtype=self.dtype, device="meta")

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The family's own forward; unless `prepare` was called, the stacks are decoded for this call only."""
        if self.kept:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        called = copy(self)  # so that no other thread sees the stacks of this call
        called.decoded = self.decode()
        return super(CompressedExperts, called).forward(*args, **kwargs)  # type: ignore[misc]

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Note whether the state dict replaces stored tensors; `decode_again` runs once they are loaded."""
        super()._load_from_state_dict(state_dict, prefix, *others)  # type: ignore[misc]
        self.replaced = self.kept and any(key.startswith(f"{prefix}stored.") for key in state_dict)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        """Move and cast the decoded stacks along with the module, also those that are decoded later."""
        moved = super()._apply(fn, recurse)  # type: ignore[misc]
        self.decoded = {name: fn(stack) for name, stack in self.decoded.items()}
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return moved


def decode_again(module: Any, _: Any) -> None:
    """Decode the stacks again if `load_state_dict` has replaced their stored tensors."""
    if module.replaced:
        module.prepare(module.dtype)


def compress_experts(module: Any, stored: Sequence[tuple[Place, dict[str, Any]]], dtype: torch.dtype) -> None:
    """Replace the stacks of `module`, in place, by the given compressed weights; they are no longer parameters."""
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
