"""The methods of `compress delta extract`: for each, the passes that store a difference in so many bits a weight.

A method is a list of passes like any other; it is here so that people need not write a recipe for each size.
"""

from __future__ import annotations

from collections.abc import Callable
from math import floor
from typing import Any

from compress.errors import RecipeError, nearest
from compress.passes import Pass
from compress.passes.codec import kept_within
from compress.recipe import read_pass

PLAIN = 16  # bits of a stored number
CODED = 4  # bits of an entry that chance has kept
ROOM = 0.95  # of the bits of a sparse delta; the rest is for scales, and for chance
Steps = list[dict[str, dict[str, Any]]]


def bitdelta(bits: float) -> Steps:
    """Signs: a bit of them for every whole bit, each level on what the one before left."""
    if bits < 1:
        raise RecipeError(f"--bits: {bits} is less than the one that a sign takes; choose another method")
    return [{"bitdelta": {"levels": min(4, floor(bits)), "unbiased": True}}]


def delta_come(bits: float) -> Steps:
    """Singular vectors, the first ones in many bits and the last in few."""
    return [{"delta-come": {"bits": bits, "unbiased": True}}]


def dare(bits: float) -> Steps:
    """A random share in four bits; which it is costs nothing."""
    return [{"dare": {"density": min(1.0, round(bits * ROOM / CODED, 5))}}, {"rtn": {"bits": CODED, "group": -1}}]


def lowrank(bits: float, number: int = PLAIN) -> Steps:
    """Whitened factors in full: in numbers of `number` bits, as the model's are."""
    return [{"svd-llm": {"removed": 1 - bits / number}}]


def sparse(bits: float) -> Steps:
    """Few entries at any place, the others making up for what is cut, with their positions.

    Of up to a bit and a half a weight it is their signs that are kept, above that two bits of each, then four.
    """
    width = 1 if bits < 1.5 else 2 if bits < 2.5 else 4
    sparsity = round(1 - kept_within(bits * ROOM, width), 5)
    if width == 1:
        return [{"sparsegpt": {"sparsity": sparsity}}, {"bitdelta": {"unbiased": True}}]
    return [{"sparsegpt": {"sparsity": sparsity, "bits": width, "group": 0}}]


def deltazip(bits: float) -> Steps:
    """Half of the entries, two of every four, in four bits or two, rounded with error feedback."""
    if bits < 2:
        raise RecipeError(f"--bits: deltazip takes 2 or 3 bits a weight, not {bits}; choose another method")
    return [{"sparsegpt": {"sparsity": "2:4"}}, {"gptq": {"bits": 4 if bits >= 3 else 2, "group": 0}}]


def auto(bits: float) -> Steps:
    """More bits for matrices that matter more; for each the method whose output then errs least."""
    return [{"sensitivity": {}}, {"auto": {"bits": bits}}]


def nearest_auto(bits: float) -> Steps:
    """The same, with the nearest matrices, which are too small: better where a size leaves little to lose."""
    return [{"sensitivity": {}}, {"auto": {"bits": bits, "unbiased": False}}]


METHODS: dict[str, Callable[[float], Steps]] = {
    "auto": auto, "bitdelta": bitdelta, "dare": dare, "delta-come": delta_come, "deltazip": deltazip,
    "lowrank": lowrank, "sparse": sparse,
}  # fmt: skip


def recipes_of(method: str, bits: float, distill: int = 0, number: int = PLAIN) -> list[tuple[Pass, ...]]:
    """The passes of a method at so many bits a weight, of signs with so many steps of learning their scales.

    More than one list where it is to be tried which is better. `number` are the bits of one of the model's own. Raises
    RecipeError for a method that cannot be that small, or has no scales to learn.
    """
    if method not in METHODS:
        raise RecipeError(f"--method: {method!r} is unknown{nearest(method, METHODS)}")
    if not 0 < bits < PLAIN:
        raise RecipeError(f"--bits: {bits} is not allowed; give more than 0 and less than {PLAIN}")
    if distill and method != "bitdelta":
        raise RecipeError(f"--distill: {method} has no scales that could be learned alone; use bitdelta")
    learned: Steps = [{"finetune": {"steps": distill}}] if distill else []
    steps = lowrank(bits, number) if method == "lowrank" else METHODS[method](bits)
    choices = [steps, *([nearest_auto(bits)] if method == "auto" else [])]
    return [tuple(read_pass(step, method) for step in choice + learned) for choice in choices]


__all__ = ["METHODS", "kept_within", "nearest_auto", "recipes_of"]
