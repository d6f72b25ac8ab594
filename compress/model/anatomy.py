"""The parts of a model, from headers and the architecture alone: sites, routers, and tensors that no pass touches.

A site is one matrix [out, in] that a pass may rewrite: the weight of an `nn.Linear` or `Conv1D` inside a block, or
one expert's matrix in a stack. It has the tensor's name in the file, without `.weight`; an expert in a tensor that
holds a whole stack has that tensor's name followed by its number.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

from torch import Tensor, nn

from compress.errors import UnsupportedWeight
from compress.model.family import (
    ROUTER,
    find_blocks,
    is_linear,
    is_transposed,
    language_part,
    stacks,
    stacks_transposed,
)
from compress.model.globs import matches
from compress.model.layout import Layout, Shape

MISSED = "a matrix that no pass can reach"
EXPERT = re.compile(r"\bexperts\.\d+\.")


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the weight [out, in] of a site lies in the model and in the file.

    `expert` and `rows` select the matrix in a stack; `transposed` means that the model keeps [in, out]. `routed` sites
    see only the tokens that a router sends them. Routed sites with equal `peers` do not depend on each other.
    """

    site: str
    tensor: str
    module: str
    parameter: str = "weight"
    expert: int | None = None
    rows: tuple[int, int] | None = None
    transposed: bool = False
    shape: tuple[int, int]
    routed: bool = False
    peers: str = ""
    stacked: bool = False  # the tensor in the file holds the matrices of all experts
    turned: bool = False  # that tensor holds them transposed relative to the model

    def within(self, parameter: Tensor) -> Tensor:
        """The view [out, in] of this place in the parameter that holds it, or in a tensor of its shape (a gradient)."""
        w = parameter if self.expert is None else parameter[self.expert]
        w = w.T if self.transposed else w
        return w if self.rows is None else w[self.rows[0] : self.rows[1]]


class Anatomy:
    """The parts of a (meta) model, by the tensor names of a file: the path of its blocks, and a place for each site."""

    def __init__(self, model: Any, shapes: Mapping[str, Shape] | None) -> None:
        self.model, self.layout = model, Layout(model, shapes)
        count = getattr(model.config.get_text_config(), "num_hidden_layers", 0)
        self.path, self.blocks = find_blocks(model, count)
        self.modules = dict(model.named_modules())
        self.text = next((n for n, m in self.modules.items() if m is language_part(model)), "")
        self._refuse_shared()
        self.mixtures = self._mixtures()
        order = {name: i for i, name in enumerate(self.modules)}
        found = [place for name in self.layout.slots for place in self._places(name)]
        found.sort(key=lambda p: (order[p.module], p.parameter, p.expert or 0, p.rows or (0, 0), p.site))
        self.places = {place.site: place for place in found}  # in the order of the model's modules

    def _refuse_shared(self) -> None:
        """Raise UnsupportedWeight if two names inside blocks share one parameter, which would be rewritten twice."""
        first: dict[int, str] = {}
        for name, parameter in self.model.named_parameters(remove_duplicate=False):
            if self.in_block(name) and first.setdefault(id(parameter), name) != name:
                raise UnsupportedWeight(
                    f"{first[id(parameter)]} and {name} are one parameter; blocks that share weights are not supported"
                )
        twice = [name for name in self.layout.tied if self.in_block(name)]
        if twice:
            raise UnsupportedWeight(
                f"{twice[0]} is tied to another weight; blocks that share weights are not supported"
            )

    def in_block(self, parameter: str) -> bool:
        """Whether a parameter or module of the model belongs to a block."""
        return parameter.startswith(f"{self.path}.")

    def in_language(self, parameter: str) -> bool:
        """Whether a parameter is needed to turn token ids into logits."""
        return not self.text or parameter.startswith(f"{self.text}.") or parameter in self.heads

    @cached_property
    def heads(self) -> set[str]:
        """The parameters of the output head."""
        head = self.model.get_output_embeddings()
        names = [] if head is None else [name for name, module in self.modules.items() if module is head]
        return {f"{name}.{parameter}" for name in names for parameter in self.modules[name]._parameters}

    def of_block(self, index: int) -> list[Place]:
        """The sites of one block."""
        prefix = f"{self.path}.{index}."
        return [place for place in self.places.values() if place.module.startswith(prefix)]

    def parameters_of(self, index: int) -> list[str]:
        """The parameters and stored buffers of one block."""
        return [name for name in self.layout.wanted if name.startswith(f"{self.path}.{index}.")]

    def tensors_of(self, index: int) -> list[str]:
        """The tensors of the file from which one block is loaded."""
        layout = self.layout
        return sorted({s for name in self.parameters_of(index) for s in layout.sources.get(name, ())})

    def frame(self) -> list[str]:
        """The tensors of the file outside all blocks, including those that the architecture does not know."""
        inside = {s for p, sources in self.layout.sources.items() if self.in_block(p) for s in sources}
        return sorted(set(self.layout.shapes or ()) - inside)

    # -- sites -------------------------------------------------------------------------------------

    def _mixtures(self) -> set[str]:
        """The mixture-of-experts modules, which hold experts and normally a router."""
        lists = {n.rpartition(".experts")[0] for n in self.modules if n.endswith(".experts")}
        stacked = {n.rpartition(".")[0] for n, m in self.modules.items() if self.in_block(n) and stacks(m)}
        return {name for name in lists | stacked if self.in_block(name)}

    def is_router(self, module: str) -> bool:
        """Whether a module of a mixture decides which experts a token visits, or how they are weighted."""
        return any(
            module.startswith(f"{mixture}.")
            and not EXPERT.search(module)
            and ROUTER.search(module.removeprefix(f"{mixture}.")) is not None
            for mixture in self.mixtures
        )

    def _places(self, tensor: str) -> list[Place]:
        """The sites that one tensor of the file holds."""
        slot, shape = self.layout.slots[tensor], self.layout.shape(tensor)
        path, _, parameter = slot.parameter.rpartition(".")
        module, site = self.modules.get(path, nn.Module()), tensor.removesuffix(".weight")
        if not self.in_block(slot.parameter) or self.is_router(path):
            return []
        if slot.expert is not None and parameter in stacks(module) and len(shape) == 2:
            height, width = shape
            return [
                Place(
                    site=site, tensor=tensor, module=path, parameter=parameter, expert=slot.expert, rows=slot.rows,
                    shape=(height, width), routed=True, peers=slot.parameter,
                )
            ]  # fmt: skip
        if slot.expert is None and parameter in stacks(module):
            swapped = stacks_transposed(module)
            height, width = (shape[2], shape[1]) if swapped != slot.turned else (shape[1], shape[2])
            return [
                Place(
                    site=f"{site}.{expert}", tensor=tensor, module=path, parameter=parameter, expert=expert,
                    transposed=swapped, shape=(height, width), routed=True, peers=slot.parameter,
                    stacked=True, turned=slot.turned,
                )
                for expert in range(shape[0])
            ]  # fmt: skip
        if is_linear(module) and parameter == "weight" and len(shape) == 2:
            swapped, routed = is_transposed(module), EXPERT.search(path) is not None
            height, width = (shape[1], shape[0]) if swapped else (shape[0], shape[1])
            return [
                Place(
                    site=site, tensor=tensor, module=path, transposed=swapped, shape=(height, width), routed=routed,
                    peers=EXPERT.sub("experts.*.", path) if routed else path,
                )
            ]  # fmt: skip
        return []


# -- coverage --------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Coverage:
    """Which tensors the passes will touch, with their number of parameters; (parameters, reason) for all others.

    `missed` counts the parameters of matrices inside blocks that no pass can reach. Sites that a recipe deselects by
    `sites`, embeddings, heads, norms and routers are listed as untouched, but do not count as missed.
    """

    touched: dict[str, int]
    untouched: dict[str, tuple[int, str]]
    missed: int

    @property
    def missed_share(self) -> float:
        """Parameters of unreachable block matrices, divided by those plus the parameters of touched ones."""
        meant = self.missed + sum(self.touched.values())
        return self.missed / meant if meant else 0.0

    def reasons(self) -> dict[str, int]:
        """The number of untouched parameters by reason."""
        return by_reason(self.untouched.values())


def by_reason(untouched: Iterable[Sequence[Any]]) -> dict[str, int]:
    """The number of parameters by reason, from (parameters, reason) pairs."""
    total: dict[str, int] = {}
    for size, reason in untouched:
        total[reason] = total.get(reason, 0) + size
    return total


def coverage(anatomy: Anatomy, selections: Iterable[str]) -> Coverage:
    """The coverage of passes with the `sites` globs `selections`, counted over every tensor of the file."""
    globs = tuple(selections)
    deselected = "deselected by the recipe" if globs else "the recipe only changes the shape"
    touched: dict[str, int] = {}
    untouched: dict[str, tuple[int, str]] = {}
    missed = 0
    held: dict[str, list[Place]] = {}
    for place in anatomy.places.values():
        held.setdefault(place.tensor, []).append(place)
    for tensor, shape in (anatomy.layout.shapes or {}).items():
        if tensor not in held:
            reason = why_untouched(anatomy, tensor, shape)
            untouched[tensor] = (prod(shape), reason)
            missed += prod(shape) if reason == MISSED else 0
        for place in held.get(tensor, ()):
            name = tensor if len(held[tensor]) == 1 else place.site
            if any(matches(place.site, glob) for glob in globs):
                touched[name] = prod(place.shape)
            else:
                untouched[name] = (prod(place.shape), deselected)
    return Coverage(touched=touched, untouched=untouched, missed=missed)


def why_untouched(anatomy: Anatomy, tensor: str, shape: Shape) -> str:
    """Why no pass may touch a tensor that holds no site."""
    layout = anatomy.layout
    if tensor in layout.unknown:
        return "unknown to the architecture"
    slot = layout.slots.get(tensor)
    if slot is None:  # a conversion of transformers reads it
        inside = any(anatomy.in_block(p) for p, sources in layout.sources.items() if tensor in sources)
        return MISSED if inside and len(shape) > 1 else "stored in another form than the model keeps it"
    path, _, parameter = slot.parameter.rpartition(".")
    if not anatomy.in_language(slot.parameter):
        return "not part of the language model"
    if anatomy.is_router(path) and anatomy.in_block(slot.parameter) and len(shape) > 1:
        return "a router"
    stacked_bias = "bias" in parameter and bool(stacks(anatomy.modules[path]))
    if slot.parameter not in layout.parameters:
        return "a buffer: not a weight"
    if len(shape) < 2 or prod(shape) == max(shape) or stacked_bias:
        return "a vector: norm or bias"
    if "conv" in type(anatomy.modules[path]).__name__.lower() or "conv" in path.rpartition(".")[2]:
        return "a convolution"
    if anatomy.in_block(slot.parameter):
        return MISSED
    same = {
        slot.parameter,
        layout.tied.get(slot.parameter),
        *(k for k, v in layout.tied.items() if v == slot.parameter),
    }
    return "the output head, or an embedding tied to it" if same & anatomy.heads else "an embedding"
