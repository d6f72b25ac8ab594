"""The scaling law of quantization-induced degradation (QiD), its inverses, and the range in which it is valid.

N counts parameters outside embeddings and output head, D is training tokens, P is bits per weight; none is in billions.
Degradation is the cross-entropy of the quantized model minus that of the dense one, in nats per token.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal

from compress.errors import RecipeError

Curve = Literal["power", "exponential"]
Range = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Law:
    """QiD(N, D, P) = k D^beta / N^alpha / P^gamma; for the curve `exponential`, exp(-gamma P) replaces 1 / P^gamma.

    `ranges` are those of the points it was fitted on. Methods raise RecipeError for an argument that is not a positive
    finite number.
    Source: Ouyang et al., "Low-Bit Quantization Favors Undertrained LLMs", ACL 2025, arXiv 2411.17691; `exponential`:
    Kumar et al., "Scaling Laws for Precision", 2024, arXiv 2411.04330, where gamma is 1 / gamma_post.
    """

    log_k: float
    beta: float
    alpha: float
    gamma: float
    curve: Curve = "power"
    ranges: dict[str, Range] = field(default_factory=dict)

    @property
    def k(self) -> float:
        """The constant factor of the law."""
        return exp(self.log_k)

    def degradation(self, parameters: float, tokens: float, bits: float) -> float:
        """The degradation at `bits`, in nats per token; it is not bounded, unlike in `predict`."""
        check(parameters=parameters, tokens=tokens, bits=bits)
        return exp(self._undamped(parameters, tokens) - self.gamma * depth(bits, self.curve))

    def bits_for(self, loss: float, parameters: float, tokens: float) -> float:
        """The bits at which the degradation is `loss`; raises RecipeError unless the law falls with bits."""
        check(loss=loss, parameters=parameters, tokens=tokens)
        if self.gamma <= 0:
            raise RecipeError(f"gamma = {self.gamma:.3g}: this law does not fall with bits and has no inverse")
        reached = (self._undamped(parameters, tokens) - math.log(loss)) / self.gamma
        return exp(reached) if self.curve == "power" else reached

    def tokens_for(self, loss: float, parameters: float, bits: float) -> float:
        """The training tokens at which `bits` cost `loss`; raises RecipeError unless the law grows with tokens."""
        check(loss=loss, parameters=parameters, bits=bits)
        if self.beta <= 0:
            raise RecipeError(f"beta = {self.beta:.3g}: this law does not grow with tokens and has no inverse")
        rest = self.log_k - self.alpha * math.log(parameters) - self.gamma * depth(bits, self.curve)
        return exp((math.log(loss) - rest) / self.beta)

    def _undamped(self, parameters: float, tokens: float) -> float:
        return self.log_k + self.beta * math.log(tokens) - self.alpha * math.log(parameters)


# fitted on GPTQ at 2, 3 and 4 bits on checkpoints of Pythia, with the loss on RefinedWeb
PUBLISHED = Law(
    log_k=math.log(0.017), beta=0.5251, alpha=0.2261, gamma=5.4967,
    ranges={"parameters": (160e6, 12e9), "tokens": (1e9, 206e9), "bits": (2.0, 4.0)},
)  # fmt: skip


def depth(bits: float, curve: Curve) -> float:
    """The factor of gamma: ln P for the power law, P for the exponential one."""
    return math.log(bits) if curve == "power" else bits


@dataclass(frozen=True, kw_only=True)
class Row:
    """One bit width: its degradation, whether that was clamped, and the tokens at which it reaches the given loss."""

    bits: float
    degradation: float
    clamped: bool
    tokens_for_loss: float | None


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """The predicted degradation of one model at each bit width.

    `bits_needed` for a degradation of at most `loss` nats is not rounded; None if it is too large for a float.
    """

    parameters: float
    tokens: float
    loss: float
    ceiling: float | None
    rows: tuple[Row, ...]
    bits_needed: float | None
    caveats: tuple[str, ...]


def predict(
    law: Law,
    parameters: float,
    tokens: float,
    bits: list[float],
    *,
    loss: float = 0.2,
    vocabulary: int | None = None,
    dense_loss: float | None = None,
    mixture: bool = False,
) -> Prediction:
    """The degradation at each bit width, clamped at the level of guessing, with caveats.

    A cross-entropy above ln V, V being `vocabulary`, is worse than guessing uniformly, so the degradation is at most
    ln V - CE, where CE is `dense_loss`. Without `dense_loss` the bound is ln V; without `vocabulary` there is none.
    Raises RecipeError for values that are not positive, or for a dense loss no better than guessing.
    """
    highest = ceiling(vocabulary, dense_loss)
    rows = []
    for width in bits:
        raw = law.degradation(parameters, tokens, width)
        beyond = highest is not None and raw > highest
        reached = finite(law.tokens_for(loss, parameters, width)) if law.beta > 0 else None
        value = highest if highest is not None and beyond else raw
        rows.append(Row(bits=width, degradation=value, clamped=beyond, tokens_for_loss=reached))
    caveats = doubts(law, {"parameters": [parameters], "tokens": [tokens], "bits": bits})
    caveats += bound_doubts(vocabulary, dense_loss)
    caveats += ["mixtures of experts are outside the law: N here counts every expert"] if mixture else []
    return Prediction(
        parameters=parameters, tokens=tokens, loss=loss, ceiling=highest, rows=tuple(rows),
        bits_needed=finite(law.bits_for(loss, parameters, tokens)), caveats=tuple(caveats),
    )  # fmt: skip


def ceiling(vocabulary: int | None, dense_loss: float | None) -> float | None:
    """The largest possible degradation, ln V - CE in nats; None without `vocabulary`, RecipeError unless positive."""
    if dense_loss is not None:
        check(dense_loss=dense_loss)
        if vocabulary is None:
            raise RecipeError("--dense-loss bounds the loss only with --vocabulary, or a model folder")
    if vocabulary is None:
        return None
    check(vocabulary=vocabulary)
    most = math.log(vocabulary) - (dense_loss or 0.0)
    if most <= 0:
        raise RecipeError(
            f"--dense-loss: {dense_loss} nats is no better than guessing among {vocabulary} tokens, "
            f"{math.log(vocabulary):.2f}"
        )
    return most


def doubts(law: Law, asked: dict[str, list[float]]) -> list[str]:
    """The caveats: one line for each variable outside its range, and what the law does not model."""
    lines = []
    for name, values in asked.items():
        low, high = law.ranges[name]
        beyond = [value for value in values if not low * (1 - 1e-9) <= value <= high * (1 + 1e-9)]
        if beyond:
            said = ", ".join(f"{value:.3g}" for value in beyond)
            lines.append(f"extrapolated: {name} {said}; the law was fitted on {low:.3g} to {high:.3g}")
    return [
        *lines,
        "calibration, group size and method change k by several times: refit it on one measured point with --fit",
        "distilled models and training in stages are outside the law",
    ]


def bound_doubts(vocabulary: int | None, dense_loss: float | None) -> list[str]:
    """The caveats about the bound: what is missing to compute it."""
    if vocabulary is None:
        return ["not clamped: a loss above ln V is meaningless; give --vocabulary"]
    if dense_loss is None:
        return ["clamped at ln V, as the dense loss is not known; give --dense-loss for ln V - CE"]
    return []


def check(**values: float) -> None:
    """Raise RecipeError for the first value that is not a positive finite number."""
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise RecipeError(f"{name}: {value} is not a positive number")


def exp(power: float) -> float:
    """e^power, infinite where that is too large for a float."""
    return math.exp(power) if power < 700 else math.inf


def finite(value: float) -> float | None:
    """The value, or None if it is infinite or NaN, which JSON cannot represent."""
    return value if math.isfinite(value) else None
