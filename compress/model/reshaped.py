"""A checkpoint derived from another: the model with parts cut off, renumbered or rotated, read as if it were on disk.

Each tensor is computed from the source's when it is requested, so the model is never held as a whole. The path, the
file hashes and the original format stay those of the source. Not here: what to cut (`compress/passes`).
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
ROUNDINGS = 8  # roundings of the model's dtype that logits may differ by


@dataclass(frozen=True, kw_only=True)
class Made:
    """A tensor of a reshaped model: its shape, the source tensor whose dtype it has (`like`), and how to compute it."""

    shape: Shape
    like: str
    make: Callable[[], Tensor]


class Reshaped(Checkpoint):
    """A checkpoint of `tensors` by name, with a `config` that fits them.

    `change` says in words what is different, such as `without 2 of 8 blocks`; `facts` are the details.
    """

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
        """The dtype and shape of every tensor that `tensor` returns, by name."""
        known = self.source.headers
        return {name: Held(known[made.like].dtype, made.shape) for name, made in self.made.items()}

    def tensor(self, name: str) -> Tensor:
        """One tensor, computed on every call; raises ArtifactError if there is none of this name."""
        if name not in self.made:
            raise ArtifactError(f"{self.path}: the model {self.change} has no tensor {name!r}")
        return self.made[name].make()

    def digests(self) -> dict[str, str]:
        """The sha256 of each shard of the source, by name."""
        return self.source.digests()


def unchanged(source: Checkpoint, name: str) -> Made:
    """One of the source's tensors, unchanged."""
    return Made(shape=source.headers[name].shape, like=name, make=partial(source.tensor, name))


def sliced(source: Checkpoint, name: str, axis: int, kept_K: Tensor) -> Made:
    """One of the source's tensors with only the entries `kept_K` along an axis."""
    shape = list(source.headers[name].shape)
    shape[axis] = len(kept_K)
    return Made(shape=tuple(shape), like=name, make=lambda: source.tensor(name).index_select(axis, kept_K))


def computed(source: Checkpoint, like: str, shape: Shape, make: Callable[[], Tensor]) -> Made:
    """The result of `make`, which has `shape`, rounded to the dtype of the source's tensor `like`."""
    return Made(shape=shape, like=like, make=lambda: make().to(FLOATS[source.headers[like].dtype]).contiguous())


def walk_over(reshaped: Checkpoint, walk: Walk) -> Walk:
    """A walk over a reshaped model, with the dtype, device and store of the walk over the model it is made from."""
    over = Walk(reshaped.config, reshaped, walk.dtype, walk.device, walk.store)
    over.fit = walk.fit
    return over


def check_logits(reshaped: Reshaped, walk: Walk, probe_NT: Tensor, meant: Tensor, by: str) -> None:
    """Raise UnsupportedWeight unless a reshaped model gives the logits `meant`, found by cutting the model in memory.

    This catches families whose computation depends on the index of a block or its heads in ways that no config states.
    """
    again = walk_over(reshaped, walk)
    got = again.replay(again.enter(probe_NT)).float()
    error = float((got - meant.float()).norm() / meant.float().norm().clamp(min=1e-30))
    if not error <= max(SAME, ROUNDINGS * torch.finfo(walk.dtype).eps):
        raise UnsupportedWeight(
            f"{by}: {type(walk.model).__name__} {reshaped.change} computes other outputs than expected "
            f"(off by {error:.2g}); its configuration cannot describe the change"
        )


# -- names and configurations ----------------------------------------------------------------------


def parameter_of(anatomy: Anatomy, name: str) -> str:
    """The parameter that a tensor of the file holds as a whole; empty if it holds none, or only part of one."""
    slot = anatomy.layout.slots.get(name)
    return "" if slot is None or slot.expert is not None or slot.turned else slot.parameter


def block_prefixes(anatomy: Anatomy) -> dict[str, int]:
    """The prefix of each block's tensor names in the file, such as `model.layers.3.`, with the block's number.

    Raises UnsupportedWeight if the names of one block have several prefixes, or none that ends in the block's number.
    """
    leaf = anatomy.path.rpartition(".")[2]
    found: dict[str, int] = {}
    for index in range(len(anatomy.blocks)):
        for name in anatomy.tensors_of(index):
            start = re.match(rf"(.*?\.)?{re.escape(leaf)}\.{index}\.", name)
            if start is None:
                raise UnsupportedWeight(f"the name {name} does not contain the number of its block")
            found[start[0]] = index
    if len(found) != len(anatomy.blocks):
        raise UnsupportedWeight(f"the tensors of a block are named in several ways: {', '.join(sorted(found)[:3])}")
    return found


def with_text(config: dict[str, Any], walk: Walk, **changes: Any) -> dict[str, Any]:
    """A raw config with fields of its language model changed, under the names that its family uses for them."""
    whole = walk.model.config
    text = whole.get_text_config()
    named = {getattr(text, "attribute_map", {}).get(key, key): value for key, value in changes.items()}
    if text is whole:
        return {**config, **named}
    part = next(key for key, value in vars(whole).items() if value is text)
    return {**config, part: {**config.get(part, {}), **named}}
