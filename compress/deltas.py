"""How a delta stores the tensors that no pass rewrites, and against which base.

Such a tensor is taken from the base, or stored whole, or stored as a difference in eight bits, as the recipe says for
embeddings, the head and the rest. This module makes the model that the stored tensors will denote, so that statistics
are measured on what will be served; the driver writes it. Shape suffixes: O out, I in, V vocabulary, D hidden.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifact import cast_as, fingerprint, padded
from compress.errors import ArtifactError, RecipeError
from compress.model.anatomy import Anatomy
from compress.model.reshaped import FLOATS, Made, Reshaped, unchanged
from compress.model.source import Checkpoint, display_name, locate
from compress.model.walk import BASE, Walk
from compress.recipe import Delta
from compress.sources import open_source
from compress.weights import External, Grid, Sum, Weight

EIGHT = Grid(bits=8, group=0, symmetric=True)


@dataclass(frozen=True, kw_only=True)
class Against:
    """A base, and a recipe's policies for the tensors that no pass rewrites."""

    base: Checkpoint
    options: Delta
    anatomy: Anatomy
    source: Checkpoint
    tabled: dict[str, Weight] = field(default_factory=dict)  # cache of `coded`: tables as codes

    @property
    def pin(self) -> dict[str, str]:
        """How a delta identifies its base: by name and by fingerprint."""
        return {"name": display_name(self.base.path), "sha256": fingerprint(self.base)}

    @cached_property
    def sites(self) -> set[str]:
        """The tensors of the file that hold sites."""
        return {place.tensor for place in self.anatomy.places.values()}

    @cached_property
    def tables(self) -> dict[str, str]:
        """The tensors of embeddings and of the head, each with the name of the option that governs it."""
        modules, layout = self.anatomy.modules, self.anatomy.layout
        outside = [n for n, m in modules.items() if isinstance(m, nn.Embedding) and not self.anatomy.in_block(n)]
        embedded = {f"{name}.weight" for name in outside}
        heads = {name for name in self.anatomy.heads if name.endswith(".weight")}
        found: dict[str, str] = {}
        for name, slot in layout.slots.items():
            same = {slot.parameter, layout.tied.get(slot.parameter, slot.parameter)}
            if same & embedded:
                found[name] = "embeddings"
            elif same & heads:
                found[name] = "head"
        return found

    def policy(self, name: str) -> str:
        """How a tensor is stored if no pass rewrites it: `own`, `int8` or `base`."""
        if name in self.sites or name in self.anatomy.layout.unknown:
            return "own"
        return str(getattr(self.options, self.tables.get(name, "others")))

    def same(self, name: str) -> bool:
        """Whether a tensor of the fine-tuned model equals the base's, cast to its dtype; reads both."""
        if name not in self.base or self.base.headers[name].shape != self.source.headers[name].shape:
            return False
        return bool(torch.equal(self.of_base(name), self.source.tensor(name)))

    def of_base(self, name: str) -> Tensor:
        """A tensor of the base in the dtype that the fine-tuned model has."""
        return cast_as(self.base.tensor(name), self.source.headers[name].dtype)

    @cached_property
    def cast(self) -> dict[str, str]:
        """The fine-tuned model's dtype of each floating-point tensor that has another dtype in the base."""
        own, base = self.source.headers, self.base.headers
        both = {name: held.dtype for name, held in own.items() if name in base and held.dtype in FLOATS}
        return {name: dtype for name, dtype in both.items() if base[name].dtype in FLOATS and base[name].dtype != dtype}

    def check(self) -> None:
        """Check that the base fits the fine-tuned model, and that the policies can be followed.

        Family, names and shapes must be the same; only embeddings and the head may have another number of rows. Raises
        ArtifactError if the architectures differ, RecipeError for a policy that cannot be followed.
        """
        kinds = [str(model.config.get("model_type")) for model in (self.source, self.base)]
        if kinds[0] != kinds[1]:
            raise ArtifactError(f"{self.source.path} is a {kinds[0]}, its base {self.base.path} a {kinds[1]}")
        for name, held in self.source.headers.items():
            policy = self.policy(name)
            there = self.base.headers.get(name)
            if there is None and name in self.sites:
                raise ArtifactError(
                    f"{self.base.path}: no tensor {name!r}, which {self.source.path} has{self.otherwise_named(name)}"
                )
            if there is None and policy != "own":
                option = self.tables.get(name, "others")
                raise RecipeError(f"delta.{option}: {name} is not in the base {self.base.path}; it must be own")
            if there is None or there.shape == held.shape:
                continue
            if name not in self.tables or there.shape[1:] != held.shape[1:]:
                raise ArtifactError(
                    f"{name} has shape {held.shape}, in the base {there.shape}: {self.source.path} was not fine-tuned "
                    f"from {self.base.path}"
                )
            self.check_grown(name, held.shape[0] - there.shape[0], policy)

    def otherwise_named(self, name: str) -> str:
        """What to do if the files differ in the model's prefix, which those of some models on the hub lack."""
        names = self.base.headers
        other = next((n for n in names if name.endswith(f".{n}") or n.endswith(f".{name}")), None)
        return f"; it has {other!r}: load it with transformers and save it again" if other else ""

    def check_grown(self, name: str, more: int, policy: str) -> None:
        """Raise RecipeError if the policy refuses, or cannot store, a vocabulary of another size than the base's."""
        if self.options.vocabulary == "refuse":
            raise RecipeError(
                f"delta.vocabulary: {name} has {more:+} rows compared with the base's, and the option is refuse"
            )
        if policy == "base" or (policy == "int8" and more < 0):
            raise RecipeError(
                f"delta.{self.tables[name]}: {name} has {more:+} rows compared with the base's; it must be own"
            )

    @property
    def lossless(self) -> bool:
        """Whether every tensor that no pass rewrites is kept exactly."""
        return {self.options.embeddings, self.options.head, self.options.others} == {"own"}

    def own(self, names: Sequence[str]) -> list[str]:
        """Those of these tensors that are stored whole."""
        return [name for name in names if self.policy(name) == "own" and not self.same(name)]

    def coded_of(self, names: Sequence[str]) -> dict[str, Weight]:
        """The expression of each of these tensors whose difference is stored in eight bits."""
        return {name: self.coded(name) for name in names if self.policy(name) == "int8" and not self.same(name)}

    def coded(self, name: str) -> Weight:
        """The expression of a table whose difference is stored in eight bits."""
        if name not in self.tabled:
            own = self.source.tensor(name)
            beside = External(padded(self.of_base(name), len(own)), BASE, name)
            self.tabled[name] = Sum((beside, EIGHT.quantize(own.float() - beside.data.float())))
        return self.tabled[name]

    def record(self, name: str, weight: Weight) -> dict[str, Any]:
        """The ledger row of a table stored in eight bits; its error is relative to the difference from the base."""
        own = self.source.tensor(name).float()
        difference = own - padded(self.of_base(name), len(own)).float()
        error = (weight.dense().float() - own).norm() / difference.norm().clamp(min=1e-30)
        return {
            "weight": weight.describe(), "bytes": weight.nbytes(), "weight_error": float(error), "output_error": None,
            "tokens": 0, "fallbacks": [], "starved": [],
        }  # fmt: skip

    def read_back(self, name: str) -> Tensor:
        """The dense value of `coded`, in the tensor's dtype."""
        return self.coded(name).dense().to(FLOATS[self.source.headers[name].dtype])

    def kept(self) -> Reshaped:
        """The fine-tuned model with the tensors that no pass rewrites as they will be stored."""
        made: dict[str, Made] = {}
        for name in self.source.names():
            as_it_is = unchanged(self.source, name)
            match self.policy(name):
                case "base":
                    made[name] = Made(shape=as_it_is.shape, like=name, make=partial(self.of_base, name))
                case "int8":
                    made[name] = Made(shape=as_it_is.shape, like=name, make=partial(self.read_back, name))
                case _:
                    made[name] = as_it_is
        return Reshaped(self.source, self.source.config, made, "beside its base")


def against(delta: Delta, source: Checkpoint, walk: Walk) -> Against:
    """Open the base that a recipe names and check it against the fine-tuned model `source`.

    Raises ArtifactError if it cannot be read or has another architecture, RecipeError if it is the model itself or is
    not stored plainly, or for a policy that cannot be followed.
    """
    base = open_source(locate(delta.base))
    if base.path.resolve() == source.path.resolve():
        raise RecipeError(f"delta.base: {base.path} is the model itself; give the model that it was fine-tuned from")
    if base.decoded_from:
        raise RecipeError(f"delta.base: {base.path} is stored as {base.decoded_from}; a base must be unquantized")
    found = Against(base=base, options=delta, anatomy=walk.anatomy, source=source)
    found.check()
    return found
