"""A site: one matrix of the model, with the expression that currently denotes its weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from compress.errors import UnsupportedWeight
from compress.model.anatomy import Place
from compress.model.family import is_transposed
from compress.model.transform import statistics_after, statistics_behind, undone
from compress.stats import SIDE, Gram, Statistics
from compress.weights import Dense, External, Masked, Sum, Weight, put_together, rounded_for, taken_apart

FEWEST = 256  # an expert with fewer tokens, or fewer than an eighth of its inputs if that is more, counts as starved


class Site:
    """A matrix by its full name; assigning `weight` also changes what the module computes with.

    `original` is the weight as the checkpoint holds it. `target` is what passes approximate: the original, unless a
    pass changed it. `stats` describes the input, measured behind the already compressed sites. `ledger` is what passes
    record about this site in the artifact.
    """

    def __init__(self, name: str, module: Any, place: Place | None = None) -> None:
        self.name, self.module = name, module
        self.place = place or Place(
            site=name, tensor=f"{name}.weight", module=name, transposed=is_transposed(module), shape=(0, 0), peers=name
        )
        self.original = Dense(self.view() if self.whole else self.view().clone())
        if self.place.transposed:
            self.original = Dense(self.view().contiguous())
        self._weight: Weight = self.original
        self._inputs, self._exact = "", False
        self._hook: Any = None
        self.target = self.original
        self.stats: Statistics = Statistics({}, 0)
        self.ledger: dict[str, Any] = {}
        self.fallbacks: list[tuple[str, str]] = []
        self.starving: list[str] = []  # for each pass: what it did instead, because too few tokens reached this expert
        self.weight_error: float = 0.0
        self.output_error: float | None = None
        self.errors: list[tuple[str, float]] = []  # the weight error after each pass, by the pass's name

    @property
    def whole(self) -> bool:
        """Whether the site is a whole parameter rather than an expert in a stack."""
        return self.place.expert is None

    @property
    def transposed(self) -> bool:
        """Whether model and file keep the matrix as [in, out]."""
        return self.place.transposed

    def view(self) -> Tensor:
        """The matrix [out, in] that the module computes with now; shares its memory."""
        return self.place.within(getattr(self.module, self.place.parameter).data)

    @property
    def weight(self) -> Weight:
        """The expression that currently denotes the weight [out, in]."""
        return self._weight

    @weight.setter
    def weight(self, weight: Weight) -> None:
        if weight.shape != self._weight.shape:
            raise UnsupportedWeight(
                f"{self.name}: a rewrite changed its shape from {self._weight.shape} to {weight.shape}"
            )
        dtype = self.original.data.dtype
        if isinstance(weight, Dense) and weight.data.dtype != dtype:
            weight = Dense(weight.data.to(dtype))  # a plain matrix is stored as the model stores its own
        self._weight = weight
        self._show(self.computed(weight.dense()))

    def computed(self, w_OI: Tensor) -> Tensor:
        """The matrix that the module computes with if the weight denotes `w_OI`, in the model's dtype."""
        return w_OI.to(self.original.data.dtype)

    def _show(self, plain: Tensor) -> None:
        """Make the module compute with this matrix [out, in]."""
        if self.whole:  # the parameter may be mapped from the file, so it is replaced rather than written to
            self.module.weight.data = plain.T.contiguous() if self.transposed else plain
        else:
            self.view().copy_(plain)

    @property
    def inputs(self) -> str:
        """The format that the module rounds its input to, one of INPUTS; empty if it does not round."""
        return self._inputs

    @inputs.setter
    def inputs(self, kind: str) -> None:
        if kind and not self.whole:
            raise UnsupportedWeight(f"{self.name}: is one of a stack of experts, whose input cannot be rounded")
        self._inputs = kind
        if kind and self._hook is None:
            self._hook = self.module.register_forward_pre_hook(self._round_inputs, with_kwargs=True)

    def _round_inputs(self, _: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A forward pre-hook that rounds the input, except while the module computes as the original."""
        if self._exact or not self._inputs:
            return None
        if args:
            return (rounded_for(self._weight, args[0], self._inputs), *args[1:]), kwargs
        name, x = next(iter(kwargs.items()))
        return args, {**kwargs, name: rounded_for(self._weight, x, self._inputs)}

    def release(self) -> None:
        """Remove the hook with which the module rounds its input."""
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    @contextmanager
    def as_original(self) -> Iterator[None]:
        """Inside, the module computes with the original weight and the unrounded input."""
        if self._weight is self.original:
            yield
            return
        before = self.view() if self.whole else self.view().clone()
        self._show(self.computed(self.original.data))
        self._exact = True
        try:
            yield
        finally:
            self._show(before)
            self._exact = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self._weight.shape

    @property
    def stored(self) -> Weight:
        """The expression that the artifact stores."""
        return self._weight

    @property
    def idle(self) -> bool:
        """Whether there is nothing to rewrite."""
        return False

    @property
    def needed(self) -> int:
        """The smallest number of tokens with which statistics of this input are meaningful.

        Source: the policy for experts that calibration hardly reaches; max(256, in / 8).
        """
        return max(FEWEST, self.shape[1] // 8)

    @property
    def starved(self) -> bool:
        """Whether this is an expert that too few calibration tokens reached."""
        return self.place.routed and self.stats.tokens < self.needed

    def apart(self, weight: Weight, keep: bool = False) -> Site:
        """A copy of this site with another weight, for trying it: the module and this site's records do not change.

        With `keep`, the copy starts with what this site has recorded so far, otherwise with nothing.
        """
        other = copy(self)
        other._weight = weight
        other.ledger = dict(self.ledger) if keep else {}
        other.fallbacks = list(self.fallbacks) if keep else []
        other.starving = list(self.starving) if keep else []
        return other

    def behind(self, transform: Weight, weight: Weight) -> Site:
        """This site as one whose input is first transformed by `transform`, with `weight` for the transformed input.

        Its records are shared with this site. Raises UnsupportedWeight for a transform that cannot be undone exactly.
        """
        other = copy(self)
        other._weight = weight
        other.original = Dense(undone(self.original.data, transform))
        other.target = other.original if self.target is self.original else Dense(undone(self.target.data, transform))
        other.stats = statistics_behind(self.stats, transform)
        return other

    def factors(self, left_OR: Tensor, right_RI: Tensor) -> tuple[Site, Site]:
        """This site as a pair of sites, for `left` and for `right`; the first reads the output of the second.

        What passes record about an input, such as its damping, goes to this site through the second, which has the same
        input; the first has a ledger of its own.
        """
        outer, inner = copy(self), copy(self)
        outer.ledger = {}
        outer.stats = statistics_after(self.stats, right_RI)
        for site, factor in ((outer, left_OR), (inner, right_RI)):
            site._weight = site.original = site.target = Dense(factor)
        return outer, inner

    def expect(self, kind: type[Dense], by: str) -> Dense:
        """The weight, if it is still of `kind`; otherwise raises UnsupportedWeight, naming the pass `by`."""
        if isinstance(self._weight, kind):
            return self._weight
        raise UnsupportedWeight(
            f"{by} needs a {kind.__name__.lower()} weight; {self.name} is already {self._weight.describe()}"
        )

    def told(self, tensors: list[Tensor]) -> dict[str, Any]:
        """The result of rewriting this site as plain data, for another process; tensors are appended to `tensors`."""
        return {
            "weight": None if self._weight is self.original else taken_apart(self._weight, tensors),
            "inputs": self.inputs,
            "ledger": self.ledger,
            "fallbacks": self.fallbacks,
            "starving": self.starving,
            "weight_error": self.weight_error,
            "output_error": self.output_error,
            "errors": self.errors,
        }

    def take(self, told: Mapping[str, Any], tensors: Sequence[Tensor]) -> None:
        """Apply what `told` returned for the same site in another process."""
        if told["weight"] is not None:
            self.weight = put_together(told["weight"], tensors)
        self.inputs = told["inputs"]
        self.ledger, self.starving = dict(told["ledger"]), list(told["starving"])
        self.fallbacks = [(step, reason) for step, reason in told["fallbacks"]]
        self.weight_error, self.output_error = told["weight_error"], told["output_error"]
        self.errors = [(step, error) for step, error in told["errors"]]

    def fall_back(self, step: str, reason: str) -> None:
        """Record that the pass `step` did something weaker than asked for at this site."""
        self.fallbacks.append((step, reason))

    def measure(self, output: bool = True) -> None:
        """Set `weight_error`, and with `output` also `output_error` if a Gram of the input was collected.

        The weight error is relative to the original. The output error, sqrt(tr(D G Dᵀ) / tr(W G Wᵀ)) with D = W' - W,
        is relative to the target W; it costs one product [out, in] @ [in, in].
        """
        plain = self._weight.dense().float()
        change = plain - self.original.data
        norm = torch.linalg.vector_norm(self.original.data, dtype=torch.float32).clamp(min=1e-30)
        self.weight_error = float(change.norm() / norm)
        self.output_error = None
        if output and Gram in self.stats and self.stats.tokens:
            gram = self.stats[Gram]
            target = self.target.data.float()
            missed = change if self.target is self.original else plain - target
            self.output_error = float((energy(missed, gram) / energy(target, gram).clamp(min=1e-30)).sqrt())


class DeltaSite(Site):
    """A matrix of a fine-tuned model, of which only the difference from the `base` model's is rewritten.

    Weight, original and target denote the difference, in the model's dtype; the module computes with base plus weight.
    Statistics describe the module's input, as for every site.
    """

    def __init__(self, name: str, module: Any, place: Place, base: External) -> None:
        super().__init__(name, module, place)
        self.base, self.own = base, self.original.data
        difference = self.own.float() - base.data.float()
        self.original = self.target = self._weight = Dense(difference.to(self.own.dtype))

    def computed(self, w_OI: Tensor) -> Tensor:
        """Base plus difference, added in float32; for the original difference, exactly the fine-tuned matrix."""
        if w_OI is self.original.data:
            return self.own
        return (self.base.data.float() + w_OI.float()).to(self.own.dtype)

    @cached_property
    def idle(self) -> bool:
        """Whether fine-tuning left the matrix unchanged, so that there is nothing to rewrite."""
        return not bool(self.original.data.any())

    @property
    def stored(self) -> Weight:
        """The expression that the artifact stores: base plus difference.

        If no pass rewrote the difference, it is stored in float32, which loses nothing of bfloat16; an idle site stores
        an empty mask.
        """
        if self._weight is not self.original:
            return Sum((self.base, self._weight))
        if self.idle:
            none_OI = torch.zeros_like(self.own, dtype=torch.bool)
            return Sum((self.base, Masked(Dense(torch.zeros_like(self.own)), none_OI, "none")))
        return Sum((self.base, Dense(self.own.float() - self.base.data.float())))


def energy(w_OI: Tensor, gram_II: Tensor) -> Tensor:
    """tr(W G Wᵀ), the mean squared norm of the output, clamped at 0.

    G is symmetric, so blocks right of its diagonal count twice and those left of it are skipped: half the work.
    """
    total = w_OI.new_zeros(())
    for start in range(0, w_OI.shape[1], SIDE):
        part_OB = w_OI[:, start : start + SIDE]
        product_OI = (part_OB @ gram_II[start : start + SIDE, start:]).mul_(w_OI[:, start:])
        total += product_OI[:, :SIDE].sum() + 2 * product_OI[:, SIDE:].sum()
    return total.clamp(min=0)
