"""Fine-tuning after a quantizer: codes stay, the real numbers beside them are learned from the block's output error."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import UnsupportedWeight
from compress.model.site import Site
from compress.passes.learned import Learner, Trainer
from compress.weights import (
    Codebook,
    Dense,
    Diagonal,
    Hadamard,
    Masked,
    Permutation,
    Product,
    Quantized,
    Signs,
    Sum,
    Weight,
)
from compress.weights.pack import SMALLEST

REAL = (torch.float32, torch.bfloat16, torch.float16)  # 8-bit scales stay: a small step would not change them


def with_reals(weight: Weight, change: Callable[[Tensor], Tensor]) -> Weight:
    """The expression with `change` applied to each real tensor it stores: scales, fitted books, factors, diagonals.

    Raises UnsupportedWeight for an unknown node.
    """

    def changed(held: Tensor) -> Tensor:
        return change(held) if held.dtype in REAL else held

    match weight:
        case Dense(data):
            return Dense(changed(data))
        case Diagonal(diagonal):
            return Diagonal(changed(diagonal))
        case Quantized() | Signs():
            return replace(weight, scale=changed(weight.scale))
        case Codebook(book=book, scale=scale, name=name):
            return replace(weight, book=book if name else changed(book), scale=with_reals(scale, change))
        case Masked(values):
            return replace(weight, values=with_reals(values, change))
        case Sum(terms):
            return Sum(tuple(with_reals(term, change) for term in terms))
        case Product(left, right):
            return Product(with_reals(left, change), with_reals(right, change))
        case Permutation() | Hadamard():
            return weight
        case _:
            raise UnsupportedWeight(f"the real numbers of {weight.describe()} cannot be learned")


class Reals(Learner):
    """Learns the real numbers of an expression, each tensor in units of its root mean square, rounded as stored."""

    def __init__(self, weight: Weight) -> None:
        super().__init__()
        self.weight = weight
        self.held: list[Tensor] = []
        with_reals(weight, lambda held: self.held.append(held) or held)  # type: ignore[func-returns-value]
        self.units = [float(held.float().square().mean().sqrt()) for held in self.held]
        self.moved = nn.ParameterList(torch.zeros_like(held, dtype=torch.float32) for held in self.held)

    def expression(self) -> Weight:
        """The expression with the present values."""
        moves = iter(zip(self.units, self.moved, strict=True))

        def change(held: Tensor) -> Tensor:
            unit, moved = next(moves)
            now: Tensor = (held.float() + unit * moved).to(held.dtype)  # rounding passes the gradient unchanged
            return now

        return with_reals(self.weight, change)

    def forward(self) -> Tensor:
        """The matrix of the expression, float32."""
        return self.expression().dense().float()

    @torch.no_grad()
    def result(self) -> Weight:
        """The expression, without gradients."""
        return with_reals(self.expression(), torch.Tensor.detach)


@dataclass(frozen=True, kw_only=True)
class FineTune(Trainer, name="finetune"):
    """Learn scales, fitted books, low-rank factors and kept weights from the block's output; codes and masks stay.

    A right factor that sites of one input share remains one factor. For sign weights, only the scales are learned; this
    is the distillation of BitDelta, which uses the logits instead.
    Source: Tseng et al., "QuIP#", ICML 2024, section 5 (fine-tuning within a block; there also sign vectors and norms);
    Leconte et al., "ReALLM", 2024, for factors.
    """

    takes = ("pruned", "quantized", "signed", "factored", "split")
    gives = ""  # the form that it was given

    lr: Annotated[
        float, Field(gt=0, le=1, description="initial learning rate, relative to the root mean square of each tensor")
    ] = 1e-2

    def learner(self, site: Site, generator: torch.Generator) -> Learner:
        """A learner of all real numbers of the expression."""
        del generator
        self.check_reals(site)
        return Reals(site.weight)

    def check_reals(self, site: Site) -> None:
        """Raise UnsupportedWeight if a site holds no real numbers, or a node that is not known."""
        held: list[Tensor] = []
        with_reals(site.weight, lambda tensor: held.append(tensor) or tensor)  # type: ignore[func-returns-value]
        if not held:
            raise UnsupportedWeight(
                f"{self.name}: {site.name} is {site.weight.describe()}, of which nothing can be learned; deselect it"
            )

    def outline(self, site: Site) -> Weight | None:
        """The form stays, of nodes that are known."""
        self.check_reals(site)
        return super().outline(site)

    def tie(self, sites: Sequence[Site], learners: Mapping[str, Learner]) -> None:
        """Learn tensors that several sites hold bit for bit, and that are stored once, as one parameter."""
        known: list[tuple[Tensor, nn.Parameter]] = []
        for site in sites:
            reals = learners[site.name]
            if isinstance(reals, Reals):
                for i, held in enumerate(reals.held):
                    same = (moved for other, moved in known if is_shared(other, held))
                    reals.moved[i] = next(same, reals.moved[i])
                known += zip(reals.held, reals.moved, strict=True)


def is_shared(one: Tensor, other: Tensor) -> bool:
    """Whether two sites hold one tensor; single scales may also be equal by chance, and are stored for each site."""
    return one is other or (one.nbytes >= SMALLEST and one.shape == other.shape and torch.equal(one, other))
