"""The batch of running sequences: one key-value cache, padded on the left, with rows sorted by tenant.

Shapes: B sequences, H key-value heads, T tokens with padding, D channels of a head, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Sequence as Many
from dataclasses import dataclass, field
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.cache_utils import DynamicCache, DynamicLayer

from compress.errors import RecipeError
from compress.runtime.tenants import Tenants
from compress.serving.sampling import Sampling
from compress.serving.text import Text


@dataclass(frozen=True)
class Piece:
    """A piece of generated text; `finish` is the reason if it is the last one, `error` the message of a failure.

    `tokens` counts all tokens generated so far.
    """

    text: str = ""
    tokens: int = 0
    finish: str | None = None
    error: str | None = None


@dataclass(eq=False, kw_only=True)
class Sequence:
    """One request in progress: its prompt, its settings, and `emit`, which receives the pieces of text."""

    prompt: list[int]
    tenant: str | None
    limit: int  # tokens to generate at most
    sampling: Sampling
    text: Text
    ends: frozenset[int]  # tokens that end a text
    emit: Callable[[Piece], None]
    cancelled: bool = False
    generator: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        self.generator = self.sampling.generator()

    @property
    def made(self) -> int:
        """The number of tokens generated so far."""
        return len(self.text.tokens)

    def take(self, token: int) -> bool:
        """Emit the text of one more token; returns whether the sequence is finished."""
        if token in self.ends:
            rest = self.text.finish()  # without the end token, which a tokenizer may take for text
            self.text.tokens.append(token)
            self.emit(Piece(rest, self.made, "stop"))
            return True
        new = self.text.add(token)
        if self.text.stopped:
            self.emit(Piece(new, self.made, "stop"))
            return True
        if self.made >= self.limit:
            rest = self.text.finish()
            self.emit(Piece(new + rest, self.made, "stop" if self.text.stopped else "length"))
            return True
        if new:
            self.emit(Piece(new, self.made))
        return False


@dataclass(eq=False)
class Running:
    """The running sequences with their cache.

    `last_B1` is the last token of each sequence, which is not in the cache yet. `mask_BT` is 0 at padding.
    """

    sequences: list[Sequence]
    last_B1: Tensor
    mask_BT: Tensor
    layers: list[tuple[Tensor, Tensor]]  # keys and values [B, H, T, D]

    def select(self, rows: Many[int]) -> Running | None:
        """The sequences in these rows, without padding that all of them have; None if `rows` is empty."""
        if not rows:
            return None
        index = torch.tensor(list(rows), device=self.mask_BT.device)
        mask_BT = self.mask_BT[index]
        first = int(mask_BT.any(0).long().argmax())
        layers = [(k[index, :, first:].contiguous(), v[index, :, first:].contiguous()) for k, v in self.layers]
        return Running([self.sequences[row] for row in rows], self.last_B1[index], mask_BT[:, first:], layers)

    def joined(self, other: Running) -> Running:
        """These and other sequences as one batch, sorted by tenant."""
        length = max(self.mask_BT.shape[1], other.mask_BT.shape[1])
        pairs = zip(self.layers, other.layers, strict=True)
        both = Running(
            self.sequences + other.sequences,
            torch.cat((self.last_B1, other.last_B1)),
            stacked(self.mask_BT[..., None], other.mask_BT[..., None], length)[..., 0],
            [(stacked(own[0], new[0], length), stacked(own[1], new[1], length)) for own, new in pairs],
        )
        found = both.select(by_tenant(both.sequences))
        return both if found is None else found


def stacked(one: Tensor, other: Tensor, length: int) -> Tensor:
    """The rows [..., T, D] of both, padded with zeros on the left to one length."""
    return torch.cat([F.pad(x, (0, 0, length - x.shape[-2], 0)) for x in (one, other)])


def by_tenant(sequences: Many[Sequence]) -> list[int]:
    """Row indices sorted by tenant, the base first."""
    return sorted(range(len(sequences)), key=lambda row: sequences[row].tenant or "")


def check_cache(model: Any) -> None:
    """Raise RecipeError unless a model caches nothing but plain keys and values, since only these are kept here."""
    cached = "past_key_values" in signature(model.forward).parameters and model.can_generate()
    if not cached or not all(isinstance(layer, DynamicLayer) for layer in DynamicCache(config=model.config).layers):
        raise RecipeError(
            f"{type(model).__name__} cannot be served: its cache does not consist of plain keys and values"
        )


def logits_of(tenants: Tenants, running: Running, ids_BS: Tensor) -> Tensor:
    """Append tokens to each sequence and return the logits [B, V], float32, of the next token.

    The cache in `running` is updated; its mask must already cover the new tokens.
    """
    cache = DynamicCache()
    for layer, (keys, values) in enumerate(running.layers):
        cache.update(keys, values, layer)
    names = [sequence.tenant for sequence in running.sequences]
    out: Any = tenants(
        ids_BS, names, attention_mask=running.mask_BT, past_key_values=cache, use_cache=True, logits_to_keep=1
    )
    running.layers = [(layer.keys, layer.values) for layer in out.past_key_values.layers]
    found: Tensor = out.logits[:, -1].float()
    return found
