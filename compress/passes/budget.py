"""How budgets are assigned to the passes they govern, and the arithmetic of spreading a sparsity over unequal parts.

A part is what gets one sparsity: a block, or a group of sites. Sizes are in parameters.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from compress.errors import RecipeError
from compress.model.whole import Whole
from compress.passes.base import Budget, Pass, SitePass, Sparsity, WeightPass

Budgets = dict[int, dict[str, Sparsity]]
HALVINGS = 60  # of an interval of width 4: to the precision of a float64


def governed(passes: Sequence[Pass]) -> list[tuple[Budget, int]]:
    """Each budget with the index, among the passes on sites, of the next pass that has an option it can set.

    Raises RecipeError if no such pass follows, or if that pass has a budget already.
    """
    found: list[tuple[Budget, int]] = []
    for i, step in enumerate(passes):
        if not isinstance(step, Budget):
            continue
        after = next((j for j in range(i + 1, len(passes)) if option_of(passes[j]) in step.options_set), None)
        if after is None:
            what = " or ".join(step.options_set)
            raise RecipeError(f"passes[{i}].{step.name}: no pass follows whose {what} it could set")
        index = sum(isinstance(other, SitePass) for other in passes[:after])
        if any(index == taken for _, taken in found):
            raise RecipeError(f"passes[{i}].{step.name}: passes[{after}].{passes[after].name} has a budget already")
        taker = passes[after]
        if isinstance(taker, WeightPass):
            try:
                step.check(taker)
            except RecipeError as error:
                raise RecipeError(f"passes[{i}].{error}") from error
        found.append((step, index))
    return found


def option_of(step: Pass) -> str | None:
    """The option of a pass that a budget may set, or None."""
    return (step.shared_out or None) if isinstance(step, WeightPass) else None


def allocations(passes: Sequence[Pass], model: Whole) -> Budgets:
    """Index of a governed pass, as in `governed`, -> the option value that its budget sets for each site."""
    steps = [step for step in passes if isinstance(step, SitePass)]
    return {index: budget.allocate(model, steps[index]) for budget, index in governed(passes)}


def density(sparsity: Sparsity) -> float:
    """The share kept at a sparsity."""
    if isinstance(sparsity, str):
        kept, of = sparsity.split(":")
        return int(kept) / int(of)
    return 1 - sparsity


def centred(
    keep: Sequence[float], sizes: Sequence[int], mean: float, low: float = 0.01, high: float = 1.0
) -> list[float]:
    """`keep` plus one constant, clamped to [low, high], such that its mean, weighted by `sizes`, is `mean`.

    If `mean` itself lies outside [low, high], that bound moves to it.
    """
    low, high = min(low, mean), max(high, mean)
    left, right = -2.0, 2.0
    for _ in range(HALVINGS):
        shift = (left + right) / 2
        total = sum(size * min(high, max(low, k + shift)) for k, size in zip(keep, sizes, strict=True))
        left, right = (shift, right) if total < mean * sum(sizes) else (left, shift)
    return [min(high, max(low, k + left)) for k in keep]


def as_asked(sparsity: Sparsity, keep: Mapping[str, float], sizes: Mapping[str, int]) -> dict[str, Sparsity]:
    """The share kept of each part in the form of `sparsity`: a fraction dropped, or n:m with n from 1 to m - 1.

    The n of n:m is rounded by largest remainder, so that the sum over parts stays within one part of what was asked.
    """
    if not isinstance(sparsity, str):
        return {part: round(1 - share, 4) for part, share in keep.items()}
    m = int(sparsity.split(":")[1])
    weights = [sizes[part] for part in keep]
    mean = sum(share * size for share, size in zip(keep.values(), weights, strict=True)) / max(1, sum(weights))
    ends = 1 / m, (m - 1) / m
    inside = centred(list(keep.values()), weights, min(ends[1], max(ends[0], mean)), *ends)  # the mean stays
    exact = {part: share * m for part, share in zip(keep, inside, strict=True)}
    chosen = {part: math.floor(n + 1e-9) for part, n in exact.items()}
    missing = sum(sizes[part] * (n - chosen[part]) for part, n in exact.items())
    for part in sorted(exact, key=lambda part: chosen[part] - exact[part]):
        if chosen[part] < m - 1 and missing >= sizes[part] / 2:
            chosen[part] += 1
            missing -= sizes[part]
    return {part: f"{n}:{m}" for part, n in chosen.items()}
