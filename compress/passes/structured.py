"""Removing heads and neurons, equally many from every block; the score that ranks them is left to subclasses.

A head goes with its whole key-value group: the key and value head, the query heads that read it, and their columns of
o_proj. A neuron is a row of gate_proj and up_proj and the column of down_proj. A configuration has one head count and
one width for all blocks, so every block loses equally many. Shape suffixes: O out, I in, T tokens, G groups, K kept.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import RecipeError, UnsupportedWeight
from compress.model.architecture import skeleton
from compress.model.reshaped import (
    Made,
    Reshaped,
    check_logits,
    computed,
    parameter_of,
    sliced,
    unchanged,
    with_text,
)
from compress.model.site import Site
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.model.whole import Whole
from compress.passes.base import Reshape

OUT, NEURON = "self_attn.o_proj", "mlp.down_proj"  # the matrices that read the heads and the neurons
HEADS = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", OUT)
NEURONS = ("mlp.gate_proj", "mlp.up_proj", NEURON)
FLAGS = {OUT: "attention_bias", NEURON: "mlp_bias"}


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """The sizes of a model's blocks: key-value groups, query heads a group, values a head, neurons; the kept ones."""

    groups: int
    repeats: int
    width: int
    neurons: int
    kept_groups: int
    kept_neurons: int

    def channels(self, reader: str) -> int:
        """The number of inputs of a reader that belong to one part."""
        return self.repeats * self.width if reader == OUT else 1

    def parts(self, reader: str) -> tuple[int, int]:
        """The number of parts of a reader before and after."""
        return (self.groups, self.kept_groups) if reader == OUT else (self.neurons, self.kept_neurons)

    def removed(self) -> str:
        """What is removed, as text for the user."""
        names = {OUT: "key-value heads with their query heads", NEURON: "neurons"}
        counts = {reader: self.parts(reader) for reader in self.readers}
        said = [f"{before - after} of {before} {names[reader]}" for reader, (before, after) in counts.items()]
        return f"without {' and '.join(said)} of every block"

    @property
    def readers(self) -> list[str]:
        """The readers that lose parts."""
        return [reader for reader in (OUT, NEURON) if self.parts(reader)[0] != self.parts(reader)[1]]


@dataclass
class Choice:
    """The parts kept of each reader, in order, by its module's name, and the constant that its output gains."""

    kept: dict[str, Tensor] = field(default_factory=dict)
    gain_O: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class StructuredPruner(Reshape):
    """Remove the heads and neurons with the lowest score; a subclass defines the score."""

    heads: Annotated[float, Field(ge=0, lt=1, description="share of each block's key-value groups removed")] = 0.0
    neurons: Annotated[float, Field(ge=0, lt=1, description="share of each block's MLP neurons removed")] = 0.25
    multiple: Annotated[int, Field(ge=1, description="the number of remaining neurons is a multiple of this")] = 8

    def score(self, site: Site) -> Tensor:
        """The score of each input of o_proj or down_proj, [in]."""
        raise NotImplementedError

    def pool(self, score_GC: Tensor) -> Tensor:
        """The score of each group, [groups], from those of its channels."""
        return score_GC.sum(1)

    def constant(self, site: Site) -> Tensor:
        """The constant that replaces each input once it is removed, [in]."""
        return torch.zeros(site.shape[1], device=site.original.data.device)

    @property
    def compensates(self) -> bool:
        """Whether biases take over those constants; if not, they must be zero."""
        return False

    def outline(self, walk: Walk, source: Checkpoint) -> Reshaped:
        """The model with the first heads and neurons of each block."""
        sizes = self.sizes(walk)
        choice = Choice()
        for index in range(len(walk.blocks)):
            for reader in sizes.readers:
                name = f"{walk.path}.{index}.{reader}"
                choice.kept[name] = torch.arange(sizes.parts(reader)[1])
                if self.compensates:
                    choice.gain_O[name] = torch.zeros(walk.anatomy.modules[name].out_features)
        return narrowed(walk, source, sizes, choice, self.name)

    def reshape(self, model: Whole, source: Checkpoint) -> Reshaped:
        """The model with the best heads and neurons; each block is measured after the removals before it."""
        sizes, walk = self.sizes(model.walk), model.walk
        choice = Choice()
        with ExitStack() as cuts:
            for block in model.blocks():
                for reader in sizes.readers:
                    site = next(s for s in block.sites.values() if s.place.module == f"{block.name}.{reader}")
                    block.collect([[site]], self.requires)
                    kept_K, constant_I = self.best(site, reader, sizes), self.constant(site)
                    choice.kept[site.place.module] = kept_K
                    cut_I = removed(kept_K, sizes, reader)
                    if self.compensates:
                        w_OI = site.original.data.float()
                        choice.gain_O[site.place.module] = w_OI @ constant_I.masked_fill(~cut_I, 0)
                    cuts.callback(site.module.register_forward_pre_hook(silence(cut_I, constant_I)).remove)
                    site.stats.forget()
            meant = walk.leave(block.probe)
        made = narrowed(walk, source, sizes, choice, self.name)
        check_logits(made, walk, model.probe_NT, meant, self.name)
        return made

    def best(self, site: Site, reader: str, sizes: Sizes) -> Tensor:
        """The parts of a reader that stay, in order."""
        before, after = sizes.parts(reader)
        score_G = self.pool(self.score(site).reshape(before, -1))
        return torch.argsort(score_G, descending=True, stable=True)[:after].sort().values

    def sizes(self, walk: Walk) -> Sizes:
        """The sizes before and after.

        Raises UnsupportedWeight for a family that does not store heads or neurons this way, RecipeError if nothing
        would be removed.
        """
        text = walk.model.config.get_text_config()
        family, neurons = text.model_type, getattr(text, "intermediate_size", 0)
        if self.heads:
            require(walk, HEADS, family, f"{self.name}.heads")
        if self.neurons:
            require(walk, NEURONS, family, f"{self.name}.neurons")
        queries = getattr(text, "num_attention_heads", 0)
        groups = getattr(text, "num_key_value_heads", None) or queries
        width = getattr(text, "head_dim", None) or text.hidden_size // queries
        sizes = Sizes(
            groups=groups, repeats=queries // groups, width=width, neurons=neurons,
            kept_groups=groups - round(self.heads * groups), kept_neurons=self.kept_neurons(neurons),
        )  # fmt: skip
        self.check_sizes(walk, sizes)
        return sizes

    def kept_neurons(self, neurons: int) -> int:
        """How many of `neurons` stay; all of them if the option is 0."""
        return self.multiple * round((1 - self.neurons) * neurons / self.multiple) if self.neurons else neurons

    def check_sizes(self, walk: Walk, sizes: Sizes) -> None:
        """Raise UnsupportedWeight if the matrices have other sizes, RecipeError if nothing or everything would go."""
        if self.heads and sizes.groups == 1:
            raise UnsupportedWeight(
                f"{self.name}.heads: all query heads of {walk.model.config.model_type} share one key-value head, "
                "and only whole groups go; set it to 0"
            )
        for share, reader, what in ((self.heads, OUT, "heads"), (self.neurons, NEURON, "neurons")):
            before, after = sizes.parts(reader)
            if share and not 0 < after < before:
                named = "key-value groups" if reader == OUT else "neurons"
                raise RecipeError(
                    f"{self.name}.{what}: removing {share:g} of {before} {named} leaves {after}; at least 1 must be "
                    "removed and 1 must stay"
                )
            found = {p.shape[1] for p in walk.anatomy.places.values() if share and p.module.endswith(f".{reader}")}
            if found - {before * sizes.channels(reader)}:
                raise UnsupportedWeight(
                    f"{self.name}: {reader} reads {max(found)} values, but the config implies "
                    f"{before * sizes.channels(reader)}; {walk.model.config.model_type} is not supported"
                )
        if not sizes.readers:
            raise RecipeError(f"{self.name}: nothing would be removed; set heads or neurons")


def require(walk: Walk, parts: tuple[str, ...], family: str, option: str) -> None:
    """Raise UnsupportedWeight unless every block has these linear maps, and no other weight in their modules."""
    inner, names = parts[0].partition(".")[0], {part.partition(".")[2] for part in parts}
    for index in range(len(walk.blocks)):
        holder = f"{walk.path}.{index}.{inner}"
        for part in parts:
            if not isinstance(walk.anatomy.modules.get(f"{walk.path}.{index}.{part}"), nn.Linear):
                raise UnsupportedWeight(f"{option}: {walk.path}.{index} of {family} has no {part}; set it to 0")
        width = getattr(walk.model.config.get_text_config(), "head_dim", 0)
        for name, parameter in walk.anatomy.modules[holder].named_parameters():
            if name.partition(".")[0] not in names and tuple(parameter.shape) != (width,):
                raise UnsupportedWeight(
                    f"{option}: {holder}.{name} of {family} is shared by all {option.rpartition('.')[2]}; set it to 0"
                )


def removed(kept_K: Tensor, sizes: Sizes, reader: str) -> Tensor:
    """Which inputs of a reader are removed, bool [in]."""
    gone_G = torch.ones(sizes.parts(reader)[0], dtype=torch.bool, device=kept_K.device)
    gone_G[kept_K] = False
    return gone_G.repeat_interleave(sizes.channels(reader))


def silence(cut_I: Tensor, constant_I: Tensor) -> Callable[..., Any]:
    """A forward pre-hook that replaces the removed inputs by constants."""

    def hook(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return (torch.where(cut_I, constant_I.to(args[0].dtype), args[0]), *args[1:])

    return hook


# -- the narrower model ----------------------------------------------------------------------------


def narrowed(walk: Walk, source: Checkpoint, sizes: Sizes, choice: Choice, step: str) -> Reshaped:
    """The model with the chosen parts of each block, and with biases where the output of a reader gains a constant."""
    config = source.config
    if OUT in sizes.readers:
        config = with_text(
            config, walk, num_attention_heads=sizes.kept_groups * sizes.repeats, head_dim=sizes.width,
            num_key_value_heads=sizes.kept_groups,
        )  # fmt: skip
    if NEURON in sizes.readers:
        config = with_text(config, walk, intermediate_size=sizes.kept_neurons)
    tensors: dict[str, Made] = {}
    for name in source.names():
        entries_K, axis = entries(parameter_of(walk.anatomy, name), sizes, choice.kept)
        tensors[name] = unchanged(source, name) if entries_K is None else sliced(source, name, axis, entries_K)
    if choice.gain_O:
        config, wanted = with_biases(walk, config, sizes, step)
        tensors |= biases(walk, source, wanted, choice.gain_O)
    kept = {name: spans(kept_K.tolist()) for name, kept_K in choice.kept.items()}
    return Reshaped(source, config, tensors, sizes.removed(), kept=kept)


def entries(parameter: str, sizes: Sizes, kept: Mapping[str, Tensor]) -> tuple[Tensor | None, int]:
    """Which entries of a parameter stay, and along which axis; None if all of them do."""
    module, _, kind = parameter.rpartition(".")
    for reader, parts in ((OUT, HEADS), (NEURON, NEURONS)):
        role = next((part for part in parts if module.endswith(f".{part}")), "")
        chosen = kept.get(f"{module.removesuffix(role)}{reader}") if role else None
        if chosen is not None and (role, kind) != (reader, "bias"):
            width = sizes.width if role.endswith(("k_proj", "v_proj")) else sizes.channels(reader)
            return (chosen.cpu()[:, None] * width + torch.arange(width)).flatten(), 1 if role == reader else 0
    return None, 0


def with_biases(
    walk: Walk, config: dict[str, Any], sizes: Sizes, step: str
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A config whose readers have biases, and the parameters that it implies, on the meta device.

    Raises RecipeError for a family whose config cannot express them.
    """
    text = walk.model.config.get_text_config()
    bare = [reader for reader in sizes.readers if walk.anatomy.modules[f"{walk.path}.0.{reader}"].bias is None]
    config = with_text(config, walk, **{FLAGS[reader]: True for reader in bare if hasattr(text, FLAGS[reader])})
    wanted = skeleton(config, walk.dtype).state_dict()
    for reader in sizes.readers:
        if f"{walk.path}.0.{reader}.bias" not in wanted:
            raise RecipeError(
                f"{step}.compensate: {text.model_type} has no bias in {reader} that its config could ask for; "
                "set compensate: false"
            )
    return config, wanted


def biases(
    walk: Walk, source: Checkpoint, wanted: Mapping[str, Tensor], gain_O: Mapping[str, Tensor]
) -> dict[str, Made]:
    """The biases of readers with the constants they gain, and zeros for the others that the config now implies."""
    found: dict[str, Made] = {}
    for name in source.names():
        weight = parameter_of(walk.anatomy, name)
        module, bias = weight.removesuffix(".weight"), f"{weight.removesuffix('.weight')}.bias"
        if not weight.endswith(".weight") or not walk.anatomy.in_block(weight) or bias not in wanted:
            continue
        old = next(iter(walk.anatomy.layout.sources.get(bias, ())), None)
        if old is None or module in gain_O:
            gain = gain_O.get(module, torch.zeros(wanted[bias].shape))
            target = f"{name.removesuffix('.weight')}.bias"
            found[old or target] = computed(source, old or name, tuple(gain.shape), adder(source, old, gain))
    return found


def adder(source: Checkpoint, old: str | None, gain_O: Tensor) -> Callable[[], Tensor]:
    """A function that makes a bias, float32: the old one, if there was one, plus the constant."""
    return lambda: gain_O.cpu() if old is None else source.tensor(old).float() + gain_O.cpu()


def spans(numbers: list[int]) -> str:
    """Rising numbers as text: `0-3,7`."""
    found: list[list[int]] = []
    for number in numbers:
        if found and number == found[-1][1] + 1:
            found[-1][1] = number
        else:
            found.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in found)
