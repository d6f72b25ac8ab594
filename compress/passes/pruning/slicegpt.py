"""A narrower hidden state: one rotation for the whole model, then its directions of smallest variance dropped.

Shape suffixes: D hidden, K kept, O out, I in, T tokens, B batch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Any

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import RecipeError, UnsupportedWeight
from compress.model.reshaped import Made, Reshaped, computed, parameter_of, unchanged, with_text
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.model.whole import Whole
from compress.passes.base import Reshape

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "smollm3")  # norms w * x / rms(x), before attention and MLP only
NORMS = {
    "self_attn.q_proj": "input_layernorm", "self_attn.k_proj": "input_layernorm", "self_attn.v_proj": "input_layernorm",
    "mlp.gate_proj": "post_attention_layernorm", "mlp.up_proj": "post_attention_layernorm",
}  # fmt: skip
WRITERS = ("self_attn.o_proj", "mlp.down_proj")


@dataclass(frozen=True, kw_only=True)
class SliceGPT(Reshape, name="slicegpt"):
    """Rotate the hidden state to its principal axes and drop those of smallest variance.

    Norm gains are folded into the matrices that follow. Embedding and head become two matrices, so a model that tied
    them shrinks less than `fraction` says, or not at all. A norm then divides by the mean square of fewer entries; the
    matrices behind it and its epsilon are scaled to compensate.
    Source: Ashkboos et al., "SliceGPT: Compress Large Language Models by Deleting Rows and Columns", ICLR 2024, section
    3. Deviation: the paper rotates each block by its own axes and multiplies both residual branches by a matrix, which
    no configuration of transformers can express; here one rotation, of the covariance pooled over the inputs of all
    norms (float64), serves the whole model. At the same `fraction` that keeps less, and costs no extra product.
    """

    fraction: Annotated[float, Field(ge=0, lt=1, description="share of the hidden size dropped; 0 only rotates")] = 0.2
    multiple: Annotated[int, Field(ge=1, description="the remaining hidden size is a multiple of this")] = 8

    def outline(self, walk: Walk, source: Checkpoint) -> Reshaped:
        """The model with the first entries of its hidden state."""
        check_family(walk, self.name)
        hidden = int(walk.model.config.hidden_size)
        return rotated(walk, source, torch.eye(hidden)[:, : self.kept(walk)])

    def reshape(self, model: Whole, source: Checkpoint) -> Reshaped:
        """The model in its principal axes; costs two forwards over the calibration tokens."""
        covariance_DD = covariance(model)
        values_D, axes_DD = torch.linalg.eigh(covariance_DD)
        kept = self.kept(model.walk)
        axes_DK = axes_DD.flip(1)[:, :kept].float()
        share = float(values_D.flip(0)[:kept].clamp(min=0).sum() / values_D.clamp(min=0).sum())
        return rotated(model.walk, source, axes_DK, variance_kept=round(share, 6))

    def kept(self, walk: Walk) -> int:
        """The hidden size that stays: a multiple of `multiple` and of the number of attention heads."""
        hidden, heads = int(walk.model.config.hidden_size), int(walk.model.config.num_attention_heads)
        if not self.fraction:
            return hidden
        step = math.lcm(self.multiple, heads)
        kept = step * round((1 - self.fraction) * hidden / step)
        if not 0 < kept < hidden:
            raise RecipeError(
                f"{self.name}.fraction: {self.fraction:g} of a hidden size of {hidden} leaves {kept}, as a multiple "
                f"of {step}; it must leave more than 0 and less than {hidden}"
            )
        return kept


def check_family(walk: Walk, step: str) -> None:
    """Raise UnsupportedWeight unless a rotation of the hidden state leaves what this model computes unchanged."""
    family = walk.model.config.model_type
    if family not in FAMILIES:
        raise UnsupportedWeight(
            f"{step}: {family} is not supported; allowed: {', '.join(FAMILIES)}, whose only norms are plain RMSNorms "
            "before attention, MLP and head"
        )
    if not walk.anatomy.heads:
        raise UnsupportedWeight(f"{step}: {type(walk.model).__name__} has no head to take over the last norm's gain")


def covariance(model: Whole) -> Tensor:
    """Sum of x xᵀ over the inputs of every norm, each divided by its root mean square, float64 [D, D]."""
    hidden = model.config.hidden_size
    total_DD = torch.zeros(hidden, hidden, dtype=torch.float64)
    epsilon = model.config.rms_norm_eps

    def add(x_BTD: Tensor) -> None:
        x_TD = x_BTD.reshape(-1, hidden).float()
        unit_TD = x_TD * torch.rsqrt(x_TD.square().mean(1, keepdim=True) + epsilon)
        total_DD.add_((unit_TD.T @ unit_TD).double().cpu())

    for block in model.blocks():
        norms = [block.module.get_submodule(name) for name in dict.fromkeys(NORMS.values())]
        with ExitStack() as hooks:
            for norm in norms:
                hooks.callback(norm.register_forward_pre_hook(reported(add)).remove)
            for batch in block.batches:
                out_BTD = batch.through(block.module, block.index)
                if block.last:
                    add(out_BTD)  # the input of the norm before the head
    return total_DD


def reported(add: Callable[[Tensor], None]) -> Callable[..., None]:
    """A forward pre-hook that passes the input to `add`."""

    def hook(_: nn.Module, args: tuple[Any, ...]) -> None:
        add(args[0])

    return hook


# -- the rotated model -----------------------------------------------------------------------------


def rotated(walk: Walk, source: Checkpoint, axes_DK: Tensor, **facts: Any) -> Reshaped:
    """The model on the axes `axes_DK`.

    Let z = xQ have K entries that hold all of |x|². Then x / sqrt(|x|²/D + e) becomes z / sqrt(|z|²/K + e D/K) times
    sqrt(D/K).
    """
    hidden, kept = axes_DK.shape
    text = walk.model.config
    turn = Turn(walk=walk, source=source, axes_DK=axes_DK, scale=(hidden / kept) ** 0.5)
    config = with_text(
        source.config, walk, hidden_size=kept, tie_word_embeddings=False,
        rms_norm_eps=text.rms_norm_eps * hidden / kept,
        head_dim=getattr(text, "head_dim", None) or hidden // text.num_attention_heads,
    )  # fmt: skip
    tensors = {name: turn.made(name, parameter_of(walk.anatomy, name)) for name in source.names()}
    head = next(name for name in walk.anatomy.heads if name.endswith(".weight"))
    if head not in walk.anatomy.layout.sources:  # tied: the file holds it as the embedding
        tensors[head] = turn.reader(turn.held(head), turn.final)
    return Reshaped(
        source, config, tensors, f"without {hidden - kept} of {hidden} directions of the hidden state", **facts
    )


@dataclass(frozen=True, kw_only=True)
class Turn:
    """Converts each tensor to the new axes; products in float32, one tensor at a time."""

    walk: Walk
    source: Checkpoint
    axes_DK: Tensor
    scale: float

    @property
    def final(self) -> str:
        """The name of the gain of the norm before the head."""
        return f"{self.walk.path.removesuffix('layers')}norm.weight"

    def held(self, parameter: str) -> str:
        """The tensor of the file that stores a parameter, or the one it is tied to."""
        layout = self.walk.anatomy.layout
        return layout.sources[layout.held(parameter) or parameter][0]

    def made(self, name: str, parameter: str) -> Made:
        """One tensor of the new file."""
        anatomy, kept = self.walk.anatomy, self.axes_DK.shape[1]
        module, _, kind = parameter.rpartition(".")
        block = parameter.removeprefix(f"{anatomy.path}.").partition(".")[0]
        role = module.removeprefix(f"{anatomy.path}.{block}.")
        if parameter == self.final or (anatomy.in_block(parameter) and role in NORMS.values()):
            return computed(self.source, name, (kept,), lambda: torch.ones(kept))
        if parameter in anatomy.heads:
            return self.reader(name, self.final)
        if anatomy.in_block(parameter) and role in NORMS and kind == "weight":
            return self.reader(name, f"{anatomy.path}.{block}.{NORMS[role]}.weight")
        if anatomy.in_block(parameter) and role in WRITERS:
            shape = (kept, *self.source.headers[name].shape[1:])
            return computed(self.source, name, shape, lambda: self.axes_DK.T @ self.source.tensor(name).float())
        if self.walk.model.get_input_embeddings() is anatomy.modules.get(module):
            shape = (self.source.headers[name].shape[0], kept)
            return computed(self.source, name, shape, lambda: self.source.tensor(name).float() @ self.axes_DK)
        return unchanged(self.source, name)

    def reader(self, name: str, norm: str) -> Made:
        """A matrix that reads the hidden state behind a norm, with the gain of that norm folded in."""
        shape = (self.source.headers[name].shape[0], self.axes_DK.shape[1])
        return computed(self.source, name, shape, partial(self.read, name, self.held(norm)))

    def read(self, name: str, gain: str) -> Tensor:
        """W diag(gain) Q, scaled."""
        w_OD = self.source.tensor(name).float() * self.source.tensor(gain).float()
        return (w_OD @ self.axes_DK) * self.scale
