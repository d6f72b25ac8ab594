"""Removing whole blocks: those that change the hidden state least, or the span that rotates it least.

Shape suffixes: B batch, T tokens, D hidden, N windows.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn import functional as F

from compress.errors import RecipeError
from compress.model.reshaped import (
    Made,
    Reshaped,
    block_prefixes,
    check_logits,
    unchanged,
    with_text,
)
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.model.whole import Whole
from compress.passes.base import Reshape

COUNTS = ("max_window_layers", "first_k_dense_replace")  # number of first blocks that are of another kind
NUMBERS = ("mlp_only_layers", "moe_layers", "attn_layer_indices")  # indices of blocks of another kind
# lists of a config that are not per block, even if they happen to have as many entries as there are blocks
NOT_BLOCKS = ("architectures", "_token_id", "time_step_limit")


@dataclass(frozen=True, kw_only=True)
class ShortGPT(Reshape, name="shortgpt"):
    """Remove the blocks that change the hidden state least, by 1 - cos between their input and their output.

    `lowest` removes the blocks of lowest influence, each measured in the dense model; `contiguous` removes the span
    whose input and output differ by the smallest angle at the last token of a window. The remaining blocks are
    renumbered, in the tensor names and in every list of the config that has an entry for each block. A family that uses
    a block's index in any other way is refused, because its logits then differ from those of the model whose blocks
    were left out.
    Source: Men et al., "ShortGPT: Layers in Large Language Models are More Redundant Than You Expect", 2024, block
    influence (`lowest`); Gromov et al., "The Unreasonable Ineffectiveness of the Deeper Layers", 2024, angular distance
    (`contiguous`), without its healing by finetuning. Deviation: the first and the last block stay unless `protect`
    says otherwise; in ShortGPT any block may go.
    """

    blocks: Annotated[
        int | float, Field(gt=0, description="number of blocks to remove; below 1: the share of them")
    ] = 0.25
    choose: Annotated[
        Literal["lowest", "contiguous"], Field(description="remove any blocks, or one contiguous span")
    ] = "lowest"
    protect: Annotated[int, Field(ge=0, description="blocks at each end that are never removed")] = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.blocks, float) and self.blocks >= 1:
            raise RecipeError(f"{self.name}.blocks: {self.blocks} is neither a whole number nor a share below 1")

    def outline(self, walk: Walk, source: Checkpoint) -> Reshaped:
        """The model without the first blocks that may be removed."""
        count = self.count(len(walk.blocks))
        return without(walk, source, range(self.protect, self.protect + count))

    def reshape(self, model: Whole, source: Checkpoint) -> Reshaped:
        """The model without the blocks chosen; costs two forwards over the calibration tokens."""
        influences, ends_ND = influence(model)
        allowed = range(self.protect, len(influences) - self.protect)
        count = self.count(len(influences))
        if self.choose == "lowest":
            gone = sorted(sorted(allowed, key=lambda i: influences[i])[:count])
        else:
            starts = allowed[: len(allowed) - count + 1]
            first = min(starts, key=lambda i: angle(ends_ND[i], ends_ND[i + count]))
            gone = list(range(first, first + count))
        made = without(model.walk, source, gone, influence=[round(i, 6) for i in influences])
        kept = [i for i in range(len(influences)) if i not in gone]
        meant = model.walk.replay(model.walk.enter(model.probe_NT), kept)
        check_logits(made, model.walk, model.probe_NT, meant, self.name)
        return made

    def count(self, blocks: int) -> int:
        """How many of `blocks` blocks to remove; raises RecipeError if that is none, or more than may be removed."""
        count = self.blocks if isinstance(self.blocks, int) else round(self.blocks * blocks)
        free = blocks - 2 * self.protect
        if not 1 <= count <= min(free, blocks - 1):
            raise RecipeError(
                f"{self.name}: {self.blocks} of {blocks} blocks are {count}; with {self.protect} protected at each "
                f"end, 1 to {max(0, min(free, blocks - 1))} can be removed"
            )
        return count


def influence(model: Whole) -> tuple[list[float], list[Tensor]]:
    """The influence of each block, and the last tokens [N, D] before and after each block.

    The influence is 1 - the mean cosine between the input and the output of the block, over tokens. Float32.
    """
    influences: list[float] = []
    ends_ND: list[Tensor] = []
    for block in model.blocks():
        tokens, total = 0, 0.0
        last: list[tuple[Tensor, Tensor]] = []
        for batch in block.batches:
            before_BTD, after_BTD = batch.hidden_BTD.float(), batch.through(block.module, block.index).float()
            total += float(F.cosine_similarity(before_BTD, after_BTD, dim=-1).sum(dtype=torch.float64))
            tokens += before_BTD.shape[0] * before_BTD.shape[1]
            last.append((before_BTD[:, -1].clone(), after_BTD[:, -1].clone()))
        influences.append(1 - total / tokens)
        if not ends_ND:
            ends_ND.append(torch.cat([before for before, _ in last]))
        ends_ND.append(torch.cat([after for _, after in last]))
    return influences, ends_ND


def angle(one_ND: Tensor, other_ND: Tensor) -> float:
    """The mean angle between rows, in units of pi."""
    cosine = F.cosine_similarity(one_ND, other_ND, dim=-1).clamp(-1, 1)
    return float(cosine.double().acos().mean()) / math.pi


def without(walk: Walk, source: Checkpoint, gone: Sequence[int], **facts: Any) -> Reshaped:
    """The model without the blocks `gone`; the blocks after them get lower numbers."""
    prefixes = block_prefixes(walk.anatomy)
    kept = [i for i in range(len(walk.blocks)) if i not in gone]
    tensors: dict[str, Made] = {}
    for name in source.names():
        start = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        if not start:
            tensors[name] = unchanged(source, name)
        elif prefixes[start] in kept:
            tensors[renumbered(name, start, kept.index(prefixes[start]))] = unchanged(source, name)
    changes = per_block(walk.model.config.get_text_config(), kept, len(walk.blocks))
    config = with_text(source.config, walk, num_hidden_layers=len(kept), **changes)
    text = f"without {len(gone)} of {len(walk.blocks)} blocks: {', '.join(map(str, gone))}"
    return Reshaped(source, config, tensors, text, blocks=list(gone), **facts)


def renumbered(name: str, prefix: str, index: int) -> str:
    """A tensor's name after the block named by `prefix` gets the number `index`."""
    stem = prefix.rstrip(".").rpartition(".")[0]
    return f"{stem}.{index}.{name.removeprefix(prefix)}"


def per_block(text: Any, kept: Sequence[int], count: int) -> dict[str, Any]:
    """The config fields that describe single blocks, for the `kept` ones; derived fields are written out."""
    changes: dict[str, Any] = {}
    for name, value in text.to_dict().items():
        if name in COUNTS and isinstance(value, int):
            changes[name] = sum(i < value for i in kept)
        elif name in NUMBERS and isinstance(value, list):
            changes[name] = [kept.index(i) for i in value if i in kept]
        elif isinstance(value, list) and len(value) == count and not name.endswith(NOT_BLOCKS):
            changes[name] = [value[i] for i in kept]
    return changes
