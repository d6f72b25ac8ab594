"""What a resident difference of one matrix is: tensors that stay in memory and a product, for several tenants at once.

Shapes: N tokens, those of one tenant after those of another; O out, I in, K tenants.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor


class Part:
    """A difference [out, in] as it stays in memory."""

    def tensors(self) -> Sequence[Tensor]:
        """What stays in memory."""
        raise NotImplementedError

    @property
    def kind(self) -> Hashable:
        """What the parts of several tenants must agree in to be computed together."""
        raise NotImplementedError

    @classmethod
    def together(cls, parts: Sequence[Any], x_NI: Tensor, counts: Sequence[int]) -> Tensor:
        """`x @ D.T`, float32 [N, O], each tenant's `counts` tokens with its own part; the parts are of one kind."""
        raise NotImplementedError

    def rows(self, ids: Tensor) -> Tensor:
        """The rows of these numbers, float32 [..., I]."""
        raise NotImplementedError

    def describe(self) -> str:
        """How it computes."""
        raise NotImplementedError

    def linear(self, x_NI: Tensor) -> Tensor:
        """`x @ D.T`, float32 [N, O], of one tenant."""
        return self.together([self], x_NI, [len(x_NI)])

    def nbytes(self) -> int:
        """Bytes that stay in memory."""
        return sum(int(tensor.nbytes) for tensor in self.tensors())


def placed(held: Any, device: torch.device) -> Any:
    """A part, or what is in one, with its tensors on a device."""
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
    """What every tenant has one of, for each of its tokens, float32 [N, ...]."""
    stacked = torch.stack(list(each)).float()
    if min(counts) == max(counts):
        return stacked if counts[0] == 1 else stacked.repeat_interleave(counts[0], 0)
    return stacked.repeat_interleave(torch.tensor(counts, device=stacked.device), 0)


def apart(x_NI: Tensor, counts: Sequence[int]) -> Sequence[Tensor]:
    """The tokens of every tenant."""
    return x_NI.split(list(counts)) if len(counts) > 1 else (x_NI,)
