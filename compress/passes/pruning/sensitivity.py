"""Sparsity, bits or ranks where they cost least, by the measured cost of rewriting each part of the model alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from compress.errors import CalibrationError, RecipeError
from compress.model.block import Block, peers_of
from compress.model.globs import matches
from compress.model.site import Site
from compress.model.whole import Whole
from compress.passes.base import Budget, GridQuantizer, Pruner, Sparsity, WeightPass
from compress.passes.budget import density
from compress.passes.codec import Codec
from compress.passes.factorizer import Factorizer
from compress.passes.probes import LEAST, Probes, output_cost, rewritten
from compress.stats import Gram

Governed = Pruner | GridQuantizer | Factorizer | Codec
SEEN = 0.5  # bits around which a codec is measured at most: with more, the model's own rounding hides its cost
LEAST_POWER = 0.25  # smallest exponent of the power law of a codec
PLAIN = 16  # bits of an uncompressed weight: a codec of `bits` bits removes the share 1 - bits / PLAIN
FURTHEST = 2  # largest distance from the mean number of bits
FINE = 16  # interpolated steps between two measured fractions
MOST_REMOVED = 0.95  # share removed by factoring at most: all but the smallest matrices keep a rank of at least one


@dataclass(frozen=True, kw_only=True)
class Part:
    """Sites that read one input, or all experts of a layer: their parameters, and the cost of each option."""

    sites: tuple[str, ...]
    size: int
    options: tuple[Sparsity, ...]  # from the densest; bits as whole numbers
    costs: tuple[float, ...]  # KL in nats, or relative squared error


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Budget, name="sensitivity"):
    """Minimise the sum of the costs of rewriting each part alone, at the mean that the next such pass asks for.

    A part is the sites that read one input, or all experts of a layer. It is rewritten by the pass itself while the
    rest of the model stays dense. With `kl`, the probe then runs to the logits, for all parts in one reading of the
    model. With `gram`, the relative squared output errors, tr(D G Dᵀ) / tr(W G Wᵀ), are summed; this needs no forward
    through later blocks, but ignores what those blocks make of the error. Sparsities are measured at three values
    within `spread` and interpolated in the logarithm of the cost. n:m is measured at each n within `spread`, but an n
    above that of the pattern loses its speed on hardware. The bits of a grid are measured at each whole number within
    two of the mean, which `bits` may set to a fraction. A codec is measured at three numbers of bits up to one, to
    which a power law is fitted, because with more bits its cost cannot be told from the rounding of the model itself.
    Then marginal costs are made equal. It takes the time of the pass times the number of options tried.
    Source: additive damage, LeCun et al., "Optimal Brain Damage", NeurIPS 1989; allocation, Shoham and Gersho,
    "Efficient Bit Allocation for an Arbitrary Set of Quantizers", 1988; measuring the costs in this way is ours.
    """

    options_set = ("sparsity", "bits", "removed")

    spread: Annotated[
        float, Field(ge=0.01, le=0.5, description="largest deviation of a part from the mean sparsity")
    ] = 0.2
    bits: Annotated[
        Annotated[float, Field(ge=2, le=8)] | None, Field(description="mean bits per code; default: the quantizer's")
    ] = None
    measure: Annotated[
        Literal["kl", "gram"],
        Field(description="measure costs by the KL of the logits (kl) or by output errors alone (gram)"),
    ] = "kl"

    def check(self, step: WeightPass) -> None:
        """Raise RecipeError if `bits` is set but the pass is not a quantizer on integer grids."""
        if self.bits is not None and not isinstance(step, GridQuantizer):
            raise RecipeError(f"{self.name}.bits: {step.name} follows and has no bits to distribute; leave bits out")

    def likely(self, step: WeightPass) -> tuple[tuple[float, WeightPass], ...]:
        """The pass with the whole bits above and below the mean, in the shares that give it."""
        if self.bits is None or not isinstance(step, GridQuantizer):
            return super().likely(step)
        low, more = int(self.bits), self.bits % 1
        shares = {low: 1 - more, **({low + 1: more} if more else {})}
        return tuple((share, replace(step, bits=bits)) for bits, share in shares.items())

    def allocate(self, model: Whole, step: Governed) -> dict[str, Sparsity]:
        """One sparsity, number of bits or share removed for the sites of each part that `step` selects.

        Raises CalibrationError if rewriting a part alone makes the logits non-finite.
        """
        tried = self.options_for(step)
        found: list[tuple[tuple[str, ...], int]] = []
        costs: list[float] = []
        probes = Probes(model)
        kinds = {*step.requires, *((Gram,) if self.measure == "gram" else ())}
        for block in model.blocks(kinds, step.sites):
            probes.follow(block)
            for sites in parts_of(block, step.sites):
                found.append((tuple(s.name for s in sites), sum(s.shape[0] * s.shape[1] for s in sites)))
                for option in tried:
                    with rewritten(sites, with_option(step, option)):
                        if self.measure == "gram":
                            costs.append(max(LEAST, sum(map(output_cost, sites))))
                        else:
                            probes.take(block)
                for site in sites:
                    site.stats.forget()
        costs += probes.costs()
        for i, cost in enumerate(costs):
            if not math.isfinite(cost):
                first = found[i // len(tried)][0][0]
                raise CalibrationError(f"{self.name}: rewriting {first} alone makes the logits not finite")
        measured = [costs[i : i + len(tried)] for i in range(0, len(costs), len(tried))]
        parts = [
            law(*part, tried, each, step.bits) if isinstance(step, Codec) else curve(*part, tried, each)
            for part, each in zip(found, measured, strict=True)
        ]
        mean = (self.bits or step.bits) if isinstance(step, GridQuantizer) else density(asked(step))
        chosen = spend(parts, mean)
        pairs = zip(parts, chosen, strict=True)
        return {site: own_option(step, option) for part, option in pairs for site in part.sites}

    def options_for(self, step: Governed) -> tuple[Sparsity, ...]:
        """The options to measure, densest first: whole bits, a fraction and the ends of its spread, or each n in it."""
        if isinstance(step, GridQuantizer):
            mean = self.bits or step.bits
            return tuple(bits for bits in range(8, 1, -1) if abs(bits - mean) <= FURTHEST)
        wanted = asked(step)
        if isinstance(wanted, str):
            kept, of = map(int, wanted.split(":"))
            near = [n for n in range(of - 1, 0, -1) if abs(n - kept) <= max(1.0, self.spread * of)]
            return tuple(f"{n}:{of}" for n in near)
        if isinstance(step, Codec):
            middle = min(step.bits, SEEN)
            return tuple(1 - bits / PLAIN for bits in (2 * middle, middle, middle / 2))
        most = MOST_REMOVED if isinstance(step, Factorizer) else 1.0
        ends = (max(0.0, wanted - self.spread), wanted, max(wanted, min(most, wanted + self.spread)))
        fractions = tuple(dict.fromkeys(round(float(end), 4) for end in ends))
        return fractions if 0 < wanted < 1 else (float(wanted),)


def with_option(step: Governed, option: Sparsity) -> Governed:
    """The pass with another sparsity, other bits or another share removed."""
    changed: dict[str, Any] = {step.shared_out: own_option(step, option)}
    return replace(step, **changed)


def own_option(step: Governed, option: Sparsity) -> Sparsity:
    """The option in the terms of the pass itself: for a codec, the share removed becomes bits."""
    return PLAIN * (1 - option) if isinstance(step, Codec) and isinstance(option, float) else option


def asked(step: Governed) -> Sparsity:
    """What the recipe asks of the pass, as a mean."""
    if isinstance(step, Codec):
        return 1 - step.bits / PLAIN
    wanted: Sparsity = getattr(step, step.shared_out)
    return wanted


def amount(option: Sparsity) -> float:
    """Bits, or the share kept."""
    return float(option) if isinstance(option, int) else density(option)


def parts_of(block: Block, glob: str) -> list[list[Site]]:
    """The selected sites of a block grouped by the input they read; the experts of a layer together."""
    parts: dict[str, list[Site]] = {}
    for group in block.groups:
        parts.setdefault(peers_of(group), []).extend(site for site in group if matches(site.name, glob))
    return [sites for sites in parts.values() if sites]


def curve(sites: tuple[str, ...], size: int, tried: Sequence[Sparsity], costs: Sequence[float]) -> Part:
    """A part with its costs; those of fractions are interpolated between the measured ones in their logarithm."""
    if not isinstance(tried[0], float) or len(tried) == 1:
        return Part(sites=sites, size=size, options=tuple(tried), costs=tuple(costs))
    options: list[Sparsity] = []
    fine: list[float] = []
    for i in range(len(tried) - 1):
        (left, low), (right, high) = [(1 - density(tried[j]), math.log(costs[j])) for j in (i, i + 1)]
        shares = [k / FINE for k in range(FINE + (i == len(tried) - 2))]
        options += [round(left + share * (right - left), 4) for share in shares]
        fine += [math.exp(low + share * (high - low)) for share in shares]
    return Part(sites=sites, size=size, options=tuple(options), costs=tuple(fine))


def law(sites: tuple[str, ...], size: int, tried: Sequence[Sparsity], costs: Sequence[float], bits: float) -> Part:
    """A part whose cost falls as a power of the bits, fitted to the measured costs; its options lie around `bits`."""
    log_bits = torch.tensor([PLAIN * density(option) for option in tried]).log()
    log_costs = torch.tensor(costs).log()
    centred = log_bits - log_bits.mean()
    power = max(LEAST_POWER, -float((centred * log_costs).sum() / centred.square().sum()))
    grid = [bits * 2 ** (k / FINE) for k in range(FINE, -2 * FINE, -1)]  # from twice to a quarter
    options = [b for b in grid if b < PLAIN]
    at = [math.exp(float(log_costs.mean()) - power * (math.log(b) - float(log_bits.mean()))) for b in options]
    return Part(sites=sites, size=size, options=tuple(round(1 - b / PLAIN, 5) for b in options), costs=tuple(at))


def spend(parts: Sequence[Part], keep: float) -> list[Sparsity]:
    """The option of each part with the least sum of costs, such that their mean over parameters is `keep`.

    Options that `cheapest_cut` has cut too far are moved back where that fits.
    """
    chosen = cheapest_cut(parts, keep)
    if any(isinstance(option, float) for option in chosen):
        return chosen  # fractions meet the mean
    at = [p.options.index(option) for p, option in zip(parts, chosen, strict=True)]
    kept = sum(p.size * amount(option) for p, option in zip(parts, chosen, strict=True))
    give_back(parts, at, keep * sum(p.size for p in parts) - kept)
    return [p.options[i] for p, i in zip(parts, at, strict=True)]


def cheapest_cut(parts: Sequence[Part], keep: float) -> list[Sparsity]:
    """The cheapest choice of all that keep as little as it does, which is `keep`, or less by one step of a part.

    Greedy along the lower convex hull of each cost curve, on which it is exact; the last step of a fraction is
    shortened so that the share kept is met.
    """
    at = [0] * len(parts)
    total = sum(p.size for p in parts)
    surplus = sum(p.size * (amount(p.options[0]) - keep) for p in parts)  # parameters still to be cut
    steps = [next_step(p, 0) for p in parts]
    while surplus > 1e-6 * total:
        open_steps = [(slope, i, j) for i, (slope, j) in enumerate(steps) if j]
        if not open_steps:
            break
        _, i, j = min(open_steps)
        p = parts[i]
        gain = p.size * (amount(p.options[at[i]]) - amount(p.options[j]))
        if gain > surplus and isinstance(p.options[j], float):
            last = 1 - amount(p.options[at[i]]) + surplus / p.size
            return [round(last, 4) if k == i else q.options[at[k]] for k, q in enumerate(parts)]
        at[i], surplus, steps[i] = j, surplus - gain, next_step(p, j)
    return [p.options[at[i]] for i, p in enumerate(parts)]


def give_back(parts: Sequence[Part], at: list[int], spare: float) -> None:
    """Move `at` back to denser options as far as `spare` allows, the best ratio of cost saved to parameters first."""
    while True:
        fits = []
        for i, p in enumerate(parts):
            for j in range(at[i]):
                wanted = p.size * (amount(p.options[j]) - amount(p.options[at[i]]))
                saved = p.costs[at[i]] - p.costs[j]
                if 0 < wanted <= spare and saved > 0:
                    fits.append((saved / wanted, i, j, wanted))
        if not fits:
            return
        _, i, j, wanted = max(fits)
        at[i], spare = j, spare - wanted


def next_step(p: Part, at: int) -> tuple[float, int]:
    """(added cost per parameter cut, the option reached) of the cheapest step from `at`; option 0 if there is none."""
    steps = [
        ((p.costs[j] - p.costs[at]) / (p.size * (amount(p.options[at]) - amount(p.options[j]))), j)
        for j in range(at + 1, len(p.options))
        if p.options[j] != p.options[at]  # fractions measured close together are equal once rounded
    ]
    return min(steps, default=(0.0, 0))
