"""What of a base model tenants may differ in: which module holds which tensor, and which modules share an input.

Found once, by structure and by a probe of a few tokens, never by the name of a family.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError, UnsupportedWeight

PROBE = (2, 3)  # rows, tokens


@dataclass(frozen=True)
class Given:
    """What the probe gave a module: which tensor, by number, its shape, and whether it is real."""

    number: int
    shape: tuple[int, ...]
    real: bool


@dataclass(frozen=True)
class Layout:
    """Names of modules, as the model knows them.

    `holders` are the (module, parameter) that compute with a tensor: several where it is tied. `groups` are the modules
    given one and the same input as this one, in the order of their calls.
    """

    holders: Mapping[str, tuple[tuple[str, str], ...]]
    given: Mapping[str, Given]
    groups: Mapping[str, tuple[str, ...]]

    def of_tensor(self, name: str, tensor: Tensor, model: nn.Module) -> tuple[tuple[str, str], ...]:
        """Who computes with a tensor; raises ArtifactError if nobody does, or with another shape."""
        held = self.holders.get(name)
        if held is None:
            raise ArtifactError(f"{name}: the base computes with no tensor of this name")
        shape = tuple(getattr(model.get_submodule(held[0][0]), held[0][1]).shape)
        if tuple(tensor.shape) != shape:
            raise ArtifactError(
                f"{name}: the tenant's is {tuple(tensor.shape)}, the base's {shape}; a grown vocabulary cannot share a "
                "batch with its base: apply the delta and serve the result on its own"
            )
        return held

    def of_site(self, site: str, model: nn.Module) -> list[str]:
        """The modules that compute with the matrix of a site.

        Raises UnsupportedWeight if there is none, or if it is not told which rows of the batch it is given.
        """
        names = [module for module, _ in self.holders.get(f"{site}.weight", ((site, "weight"),))]
        for name in names:
            given = self.given.get(name)
            looked_up = given is not None and isinstance(model.get_submodule(name), nn.Embedding)
            if given is None or given.shape[0] != PROBE[0] or len(given.shape) != (2 if looked_up else 3):
                raise UnsupportedWeight(
                    f"{site}: cannot differ between the rows of a batch: the base has no module of this name that is "
                    "given all tokens of every row (experts are given some)"
                )
        return names


def layout(model: nn.Module) -> Layout:
    """What there is in a model; costs one forward pass of a few tokens."""
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


def probe(model: nn.Module) -> dict[str, Given]:
    """What every module without children is given, in the order of their calls."""
    kept: list[Tensor] = []  # so that no two inputs are one after the other at one address
    found: dict[str, Given] = {}

    def note(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
            if args and isinstance(args[0], Tensor):
                kept.append(args[0])
                found[name] = Given(id(args[0]), tuple(args[0].shape), args[0].is_floating_point())

        return hook

    leaves = [(name, m) for name, m in model.named_modules() if name and not any(True for _ in m.children())]
    hooks = [module.register_forward_pre_hook(note(name)) for name, module in leaves]
    try:
        with torch.inference_mode():
            model(input_ids=torch.zeros(PROBE, dtype=torch.long, device=next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    return found
