"""Sparsity, bits and ranks where they cost least: what rewriting each part of the model alone costs, measured."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Annotated, Any, Literal

import torch
from pydantic import Field

from compress.errors import CalibrationError, RecipeError
from compress.model.block import Block, peers_of
from compress.model.site import Site
from compress.model.whole import Whole
from compress.passes.base import Budget, GridQuantizer, Pruner, Sparsity, WeightPass
from compress.passes.budget import density
from compress.passes.codec import Codec
from compress.passes.factorizer import Factorizer
from compress.passes.probes import LEAST, Probes, output_cost, rewritten
from compress.stats import Gram

Governed = Pruner | GridQuantizer | Factorizer | Codec
SEEN = 0.5  # bits of a codec around which it is measured at most: with more its cost drowns in the model's own rounding
LEAST_POWER = 0.25
PLAIN = 16  # bits of a weight of which a codec leaves `bits`: the share removed is what the two differ by
FURTHEST = 2  # bits from the mean
FINE = 16  # steps between two measured fractions
MOST_REMOVED = 0.95  # of a matrix that is factored: a rank of at least one is left of all but the smallest


@dataclass(frozen=True, kw_only=True)
class Part:
    """Sites that read one input, or all experts of a layer: their parameters, and the cost of each option."""

    sites: tuple[str, ...]
    size: int
    options: tuple[Sparsity, ...]  # from the densest; bits as whole numbers
    costs: tuple[float, ...]  # KL in nats, or relative squared error


@dataclass(frozen=True, kw_only=True)
class Sensitivity(Budget, name="sensitivity"):
    """Minimise the sum of what pruning or rounding each part alone costs, at the mean that the next such pass asks for.

    A part is the sites that read one input, or all experts of a layer. The pass itself rewrites it, the rest stays
    dense. By `kl` the probe then runs to the logits, all parts in one reading of the model; by `gram` the relative
    squared errors of the outputs are summed, tr(D G Dᵀ) / tr(W G Wᵀ), which needs no forward behind the part but does
    not know what later blocks make of it. Sparsities are measured at three values within `spread` and interpolated in
    the logarithm of the cost; n:m at each n within it, where an n above the pattern's loses its speed on hardware; bits
    of a grid at each whole number within two of the mean, which `bits` may set to a fraction. A codec is measured at
    three numbers of bits up to one, and a power law fitted: with more bits its cost cannot be told from the rounding of
    the model itself. Marginal costs are then made equal. Takes as many times what the pass takes as it tries options.
    Source: additive damage, LeCun et al., "Optimal Brain Damage", NeurIPS 1989; allocation, Shoham and Gersho,
    "Efficient Bit Allocation for an Arbitrary Set of Quantizers", 1988; measuring the costs in this way is ours.
    """

    options_set = ("sparsity", "bits", "removed")

    spread: Annotated[
        float, Field(ge=0.01, le=0.5, description="furthest that a part may be from the mean sparsity")
    ] = 0.2
    bits: Annotated[
        Annotated[float, Field(ge=2, le=8)] | None, Field(description="mean bits of a code; default: the quantizer's")
    ] = None
    measure: Annotated[Literal["kl", "gram"], Field(description="cost by the logits, or by outputs alone")] = "kl"

    def check(self, step: WeightPass) -> None:
        """A mean of bits is for a quantizer."""
        if self.bits is not None and not isinstance(step, GridQuantizer):
            raise RecipeError(f"{self.name}.bits: {step.name} follows, which has no bits to share out; leave it out")

    def allocate(self, model: Whole, step: Governed) -> dict[str, Sparsity]:
        """One sparsity, or number of bits, for the sites of each part that `step` selects."""
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
        """The options to measure, from the densest: bits, a fraction and both ends of its spread, or every n in it."""
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
    """What the pass itself calls an option: of a codec the share removed is its bits."""
    return PLAIN * (1 - option) if isinstance(step, Codec) and isinstance(option, float) else option


def asked(step: Governed) -> Sparsity:
    """What a recipe asks the pass for, on average."""
    if isinstance(step, Codec):
        return 1 - step.bits / PLAIN
    wanted: Sparsity = getattr(step, step.shared_out)
    return wanted


def amount(option: Sparsity) -> float:
    """Bits, or the share kept."""
    return float(option) if isinstance(option, int) else density(option)


def parts_of(block: Block, glob: str) -> list[list[Site]]:
    """The selected sites of a block by what they read; the experts of a layer together."""
    parts: dict[str, list[Site]] = {}
    for group in block.groups:
        parts.setdefault(peers_of(group), []).extend(site for site in group if fnmatchcase(site.name, glob))
    return [sites for sites in parts.values() if sites]


def curve(sites: tuple[str, ...], size: int, tried: Sequence[Sparsity], costs: Sequence[float]) -> Part:
    """A part with its costs, those of fractions interpolated between the measured ones, in their logarithm."""
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
    """A part of which the cost falls as a power of the bits, fitted to what was measured; options around `bits`."""
    log_bits = torch.tensor([PLAIN * density(option) for option in tried]).log()
    log_costs = torch.tensor(costs).log()
    centred = log_bits - log_bits.mean()
    power = max(LEAST_POWER, -float((centred * log_costs).sum() / centred.square().sum()))
    grid = [bits * 2 ** (k / FINE) for k in range(FINE, -2 * FINE, -1)]  # from twice to a quarter
    options = [b for b in grid if b < PLAIN]
    at = [math.exp(float(log_costs.mean()) - power * (math.log(b) - float(log_bits.mean()))) for b in options]
    return Part(sites=sites, size=size, options=tuple(round(1 - b / PLAIN, 5) for b in options), costs=tuple(at))


def spend(parts: Sequence[Part], keep: float) -> list[Sparsity]:
    """The option of each part at which their costs sum to the least, and `keep` is their mean over parameters.

    What `cheapest_cut` cuts too much is given back where it fits.
    """
    chosen = cheapest_cut(parts, keep)
    if any(isinstance(option, float) for option in chosen):
        return chosen  # fractions meet the mean
    at = [p.options.index(option) for p, option in zip(parts, chosen, strict=True)]
    kept = sum(p.size * amount(option) for p, option in zip(parts, chosen, strict=True))
    give_back(parts, at, keep * sum(p.size for p in parts) - kept)
    return [p.options[i] for p, i in zip(parts, at, strict=True)]


def cheapest_cut(parts: Sequence[Part], keep: float) -> list[Sparsity]:
    """The cheapest choice of all that keep as little as it does, which is `keep` or a step of one part less.

    Greedy along the lower convex hull of each curve, which is exact there; the last step of a fraction is cut short, so
    that the share kept is met.
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
    """Move `at` back to denser options where what was cut too much allows it, the best use of it first."""
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
    """(added cost for each parameter cut, the option reached) of the cheapest step from `at`; option 0 if none."""
    steps = [
        ((p.costs[j] - p.costs[at]) / (p.size * (amount(p.options[at]) - amount(p.options[j]))), j)
        for j in range(at + 1, len(p.options))
    ]
    return min(steps, default=(0.0, 0))
