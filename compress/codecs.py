"""The methods of `compress delta extract`: for each, the passes that store a difference in so many bits a weight.

A method is a list of passes like any other; it is here so that people need not write a recipe for each size.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor, log2
from typing import Any

from compress.errors import RecipeError, nearest
from compress.passes import Pass
from compress.recipe import read_pass

PLAIN = 16  # bits of a stored number
CODED = 4  # bits of a kept value of a sparse delta
SPARE = 1.7  # bits that the position of a kept value takes beyond log2 of their distance
HALVINGS = 50
Steps = list[dict[str, dict[str, Any]]]


def bitdelta(bits: float) -> Steps:
    """Signs: a bit of them for every whole bit, each level on what the one before left."""
    if bits < 1:
        raise RecipeError(f"--bits: {bits} is less than the one that a sign takes; choose another method")
    return [{"bitdelta": {"levels": min(4, floor(bits))}}]


def delta_come(bits: float) -> Steps:
    """Singular vectors, the first ones in many bits and the last in few."""
    return [{"delta-come": {"bits": bits}}]


def dare(bits: float) -> Steps:
    """A random share in full; which it is costs nothing."""
    return [{"dare": {"density": min(1.0, bits / PLAIN)}}]


def lowrank(bits: float) -> Steps:
    """Whitened factors in full."""
    return [{"svd-llm": {"removed": 1 - bits / PLAIN}}]


def sparse(bits: float) -> Steps:
    """The entries that count most on the calibration tokens, in four bits, with their positions."""
    return [{"wanda": {"sparsity": round(1 - kept(bits), 5), "scope": "matrix"}}, {"rtn": {"bits": CODED, "group": 0}}]


def kept(bits: float, coded: int = CODED) -> float:
    """The share p of entries of which value and position take `bits` a weight: p (coded + log2(1/p) + spare)."""
    low, high = 0.0, 1.0
    for _ in range(HALVINGS):
        p = (low + high) / 2
        position = min(1 / p, log2(1 / p) + SPARE)  # a bitmap, where that is smaller
        low, high = (p, high) if p * (coded + position) < bits else (low, p)
    return low


def deltazip(bits: float) -> Steps:
    """Half of the entries, two of every four, in four bits or two, rounded with error feedback."""
    if bits < 2:
        raise RecipeError(f"--bits: deltazip takes 2 or 3 bits a weight, not {bits}; choose another method")
    return [{"sparsegpt": {"sparsity": "2:4"}}, {"gptq": {"bits": 4 if bits >= 3 else 2, "group": 0}}]


def auto(bits: float) -> Steps:
    """For each matrix the method whose output errs least within the bits."""
    return [{"auto": {"bits": bits}}]


METHODS: dict[str, Callable[[float], Steps]] = {
    "auto": auto, "bitdelta": bitdelta, "dare": dare, "delta-come": delta_come, "deltazip": deltazip,
    "lowrank": lowrank, "sparse": sparse,
}  # fmt: skip


def passes_of(method: str, bits: float) -> tuple[Pass, ...]:
    """The passes of a method at so many bits a weight; raises RecipeError for one that cannot be that small."""
    if method not in METHODS:
        raise RecipeError(f"--method: {method!r} is unknown{nearest(method, METHODS)}")
    if not 0 < bits < PLAIN:
        raise RecipeError(f"--bits: {bits} is not allowed; give more than 0 and less than {PLAIN}")
    return tuple(read_pass(step, method) for step in METHODS[method](bits))
