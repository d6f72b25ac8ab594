"""What tenants may change in a base model: which module holds which tensor, and which modules share an input.

Found once per model, from its structure and from a probe (a forward pass over a few tokens), never from the name of its
family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError, UnsupportedWeight
from compress.runtime.linear import StoredWeight

PROBE = (2, 3)  # rows, tokens


@dataclass(frozen=True)
class Given:
    """The input of a module in the probe: an identifier of the tensor, its shape, and whether it is floating-point."""

    number: int
    shape: tuple[int, ...]
    real: bool


@dataclass(frozen=True)
class Layout:
    """The layout of a model; modules go by their names in `named_modules`.

    `holders` maps the name of a tensor to the (module, parameter) pairs that compute with it, several if it is tied.
    `given` maps a module to its input in the probe. `groups` maps a module to all modules that are given the very same
    input tensor, itself included, in the order of their calls.
    """

    holders: Mapping[str, tuple[tuple[str, str], ...]]
    given: Mapping[str, Given]
    groups: Mapping[str, tuple[str, ...]]

    def of_tensor(self, name: str, given: tuple[int, ...], model: nn.Module) -> tuple[tuple[str, str], ...]:
        """The holders of a tensor of a tenant, of the shape `given`.

        Raises ArtifactError if the base has no such tensor, or one of another shape.
        """
        held = self.check_tensor(name)
        shape = tuple(getattr(model.get_submodule(held[0][0]), held[0][1]).shape)
        if tuple(given) != shape:
            raise ArtifactError(
                f"{name}: the tenant's is {tuple(given)}, the base's {shape}; a grown vocabulary cannot share a "
                "batch with its base: apply the delta and serve the result on its own"
            )
        return held

    def check_tensor(self, name: str) -> tuple[tuple[str, str], ...]:
        """The holders of a tensor.

        Raises ArtifactError if the base has no such tensor, UnsupportedWeight if the rows of a batch are not apart in
        the input of a holder: they may only be equal, as the positions of learned position embeddings are.
        """
        held = self.holders.get(name)
        if held is None:
            raise ArtifactError(f"{name}: the base has no tensor of this name, or holds it compressed")
        for module, _ in held:
            given = self.given.get(module)
            if given is None or given.shape[0] not in (1, PROBE[0]):
                raise UnsupportedWeight(
                    f"{name}: cannot differ between the rows of a batch: {module} is not given the rows as they are "
                    "(routers of experts are given all tokens in one)"
                )
        return held

    def of_site(self, site: str, model: nn.Module) -> list[str]:
        """The modules that compute with the matrix of a site.

        Raises UnsupportedWeight if there is none, or if its input is not all tokens of every row of the batch.
        """
        names = [module for module, _ in self.holders.get(f"{site}.weight", ((site, "weight"),))]
        for name in names:
            given = self.given.get(name)
            looked_up = given is not None and isinstance(model.get_submodule(name), nn.Embedding)
            if given is None or given.shape[0] != PROBE[0] or len(given.shape) != (2 if looked_up else 3):
                raise UnsupportedWeight(
                    f"{site}: cannot differ between the rows of a batch: the base has no module of this name that is "
                    "given all tokens of every row (experts are given only some)"
                )
        return names


def layout(model: nn.Module) -> Layout:
    """Find the layout of a model; costs one forward pass over a few tokens."""
    tensors: dict[int, list[tuple[str, str]]] = {}
    for module_name, module in model.named_modules():
        for parameter, tensor in module.named_parameters(recurse=False, remove_duplicate=False):
            tensors.setdefault(id(tensor), []).append((module_name, parameter))
    holders = {".".join(one): tuple(held) for held in tensors.values() for one in held}
    given = probe(model)
    shared: dict[int, list[str]] = {}
    for name, told in given.items():
        shared.setdefault(told.number, []).append(name)
    return Layout(holders, given, {name: tuple(shared[told.number]) for name, told in given.items()})


def units(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The modules without children and the compressed layers, whose children compute parts of them."""
    within = ""
    for name, module in model.named_modules():
        if within and name.startswith(within):
            continue
        if isinstance(module, StoredWeight):
            within = f"{name}."
        if name and (isinstance(module, StoredWeight) or not any(True for _ in module.children())):
            yield name, module


def probe(model: nn.Module) -> dict[str, Given]:
    """The input of every unit, in the order of their calls."""
    kept: list[Tensor] = []  # keeps inputs alive, so that no id is reused for another tensor
    found: dict[str, Given] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                kept.append(args[0])
                found[name] = Given(id(args[0]), tuple(args[0].shape), args[0].is_floating_point())

        return hook

    hooks = [module.register_forward_pre_hook(note(name)) for name, module in units(model)]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(PROBE, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return found
