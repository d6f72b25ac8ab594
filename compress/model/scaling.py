"""Scales moved between a writer and its readers: the model's output stays the same, its weights are easier to round.

A writer is a norm or a linear map; its readers are the sites that multiply its output. Which pairs can be scaled is
found by structure and checked on the probe, not listed by family: a candidate is rejected if its block's output changes
when its channels are scaled by powers of two. Shape suffixes: C channels of the writer, I inputs of the readers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from compress.model.anatomy import Anatomy
from compress.model.block import Block
from compress.model.reshaped import Made, Reshaped, computed, parameter_of, unchanged
from compress.model.site import Site
from compress.model.source import Checkpoint

NAMED = (
    ("v_proj", "o_proj"), ("v_proj", "out_proj"), ("up_proj", "down_proj"), ("fc1", "fc2"),
)  # fmt: skip  # (writer, reader) among linear maps
SAME = 1e-3  # relative; scaling by powers of two introduces no rounding


@dataclass(frozen=True, eq=False)
class Scale:
    """The factors of a parameter along its outputs and inputs, and whether it stands for 1 + itself (`shifted`)."""

    outputs: Tensor | None = None
    inputs: Tensor | None = None
    transposed: bool = False
    shifted: bool = False

    def of(self, parameter: Tensor) -> Tensor:
        """The parameter after scaling, float32."""
        w = parameter.float().T if self.transposed else parameter.float()
        if self.outputs is not None:
            by = self.outputs.to(w.device).view(-1, *[1] * (w.ndim - 1))
            w = (w + 1) * by - 1 if self.shifted else w * by
        if self.inputs is not None:
            w = w * self.inputs.to(w.device)
        return w.T if self.transposed else w

    def then(self, other: Scale) -> Scale:
        """The scale that applies both."""
        kinds = self.transposed or other.transposed, self.shifted or other.shifted
        return Scale(times(self.outputs, other.outputs), times(self.inputs, other.inputs), *kinds)


def times(left: Tensor | None, right: Tensor | None) -> Tensor | None:
    """The product of two factors, where None stands for 1."""
    return right if left is None else left if right is None else left * right


Scales = dict[str, Scale]  # by parameter name


@dataclass(frozen=True, kw_only=True, eq=False)
class Pair:
    """A writer, by its module's name, and its readers; `channel_I` maps each of their inputs to a writer's channel."""

    writer: str
    module: nn.Module
    readers: tuple[Site, ...]
    channel_I: Tensor
    shifted: bool = False

    @property
    def channels(self) -> int:
        """The number of channels of the writer."""
        return int(self.channel_I.max()) + 1

    def scales(self, scale_C: Tensor) -> Scales:
        """The scales that divide the writer's channels by `scale_C` and multiply the readers' inputs by it."""
        transposed = type(self.module).__name__ == "Conv1D"
        found = {f"{self.writer}.weight": Scale(1 / scale_C, None, transposed, self.shifted)}
        if getattr(self.module, "bias", None) is not None:
            found[f"{self.writer}.bias"] = Scale(1 / scale_C)
        for site in self.readers:
            found[f"{site.place.module}.weight"] = Scale(None, scale_C[self.channel_I], site.transposed)
        return found

    def pooled(self, value_I: Tensor) -> Tensor:
        """The mean of `value_I` over the inputs of each channel, [C]."""
        total_C = torch.zeros(self.channels, device=value_I.device).index_add_(0, self.channel_I, value_I)
        return total_C / torch.bincount(self.channel_I, minlength=self.channels)

    def largest(self, value_I: Tensor) -> Tensor:
        """The maximum of `value_I` over the inputs of each channel, [C]; values must not be negative."""
        return torch.zeros(self.channels, device=value_I.device).scatter_reduce_(0, self.channel_I, value_I, "amax")


@contextmanager
def applied(block: Block, scales: Mapping[str, Scale]) -> Iterator[None]:
    """Inside, the block computes with scaled parameters, in their own dtype."""
    modules = {f"{block.name}.{path}": module for path, module in block.module.named_modules()}
    with ExitStack() as stack:
        for name, scale in scales.items():
            module, _, leaf = name.rpartition(".")
            parameter = getattr(modules[module], leaf)
            stack.callback(setattr, parameter, "data", parameter.data)
            parameter.data = scale.of(parameter.data).to(parameter.dtype)
        yield


def pairs_of(block: Block, config: Any) -> list[Pair]:
    """The pairs of a block that can be scaled, each checked on the probe."""
    known = {s.place.module: s for s in block.sites.values() if s.whole and s.place.rows is None}
    candidates = [*norm_pairs(block, known), *named_pairs(block, known, config)]
    before = block.probe.through(block.module, block.index).float()
    found = (next((pair for pair in kinds if proved(block, pair, before)), None) for kinds in candidates)
    return [pair for pair in found if pair is not None]


def proved(block: Block, pair: Pair, before: Tensor) -> bool:
    """Whether the block's output on the probe stays the same when the pair's channels are scaled by 1/2, 1 or 2."""
    powers = torch.randint(-1, 2, (pair.channels,), generator=torch.Generator().manual_seed(0))
    with applied(block, pair.scales(torch.exp2(powers.float()).to(before.device))):
        after = block.probe.through(block.module, block.index).float()
    return bool((after - before).norm() <= SAME * before.norm())


def norm_pairs(block: Block, known: Mapping[str, Site]) -> list[list[Pair]]:
    """Candidates whose writer is a norm and whose readers are all sites.

    Each comes with a plain gain, and, if the norm has no bias, also with a gain that stands for 1 + itself.
    """
    found = []
    for writer, module, consumers in consumers_of_norms(block):
        if consumers and all(name in known for name in consumers):
            readers = tuple(known[name] for name in dict.fromkeys(consumers))
            channel_I = torch.arange(readers[0].shape[1], device=readers[0].original.data.device)
            kinds = (False,) if getattr(module, "bias", None) is not None else (False, True)
            found.append(
                [Pair(writer=writer, module=module, readers=readers, channel_I=channel_I, shifted=k) for k in kinds]
            )
    return found


def consumers_of_norms(block: Block) -> list[tuple[str, nn.Module, list[str]]]:
    """(name, module, consumers) of each norm, found on the probe.

    Consumers are the modules with parameters of their own that receive the norm's output.
    """
    modules = {f"{block.name}.{path}": module for path, module in block.module.named_modules() if path}
    written: list[tuple[str, Tensor]] = []
    read: dict[str, list[str]] = {}

    def gave(name: str) -> Any:
        return lambda _, __, out: written.append((name, out)) if isinstance(out, Tensor) else None

    def took(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for value in (*args, *kwargs.values()):
                read.setdefault(next((writer for writer, out in written if out is value), ""), []).append(name)

        return hook

    norms = {name for name, module in modules.items() if getattr(module, "weight", None) is not None
             and module.weight.ndim == 1 and not list(module.children())}  # fmt: skip
    with ExitStack() as hooks:
        for name, module in modules.items():
            if name in norms:
                hooks.callback(module.register_forward_hook(gave(name)).remove)
            elif next(module.parameters(recurse=False), None) is not None:
                hooks.callback(module.register_forward_pre_hook(took(name), with_kwargs=True).remove)
        block.probe.through(block.module, block.index)
    return [(name, modules[name], read.get(name, [])) for name in modules if name in norms]


def named_pairs(block: Block, known: Mapping[str, Site], config: Any) -> list[list[Pair]]:
    """Candidates whose writer and reader are linear maps, found by the names in NAMED."""
    found = []
    for path, parent in block.module.named_modules():
        for writes, reads in NAMED:
            writer, reader = (".".join(part for part in (block.name, path, leaf) if part) for leaf in (writes, reads))
            if writer in known and reader in known:
                channel_I = channels_of(known[writer].shape[0], known[reader].shape[1], config)
                if channel_I is not None:
                    channel_I = channel_I.to(known[reader].original.data.device)
                    module = getattr(parent, writes)
                    found.append([Pair(writer=writer, module=module, readers=(known[reader],), channel_I=channel_I)])
    return found


def channels_of(written: int, read: int, config: Any) -> Tensor | None:
    """The writer's output channel behind each input of the reader; None if the widths do not fit.

    With grouped-query attention, each value head is repeated for its query heads.
    """
    if written == read:
        return torch.arange(read)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if read % written or written % width:
        return None
    input_I = torch.arange(read)
    channel_I: Tensor = input_I // (width * (read // written)) * width + input_I % width
    return channel_I


def scaled_model(
    source: Checkpoint, anatomy: Anatomy, scales: Mapping[str, Scale], change: str, **facts: Any
) -> Reshaped:
    """The model with its parameters scaled, each rounded once to its own dtype."""
    tensors = {name: made(source, name, scales.get(parameter_of(anatomy, name))) for name in source.names()}
    return Reshaped(source, source.config, tensors, change, **facts)


def made(source: Checkpoint, name: str, scale: Scale | None) -> Made:
    """One tensor of a scaled model."""
    if scale is None:
        return unchanged(source, name)
    return computed(source, name, source.headers[name].shape, lambda: scale.of(source.tensor(name)))
