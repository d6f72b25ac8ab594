"""A LoRA adapter as a tenant of its base, which may be compressed: read from PEFT's folder, without a delta of it.

Which base an adapter was trained on is not recorded in a way that can be checked; names and shapes are.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from math import frexp
from pathlib import Path

import torch

from compress.adapters import opened, placed, whole
from compress.adapters.lora import Adapter
from compress.artifact import Artifact, is_artifact
from compress.model.anatomy import Anatomy
from compress.model.reshaped import FLOATS
from compress.model.source import Checkpoint, dtype_of
from compress.model.walk import Walk
from compress.runtime.tenants import Difference
from compress.sources import open_source
from compress.weights import Dense, Product, specify


class Base:
    """The model in a folder, dense or compressed, to which adapters are fitted; opened when the first one is."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @cached_property
    def source(self) -> Checkpoint:
        """Its tensors, as those of the dense model."""
        return Artifact(self.folder) if is_artifact(self.folder) else open_source(self.folder)

    @cached_property
    def anatomy(self) -> Anatomy:
        """Its sites."""
        return Walk(self.source.config, self.source, dtype_of(self.source.config), torch.device("cpu")).anatomy

    def parameter(self, tensor: str) -> str:
        """The name in the model of a tensor of the folder, which may lack the model's prefix."""
        slot = self.anatomy.layout.slots.get(tensor)
        return tensor if slot is None else slot.parameter

    def difference(self, folder: Path) -> Difference:
        """What an adapter adds to this model; raises ArtifactError if it does not fit or is not finite.

        All of it is read once for that, so that it is refused now and not when a client asks for it.
        """
        adapter = opened(folder)
        modules = placed(adapter, self.anatomy)
        own = {self.parameter(entry.name): entry for entry in whole(adapter, self.anatomy, self.source)}
        for module in modules:
            adapter.factors(module)
        for entry in own.values():
            entry.make()
        forms = {module: without_values(adapter, module) for module in modules}
        return Difference(
            sites=tuple(modules),
            weight=lambda module: product(adapter, module),
            form=lambda module: (specify(forms[module]), forms[module].nbytes()),
            names=tuple(own),
            shape=lambda name: own[name].shape,
            tensor=lambda name: own[name].make(),
            nbytes=sum(each.nbytes() for each in forms.values()) + sum(entry.nbytes for entry in own.values()),
        )


def product(adapter: Adapter, module: str) -> Product:
    """scale * B A of a module."""
    left_OR, right_RI = adapter.factors(module)
    return Product(Dense(left_OR), Dense(right_RI))


def without_values(adapter: Adapter, module: str) -> Product:
    """The same without values; scale * B counts as float32 where it may not fit B's dtype (see `scaled`)."""
    pair = adapter.pairs[module]
    (kind, shape_OR), (other, shape_RI) = adapter.shard.held[pair.b], adapter.shard.held[pair.a]
    exact = abs(frexp(pair.scale)[0]) in (0.0, 0.5) and (kind != "F16" or pair.scale == 1)
    left = FLOATS[kind] if exact else torch.float32
    return Product(empty(shape_OR, left), empty(shape_RI, FLOATS[other]))


def empty(shape: Sequence[int], dtype: torch.dtype) -> Dense:
    """A matrix without values."""
    return Dense(torch.empty(tuple(shape), dtype=dtype, device="meta"))


__all__ = ["Base"]
