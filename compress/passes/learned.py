"""Learning the weights of a block from the error of its output, and learned rounding to the values of a grid.

The trainer serves any module that has parameters and produces a matrix. Learned rounding is shared by FlexRound and
LRQ, which differ in the form of the divisor exponent D. Both refine the result of any quantizer and keep its bits,
groups and zeros. The matrix that exp(D) divides is the one nearest to the original among those that round to the
present codes: after rounding to nearest that is the original itself, as in the papers; after error feedback the
learning starts from the codes that feedback found. Shape suffixes: O out, I in, G groups, S inputs of a group, B batch,
T tokens, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from compress.errors import CalibrationError, UnsupportedWeight
from compress.model.block import Block
from compress.model.site import Site
from compress.model.transform import undone
from compress.passes.base import BlockPass
from compress.weights import Dense, Diagonal, Hadamard, Masked, Permutation, Product, Quantized, Weight
from compress.weights.grid import narrowed, stored_scale

EDGE = 1e-3  # of a step: the least distance of an entry from the edge of its rounding cell at the start
LOOKS = 10  # evaluations on the held-out windows, evenly spaced over the steps


# -- one matrix ------------------------------------------------------------------------------------


class Snapped(torch.autograd.Function):
    """step * (clip(round(W / step / exp(D) + zero)) - zero), [out, groups, size].

    The rounding has the gradient of the identity. A clipped entry has no gradient for D; its gradient for the step is
    that of its code.
    Source: Lee et al., FlexRound, ICML 2023, equation 2.
    """

    @staticmethod
    def forward(ctx: Any, w_OGS: Tensor, step_OG: Tensor, d_OGS: Tensor, zero: Tensor | float, top: int) -> Tensor:
        """The values on the grid."""
        at, codes = divided(w_OGS, step_OG, d_OGS, zero, top)
        ctx.save_for_backward(at, codes, step_OG)
        ctx.zero = zero
        return (codes - zero) * step_OG[..., None]

    @staticmethod
    def backward(ctx: Any, g_OGS: Tensor) -> tuple[None, Tensor, Tensor, None, None]:
        """The gradients for the steps and for D."""
        at, codes, step_OG = ctx.saved_tensors
        moved = torch.where((at - codes).abs() <= 0.5, at - ctx.zero, 0.0)
        per_step = (g_OGS * (codes - ctx.zero - moved)).sum(-1).sum_to_size(step_OG.shape)
        return None, per_step, moved.mul_(g_OGS).mul_(-step_OG[..., None]), None, None


def divided(w_OGS: Tensor, step_OG: Tensor, d_OGS: Tensor, zero: Tensor | float, top: int) -> tuple[Tensor, Tensor]:
    """The divided weights in units of codes, before rounding, and the nearest codes from 0 to `top`."""
    at = torch.exp(-d_OGS).mul_(w_OGS).div_(step_OG[..., None]).add_(zero)
    return at, at.round().clamp_(0, top)


class Kept(torch.autograd.Function):
    """Rounds steps to their stored values, with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, step: Tensor) -> Tensor:
        """The stored steps, float32."""
        del ctx
        return stored_scale(step)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        """The gradient, unchanged."""
        del ctx
        return gradient


class Rounder(nn.Module):
    """The matrix W' that `now` becomes with other steps and with D, which the module `d` returns; float32 [out, in]."""

    def __init__(self, now: Quantized, w_OI: Tensor, d: nn.Module) -> None:
        super().__init__()
        self.now, self.d, self.top = now, d, 2**now.bits - 1
        self.zero = zero_of(now)
        self.w_OGS = in_cells(now, w_OI) * now.scale.float()[..., None]
        self.log_step = nn.Parameter(now.scale.float().log())

    def parts(self) -> tuple[Tensor, Tensor, Tensor, Tensor | float, int]:
        """The arguments of `Snapped`."""
        d_OGS = self.d().unflatten(1, (self.w_OGS.shape[1], -1))
        step: Tensor = Kept.apply(self.log_step.exp())  # type: ignore[no-untyped-call]  # torch has no types for it
        return self.w_OGS, step, d_OGS, self.zero, self.top

    def forward(self) -> Tensor:
        """W' [out, in]."""
        values_OGS: Tensor = Snapped.apply(*self.parts())  # type: ignore[no-untyped-call]
        return values_OGS.flatten(1)

    @torch.no_grad()
    def quantized(self) -> Quantized:
        """Codes and steps that denote exactly W'."""
        parts = self.parts()
        codes_OI = divided(*parts)[1].flatten(1).to(torch.uint8)
        return Quantized(codes_OI, narrowed(parts[1]), self.now.zero, self.now.bits)


def zero_of(now: Quantized) -> Tensor | float:
    """The zero point in units of codes; it may lie between two codes."""
    return 2.0 ** (now.bits - 1) if now.zero is None else now.zero.float()[..., None]


def in_cells(now: Quantized, w_OI: Tensor) -> Tensor:
    """W relative to the zero, in steps, [out, groups, size], each entry clamped to the cell of its code."""
    codes_OGS = now.codes.float().unflatten(1, (now.scale.shape[1], -1))
    low = torch.where(codes_OGS == 0, -torch.inf, codes_OGS - 0.5 + EDGE)
    high = torch.where(codes_OGS == 2**now.bits - 1, torch.inf, codes_OGS + 0.5 - EDGE)
    w_OGS: Tensor = w_OI.float().unflatten(1, (now.scale.shape[1], -1))
    at = w_OGS / now.scale.float()[..., None] + zero_of(now)
    return at.clamp(low, high) - zero_of(now)


def aim(weight: Weight, w_OI: Tensor, site: str) -> tuple[Quantized, Tensor]:
    """The grid inside an expression, and the matrix it has to approximate for the expression to approximate W.

    Raises UnsupportedWeight if the expression has no grid, or other terms beside it.
    """
    match weight:
        case Quantized():
            return weight, w_OI
        case Masked(Quantized() as values, mask_OI, _):
            return values, w_OI.masked_fill(~mask_OI, 0)
        case Product(left, Permutation() | Hadamard() | Diagonal() as right):
            return aim(left, undone(w_OI, right), site)
        case _:
            raise UnsupportedWeight(f"the rounding of {site} cannot be learned: it is {weight.describe()}")


def refilled(weight: Weight, values: Weight) -> Weight:
    """An expression that `aim` supports, with `values` in place of its grid."""
    match weight:
        case Masked(_, mask_OI, name):
            return Masked(values, mask_OI, name)
        case Product(left, right):
            return Product(refilled(left, values), right)
        case _:
            return values


class Learner(nn.Module):
    """A module that learns the matrix [out, in] of a site; `forward` returns it."""

    def result(self) -> Weight:
        """The expression that denotes exactly what `forward` returns."""
        raise NotImplementedError


class Refilled(Learner):
    """An expression whose grid comes from a rounder."""

    def __init__(self, weight: Weight, rounder: Rounder) -> None:
        super().__init__()
        self.weight, self.rounder = weight, rounder

    def forward(self) -> Tensor:
        """The matrix of the expression."""
        return refilled(self.weight, Dense(self.rounder())).dense()

    def result(self) -> Weight:
        """The expression with codes."""
        return refilled(self.weight, self.rounder.quantized())


# -- one block -------------------------------------------------------------------------------------


class Trainee:
    """A copy of a block that computes with the matrices of `learners`, by site, and its error against the dense block.

    It computes in bfloat16 where the model does, which is fast and is what counts in the end, otherwise in float32.
    """

    def __init__(self, block: Block, sites: Sequence[Site], learners: Mapping[str, Learner]) -> None:
        self.block, self.sites, self.learners = block, sites, learners
        narrow = all(site.original.data.dtype == torch.bfloat16 for site in sites)
        self.dtype = None if narrow else torch.float32
        self.module = deepcopy(block.module) if narrow else deepcopy(block.module).float()
        inside = {f"{block.name}.{path}".rstrip("."): part for path, part in self.module.named_modules()}
        self.held = {site.name: getattr(inside[site.place.module], site.place.parameter) for site in sites}
        for parameter in self.held.values():
            parameter.requires_grad_(True)
        self.targets = block.targets()

    def matrices(self) -> list[Tensor]:
        """The matrix of each site, after copying them all into the block."""
        made = [self.learners[site.name]() for site in self.sites]
        with torch.no_grad():
            for site, w_OI in zip(self.sites, made, strict=True):
                site.place.within(self.held[site.name]).copy_(site.computed(w_OI))
        return made

    def error(self, index: int) -> Tensor:
        """The mean squared distance of a batch's output from that of the dense block for the dense hidden states."""
        out_BTD = self.block.batches[index].through(self.module, self.block.index, dtype=self.dtype)
        return (out_BTD.float() - self.targets[index].float()).square().mean()

    def learn(self, index: int, unit: float) -> None:
        """Add the gradients of the error on a batch, divided by `unit`, to the parameters of the learners."""
        made = self.matrices()
        self.module.zero_grad()
        (self.error(index) / unit).backward()
        reached = [(w_OI, site) for w_OI, site in zip(made, self.sites, strict=True) if self.gradient(site) is not None]
        torch.autograd.backward([w_OI for w_OI, _ in reached], [self.gradient(site) for _, site in reached])

    def gradient(self, site: Site) -> Tensor | None:
        """The gradient of the matrix of a site, float32; None if it was not used, as may happen to an expert."""
        whole = self.held[site.name].grad
        return None if whole is None else site.place.within(whole).float()

    @torch.no_grad()
    def look(self, indices: Sequence[int]) -> float:
        """The mean error over batches."""
        self.matrices()
        return math.fsum(float(self.error(i)) for i in indices) / len(indices)


@dataclass(frozen=True, kw_only=True)
class Trainer(BlockPass):
    """A pass that learns the weights of a block from the error of its output; a subclass defines what is learned.

    Adam with a cosine learning rate that falls to 0; batches come in random order. Of the initial state and LOOKS later
    ones, the state with the least error on windows that are not learned from is kept. Costs a copy of the block, a
    third copy of the calibration activations, and `steps` forwards and backwards of `batch` windows a block.
    """

    takes: ClassVar[tuple[str, ...]] = ("quantized",)
    gives: ClassVar[str] = "quantized"

    steps: Annotated[int, Field(ge=1, description="Adam steps per block")] = 300
    lr: Annotated[float, Field(gt=0, le=1, description="initial learning rate")] = 2e-2
    held_out: Annotated[
        int, Field(ge=1, description="calibration windows that are not learned from but choose the best state")
    ] = 16
    seed: Annotated[
        int, Field(ge=0, lt=1 << 63, description="seed of the order of windows and of random initial values")
    ] = 0

    def outline(self, site: Site) -> Weight | None:
        """The same form."""
        return replace(site.weight)

    def learner(self, site: Site, generator: torch.Generator) -> Learner:
        """The learner of a site; it denotes the site's weight as it is at first."""
        raise NotImplementedError

    def rewrite(self, block: Block, sites: Sequence[Site]) -> Mapping[str, Weight]:
        """The learned expressions."""
        generator = torch.Generator().manual_seed(self.seed)
        learners = {site.name: self.learner(site, generator).to(site.original.data.device) for site in sites}
        self.tie(sites, learners)
        before, after = self.train(Trainee(block, sites, learners))
        for site in sites:
            site.ledger["learned"] = {"before": before, "after": after}
        return {site.name: learners[site.name].result() for site in sites}

    def tie(self, sites: Sequence[Site], learners: Mapping[str, Learner]) -> None:
        """Make learners of several sites share parameters; by default they share none."""

    def train(self, trainee: Trainee) -> tuple[float, float]:
        """Leave the best state in the learners; return the held-out error at the start and in that state."""
        generator = torch.Generator().manual_seed(self.seed)
        held, seen = self.divide(len(trainee.targets), generator)
        learners = nn.ModuleList(trainee.learners.values())
        with torch.enable_grad():
            adam = torch.optim.Adam(learners.parameters(), lr=self.lr)
            falling = torch.optim.lr_scheduler.LambdaLR(adam, lambda t: (1 + math.cos(math.pi * t / self.steps)) / 2)
            before = after = trainee.look(held)
            best = saved(learners)
            for t, index in zip(range(1, self.steps + 1), shuffled(seen, generator), strict=False):
                adam.zero_grad()
                trainee.learn(index, max(before, 1e-30))
                adam.step()
                falling.step()
                if t % max(1, self.steps // LOOKS) == 0 or t == self.steps:
                    error = trainee.look(held)
                    if error < after:
                        after, best = error, saved(learners)
            learners.load_state_dict(best)
        return before, after

    def divide(self, batches: int, generator: torch.Generator) -> tuple[list[int], list[int]]:
        """Batches held out and batches to learn from, at random; raises CalibrationError if there are too few."""
        order = torch.randperm(batches, generator=generator).tolist()
        few = math.ceil(self.held_out / self.batch)
        if few >= batches:
            raise CalibrationError(
                f"{self.name}: held_out: {self.held_out} of {batches} batches of {self.batch} windows leave none to "
                "learn from; give more samples"
            )
        return order[:few], order[few:]


@dataclass(frozen=True, kw_only=True)
class Learned(Trainer):
    """A pass that learns how the weights of a block are rounded, and the steps; a subclass defines the form of D."""

    def outline(self, site: Site) -> Weight | None:
        """The form stays, of a grid that stands alone."""
        aim(site.weight, site.original.data, site.name)
        return super().outline(site)

    def divisor(self, shape: tuple[int, int], generator: torch.Generator) -> nn.Module:
        """The module that returns D [out, in], 0 at first."""
        raise NotImplementedError

    def learner(self, site: Site, generator: torch.Generator) -> Learner:
        """The same grid with other steps and codes."""
        now, w_OI = aim(site.weight, site.target.data.float(), site.name)
        return Refilled(site.weight, Rounder(now, w_OI, self.divisor(now.shape, generator)))


def saved(module: nn.Module) -> dict[str, Tensor]:
    """A copy of the module's state."""
    return {name: value.clone() for name, value in module.state_dict().items()}


def shuffled(items: Sequence[int], generator: torch.Generator) -> Iterator[int]:
    """The items over and over, each time in a new random order."""
    while True:
        yield from (items[i] for i in torch.randperm(len(items), generator=generator).tolist())
