"""Refits the laws on measured points by least squares on log QiD, and only the parameters that the points identify.

An exponent is free if its variable varies. The exponent of a variable that does not vary keeps its published value, or,
for Kumar's law, whose constants were not verified, is absorbed into k. Shapes: n points, f unknowns (including the
intercept), b resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from compress.errors import RecipeError
from compress_evals.qid.law import PUBLISHED, Curve, Law, depth
from compress_evals.qid.points import Point
from compress_evals.stats import Floats

SMALLEST, LARGEST = 0.003, 2.0  # nats; a degradation below is noise, above it is saturated
NEEDED = {1: 1, 2: 3, 3: 5, 4: 8}  # points by number of unknowns: more than solve for them, and 8 as in the paper's fit
EXPONENTS = {"beta": "tokens", "alpha": "parameters", "gamma": "bits"}
LEVERAGE = 1 - 1e-9  # above this, a point alone determines an unknown and cannot be predicted from the others


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A fitted law, and which part of it was fitted.

    `free` are the fitted exponents, `intervals` their 95 % percentile bootstrap intervals over points. There are none
    if there are only as many points as the unknowns need, and they ignore that points of one model are dependent.
    `residual` and `held_out` are root mean squares of ln(predicted / measured), the latter with each point left out in
    turn; it is None if a single point determines an exponent, or if there is only one point.
    """

    law: Law
    free: tuple[str, ...]
    used: int
    dropped: int
    intervals: dict[str, tuple[float, float]]
    residual: float
    held_out: float | None


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """The power law and Kumar's exponential law on the same points; `exponential` is None if bits do not vary."""

    power: Fit
    exponential: Fit | None


def refit(points: Sequence[Point]) -> Comparison:
    """Both laws, fitted on the same points; raises RecipeError for points that cannot identify the parameters."""
    power = fit(points, "power")
    varied = "gamma" in power.free
    return Comparison(power=power, exponential=fit(points, "exponential") if varied else None)


def fit(points: Sequence[Point], curve: Curve = "power", iters: int = 2000, seed: int = 0) -> Fit:
    """The least squares fit of ln QiD on those of ln D, -ln N and -ln P (-P if exponential) that vary.

    If there is one point, or no variable varies, only k is fitted. Points below 0.003 or above 2 nats are dropped.
    Raises RecipeError if no point is left, if there are too few, if variables are collinear, or if degradation does not
    fall with bits.
    """
    used = [point for point in points if SMALLEST <= point.degradation <= LARGEST]
    if not used:
        raise RecipeError(
            f"no point between {SMALLEST} and {LARGEST} nats: smaller values are noise, larger ones saturated"
        )
    columns = {name: column(used, name, curve) for name in EXPONENTS}
    free = tuple(name for name, values in columns.items() if np.ptp(values) > 1e-9 * max(1.0, np.abs(values).max()))
    x_nf = design(columns, free)
    refuse(x_nf, free)
    kept = replace(PUBLISHED if curve == "power" else Law(log_k=0, beta=0, alpha=0, gamma=0), curve=curve)
    y_n = np.array([math.log(point.degradation) for point in used])
    y_n = y_n - sum(getattr(kept, name) * columns[name] for name in EXPONENTS if name not in free)
    means_f = x_nf[:, 1:].mean(0)
    centred_nf = np.concatenate([x_nf[:, :1], x_nf[:, 1:] - means_f], axis=1)
    solved = np.linalg.lstsq(centred_nf, y_n, rcond=None)[0]
    found = dict(zip(free, solved[1:].tolist(), strict=True))
    if found.get("gamma", 1.0) <= 0:
        raise RecipeError(f"degradation does not fall with bits in these points: gamma = {found['gamma']:.3g}")
    law = replace(kept, log_k=float(solved[0] - means_f @ solved[1:]), ranges=ranges(used), **found)
    residual_n = y_n - centred_nf @ solved
    return Fit(
        law=law, free=free, used=len(used), dropped=len(points) - len(used),
        intervals=intervals(centred_nf, y_n, free, iters, seed) if len(used) > NEEDED[len(free) + 1] else {},
        residual=rms(residual_n), held_out=held_out(centred_nf, residual_n),
    )  # fmt: skip


def column(points: Sequence[Point], name: str, curve: Curve) -> Floats:
    """The regressor of an exponent, for each point."""
    match name:
        case "beta":
            return np.array([math.log(point.tokens) for point in points])
        case "alpha":
            return np.array([-math.log(point.parameters) for point in points])
        case _:
            return np.array([-depth(point.bits, curve) for point in points])


def design(columns: dict[str, Floats], free: Sequence[str]) -> Floats:
    """The design matrix [n, f]: ones, then the columns of the free exponents."""
    ones = np.ones_like(columns["beta"])
    return np.stack([ones, *(columns[name] for name in free)], axis=1)


def refuse(x_nf: Floats, free: Sequence[str]) -> None:
    """Raise RecipeError if there are too few points, or if their variables are collinear."""
    count, unknowns = x_nf.shape
    varied = " and ".join(EXPONENTS[name] for name in free)
    if count < NEEDED[unknowns]:
        raise RecipeError(
            f"{count} usable points for k and {unknowns - 1} exponents, as {varied} vary; need {NEEDED[unknowns]}, "
            "or one point to fit k alone"
        )
    if not free:
        return
    centred_nf = x_nf[:, 1:] - x_nf[:, 1:].mean(0)
    if np.linalg.matrix_rank(centred_nf / centred_nf.std(0), tol=1e-6) < unknowns - 1:
        raise RecipeError(
            f"{varied} are collinear in these points, so the exponents {', '.join(free)} cannot be identified"
        )


def intervals(x_nf: Floats, y_n: Floats, free: Sequence[str], iters: int, seed: int) -> dict[str, tuple[float, float]]:
    """95 % percentile bootstrap intervals of the exponents over points; resamples without full rank are left out."""
    if not free:
        return {}
    count = len(y_n)
    counts_bn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=iters).astype(float)
    scale_f = np.maximum(np.abs(x_nf).max(0), 1e-12)
    scaled_nf = x_nf / scale_f
    normal_bff = np.einsum("bn,ni,nj->bij", counts_bn, scaled_nf, scaled_nf)
    whole = np.linalg.matrix_rank(normal_bff, tol=1e-9) == x_nf.shape[1]
    right_bf = np.einsum("bn,ni,n->bi", counts_bn[whole], scaled_nf, y_n)
    solved_bf = np.linalg.solve(normal_bff[whole], right_bf[..., None])[..., 0] / scale_f
    low, high = np.quantile(solved_bf[:, 1:], [0.025, 0.975], axis=0)
    return {name: (float(low[i]), float(high[i])) for i, name in enumerate(free)}


def held_out(x_nf: Floats, residual_n: Floats) -> float | None:
    """The root mean square leave-one-out error, computed from leverages, so that nothing is refitted.

    None if the leverage of a point is 1. Source: Allen, Technometrics 1974 (PRESS): the residual over 1 - h.
    """
    basis_nf = np.linalg.qr(x_nf)[0]
    leverage_n = (basis_nf**2).sum(1)
    if (leverage_n > LEVERAGE).any():
        return None
    return rms(residual_n / (1 - leverage_n))


def ranges(points: Sequence[Point]) -> dict[str, tuple[float, float]]:
    """The minimum and maximum of each variable."""
    values = {name: [getattr(point, name) for point in points] for name in EXPONENTS.values()}
    return {name: (min(found), max(found)) for name, found in values.items()}


def rms(values: Floats) -> float:
    """The root mean square."""
    return float(np.sqrt(np.mean(values**2)))
