"""The interface of a resident difference of one matrix: its tensors in memory, and its product for several tenants.

Shapes: N tokens, grouped by tenant; O out, I in, K tenants.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor


class Part:
    """The difference of one matrix [out, in], in the form in which it stays in memory."""

    def tensors(self) -> Sequence[Tensor]:
        """The tensors that stay in memory."""
        raise NotImplementedError

    @property
    def kind(self) -> Hashable:
        """A key that the parts of several tenants must share to be computed together."""
        raise NotImplementedError

    @classmethod
    def together(cls, parts: Sequence[Any], x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """`x @ D.T`, float32 [N, O], with each tenant's part for its tokens.

        `counts[k]` is the number of tokens of tenant k; the parts must be of one kind.
        """
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """Rows `ids` of the difference, float32 [..., I]."""
        raise NotImplementedError

    def describe(self) -> str:
        """How the product is computed, in a few words."""
        raise NotImplementedError

    def linear(self, x_NI: Tensor) -> Tensor:
        """`x @ D.T`, float32 [N, O], for tokens of one tenant."""
        return self.together([self], x_NI, [len(x_NI)])

    def nbytes(self) -> int:
        """Bytes that stay in memory."""
        return sum(int(tensor.nbytes) for tensor in self.tensors())


def placed(held: Any, device: torch.device) -> Any:
    """A part, or a value inside one, with its tensors moved to a device."""
    match held:
        case Tensor():
            return held.to(device)
        case tuple():
            return tuple(placed(each, device) for each in held)
        case dict():
            return {name: placed(each, device) for name, each in held.items()}
        case Part():
            return replace(held, **{f.name: placed(getattr(held, f.name), device) for f in fields(held)})  # type: ignore[type-var,arg-type]
        case _:
            return held


def per_token(each: Sequence[Tensor], counts: Sequence[int]) -> Tensor:
    """One tensor per tenant, repeated for each of the tenant's tokens, float32 [N, ...]."""
    stacked = torch.stack(list(each)).float()
    if min(counts) == max(counts):
        return stacked if counts[0] == 1 else stacked.repeat_interleave(counts[0], 0)
    return stacked.repeat_interleave(torch.tensor(counts, device=stacked.device), 0)


def apart(x_NI: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """Split the tokens by tenant."""
    return x_NI.split(list(counts)) if len(counts) > 1 else (x_NI,)
