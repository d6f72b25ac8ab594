"""A checkpoint made of another one: the model with parts cut off, renumbered or rotated, read as if it lay on disk.

Each tensor is made from the source's when it is asked for, so nothing of the model's size is held. Where the files
lie, their hashes and what they were decoded from stay those of the source. Not here: what to cut (`compress/passes`).
Shape suffixes: K kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError, UnsupportedWeight
from compress.model.anatomy import Anatomy
from compress.model.layout import Shape
from compress.model.source import Checkpoint, Held
from compress.model.walk import Walk

FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
SAME = 1e-4  # relative, of float32 logits summed in another order
ROUNDINGS = 8  # of the model's dtype


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tensor of a reshaped model: its shape, the source's tensor whose dtype it has, and how to get it."""

    shape: Shape
    like: str
    make: Callable[[], Tensor]


class Reshaped(Checkpoint):
    """`tensors` by name, with a `config` that fits them; `change` tells people what is different, such as
    `without 2 of 8 blocks`, `facts` the details."""

    def __init__(
        self, source: Checkpoint, config: dict[str, Any], tensors: Mapping[str, Made], change: str, **facts: Any
    ) -> None:
        self.source, self.config, self.change, self.facts = source, config, change, facts
        self.path, self.decoded_from, self.files = source.path, source.decoded_from, source.files
        self.made = dict(sorted(tensors.items()))

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return list(self.made)

    def __contains__(self, name: object) -> bool:
        return name in self.made

    @cached_property
    def headers(self) -> dict[str, Held]:
        """Name -> dtype and shape of every tensor that `tensor` gives."""
        known = self.source.headers
        return {name: Held(known[made.like].dtype, made.shape) for name, made in self.made.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, made anew; raises ArtifactError if there is none of this name."""
        if name not in self.made:
            raise ArtifactError(f"{self.path}: the model {self.change} has no tensor {name!r}")
        return self.made[name].make()

    def digests(self) -> dict[str, str]:
        """Shard name -> sha256, of the files it is made from."""
        return self.source.digests()


def unchanged(source: Checkpoint, name: str) -> Made:
    """A tensor as the source has it."""
    return Made(shape=source.headers[name].shape, like=name, make=partial(source.tensor, name))


def sliced(source: Checkpoint, name: str, axis: int, kept_K: Tensor) -> Made:
    """The entries `kept_K` along an axis of one of the source's tensors."""
    shape = list(source.headers[name].shape)
    shape[axis] = len(kept_K)
    return Made(shape=tuple(shape), like=name, make=lambda: source.tensor(name).index_select(axis, kept_K))


def computed(source: Checkpoint, like: str, shape: Shape, make: Callable[[], Tensor]) -> Made:
    """What `make` gives, of `shape`, rounded to the dtype of the source's tensor `like`."""
    return Made(shape=shape, like=like, make=lambda: make().to(FLOATS[source.headers[like].dtype]).contiguous())


def walk_over(reshaped: Checkpoint, walk: Walk) -> Walk:
    """A walk over a reshaped model, in the dtype and place of the walk over the model it is made of."""
    over = Walk(reshaped.config, reshaped, walk.dtype, walk.device, walk.store)
    over.fit = walk.fit
    return over


def check_logits(reshaped: Reshaped, walk: Walk, probe_NT: Tensor, meant: Tensor, by: str) -> None:
    """Raise UnsupportedWeight unless a reshaped model gives the logits that cutting the whole model gave.

    A family may compute by the number of a block or of its heads in ways that no config says; here it shows.
    """
    again = walk_over(reshaped, walk)
    got = again.replay(again.enter(probe_NT)).float()
    error = float((got - meant.float()).norm() / meant.float().norm().clamp(min=1e-30))
    if not error <= max(SAME, ROUNDINGS * torch.finfo(walk.dtype).eps):
        raise UnsupportedWeight(
            f"{by}: {type(walk.model).__name__} {reshaped.change} computes something else than it should "
            f"(off by {error:.2g}); its configuration cannot say what is meant"
        )


# -- names and configurations ----------------------------------------------------------------------


def parameter_of(anatomy: Anatomy, name: str) -> str:
    """The whole parameter that a tensor of the file is; empty if it is none, or only part of one."""
    slot = anatomy.layout.slots.get(name)
    return "" if slot is None or slot.expert is not None or slot.turned else slot.parameter


def block_prefixes(anatomy: Anatomy) -> dict[str, int]:
    """What the names of the file begin with in each block, such as `model.layers.3.`, with the block's number.

    Raises UnsupportedWeight if the names of one block begin differently.
    """
    leaf = anatomy.path.rpartition(".")[2]
    found: dict[str, int] = {}
    for index in range(len(anatomy.blocks)):
        for name in anatomy.tensors_of(index):
            start = re.match(rf"(.*?\.)?{re.escape(leaf)}\.{index}\.", name)
            if start is None:
                raise UnsupportedWeight(f"{name} does not say of which block it is")
            found[start[0]] = index
    if len(found) != len(anatomy.blocks):
        raise UnsupportedWeight(f"the tensors of a block are named in several ways: {', '.join(sorted(found)[:3])}")
    return found


def with_text(config: dict[str, Any], walk: Walk, **changes: Any) -> dict[str, Any]:
    """A raw config with fields of its language model changed, by the names that its family gives them."""
    whole = walk.model.config
    text = whole.get_text_config()
    named = {getattr(text, "attribute_map", {}).get(key, key): value for key, value in changes.items()}
    if text is whole:
        return {**config, **named}
    part = next(key for key, value in vars(whole).items() if value is text)
    return {**config, part: {**config.get(part, {}), **named}}
