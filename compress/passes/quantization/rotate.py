"""Rotations that spread outliers over all entries: at the input of each matrix, or folded into the whole model.

Shape suffixes: O out, I in, D hidden, H values of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from compress.model.reshaped import Made, Reshaped, check_logits, computed, parameter_of
from compress.model.site import Site
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.model.whole import Whole
from compress.passes.base import Reshape, WeightPass
from compress.passes.pruning.slicegpt import check_family, rotated
from compress.weights import Dense, Hadamard, Product, Weight

Seed = Annotated[int, Field(ge=0, lt=1 << 63, description="seed of the random signs")]


def random_hadamard(size: int, seed: int) -> Hadamard:
    """A randomised Hadamard rotation, the same for the same size and seed."""
    return Hadamard(torch.rand(size, generator=torch.Generator().manual_seed(seed)) < 0.5)


@cache
def rotation_outline(size: int, seed: int) -> Hadamard:
    """The same without its signs; one object for the same size and seed."""
    del seed
    return Hadamard(torch.empty(size, dtype=torch.bool, device="meta"))


@dataclass(frozen=True, kw_only=True)
class Rotate(WeightPass, name="rotate"):
    """Replace W by W Hᵀ behind H: works for any family, at the cost of a transform of each input at run time.

    Matrices of equal width share their signs. Costs one bit for each input, and n log n additions a token.
    Source: Tseng et al., "QuIP#", ICML 2024, section 3. Deviation: inputs are rotated, outputs are not, because neither
    a grid per group of inputs nor error feedback gains anything from outputs that are alike.
    """

    takes = ("dense",)
    gives = "rotated"

    seed: Seed = 0

    def rewrite(self, site: Site) -> Weight:
        """The rotated matrix behind the rotation."""
        dense = site.expect(Dense, by=self.name)
        turn = Hadamard(random_hadamard(site.shape[1], self.seed).positive.to(dense.data.device))
        return Product(Dense(turn.linear(dense.data)), turn)

    def rewrite_unfed(self, site: Site) -> Weight:
        """The same: no statistic is needed."""
        return self.rewrite(site)

    def outline(self, site: Site) -> Weight | None:
        """The outline; sites of equal width share the rotation."""
        dense = site.expect(Dense, by=self.name)
        return Product(Dense(torch.empty_like(dense.data)), rotation_outline(site.shape[1], self.seed))


@dataclass(frozen=True, kw_only=True)
class QuaRot(Reshape, name="quarot"):
    """Rotate the hidden state of the whole model and the values of each head, folded in at no cost at run time.

    Norm gains are folded into the matrices that follow. Embedding and head become two matrices, so a model that tied
    them grows. The inputs of down_proj are not rotated; put `rotate: {sites: "*down_proj"}` after it for these.
    Source: Ashkboos et al., "QuaRot", NeurIPS 2024, section 4, stages 1a and 1c without the rotations at run time.
    """

    seed: Seed = 0

    def outline(self, walk: Walk, source: Checkpoint) -> Reshaped:
        """The rotated model: no statistic is needed."""
        check_family(walk, self.name)
        hidden = int(walk.model.config.hidden_size)
        axes_DD = random_hadamard(hidden, self.seed).dense().T.contiguous()
        return self.with_values(walk, rotated(walk, source, axes_DD))

    def reshape(self, model: Whole, source: Checkpoint) -> Reshaped:
        """The rotated model, after a comparison with the dense one on the probe."""
        made = self.outline(model.walk, source)
        meant = model.walk.replay(model.walk.enter(model.probe_NT))
        check_logits(made, model.walk, model.probe_NT, meant, self.name)
        return made

    def with_values(self, walk: Walk, made: Reshaped) -> Reshaped:
        """The model with the values of each head rotated too."""
        text = walk.model.config.get_text_config()
        width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        turn = random_hadamard(width, self.seed)
        tensors: dict[str, Made] = dict(made.made)
        for name in made.names():
            parameter = parameter_of(walk.anatomy, name)
            if ".self_attn.v_proj." in parameter:
                tensors[name] = turned(made, name, partial(written, turn))
            elif parameter.endswith(".self_attn.o_proj.weight"):
                tensors[name] = turned(made, name, partial(read, turn))
        change = "with its hidden state and values rotated"
        return Reshaped(made.source, made.config, tensors, change)


def turned(made: Reshaped, name: str, by: Callable[[Tensor], Tensor]) -> Made:
    """A tensor of a model, rotated in float32."""
    held = made.made[name]
    return computed(made.source, held.like, held.shape, lambda: by(held.make().float()))


def written(turn: Hadamard, v_O: Tensor) -> Tensor:
    """(1 x H) W: the rows of each head, or of a bias, rotated."""
    heads: Tensor = v_O.unflatten(0, (-1, turn.shape[0]))
    rotated_heads: Tensor = turn.linear(heads.movedim(1, -1)).movedim(-1, 1).flatten(0, 1)
    return rotated_heads


def read(turn: Hadamard, o_OI: Tensor) -> Tensor:
    """W (1 x Hᵀ): the columns of each head rotated, so that H cancels."""
    return turn.linear(o_OI.unflatten(1, (-1, turn.shape[0]))).flatten(1)
