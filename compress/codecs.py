"""The methods of `compress delta extract`: for each, the passes that store a difference in a given number of bits.

A method is an ordinary list of passes; it is here so that users need not write a recipe for each size.
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
CODED = 4  # bits of an entry that DARE keeps
ROOM = 0.95  # share of a sparse delta's bits for its entries; the rest is for scales and random variation
Steps = list[dict[str, dict[str, Any]]]


def bitdelta(bits: float) -> Steps:
    """BitDelta: one level of signs for every whole bit, at most 4, each on the residual of the level before."""
    if bits < 1:
        raise RecipeError(f"--bits: {bits} is less than the 1 bit of a sign; choose another method")
    return [{"bitdelta": {"levels": min(4, floor(bits)), "unbiased": True}}]


def delta_come(bits: float) -> Steps:
    """Delta-CoMe: singular vectors, the first in many bits and the last in few."""
    return [{"delta-come": {"bits": bits, "unbiased": True}}]


def dare(bits: float) -> Steps:
    """DARE: a random share of the entries in four bits; their positions take no space."""
    return [{"dare": {"density": min(1.0, round(bits * ROOM / CODED, 5))}}, {"rtn": {"bits": CODED, "group": -1}}]


def lowrank(bits: float, number: int = PLAIN) -> Steps:
    """SVD-LLM: whitened low-rank factors, not quantized: `number` is the bits of the model's dtype."""
    return [{"svd-llm": {"removed": 1 - bits / number}}]


def sparse(bits: float) -> Steps:
    """SparseGPT: a few entries at arbitrary positions, which are stored too; those kept make up for those cut.

    Below 1.5 bits a weight only their signs are kept, below 2.5 two bits of each, above that four.
    """
    width = 1 if bits < 1.5 else 2 if bits < 2.5 else 4
    sparsity = round(1 - kept_within(bits * ROOM, width), 5)
    if width == 1:
        return [{"sparsegpt": {"sparsity": sparsity}}, {"bitdelta": {"unbiased": True}}]
    return [{"sparsegpt": {"sparsity": sparsity, "bits": width, "group": 0}}]


def deltazip(bits: float) -> Steps:
    """DeltaZip: two of every four entries, in four bits (from 3 bits a weight) or two, rounded with error feedback."""
    if bits < 2:
        raise RecipeError(f"--bits: deltazip takes 2 or 3 bits per weight, not {bits}; choose another method")
    return [{"sparsegpt": {"sparsity": "2:4"}}, {"gptq": {"bits": 4 if bits >= 3 else 2, "group": 0}}]


def auto(bits: float) -> Steps:
    """More bits for matrices that matter more, and for each the method with the least output error at its size."""
    return [{"sensitivity": {}}, {"auto": {"bits": bits}}]


def nearest_auto(bits: float) -> Steps:
    """As `auto`, but with the nearest matrices, which are biased towards 0: better at sizes that lose little."""
    return [{"sensitivity": {}}, {"auto": {"bits": bits, "unbiased": False}}]


def lora(bits: float) -> Steps:
    """LoRA: the adapter that was merged, without loss beyond the merge's own rounding; its size is what it takes."""
    del bits
    return [{"lora": {}}]


METHODS: dict[str, Callable[[float], Steps]] = {
    "auto": auto, "bitdelta": bitdelta, "dare": dare, "delta-come": delta_come, "deltazip": deltazip,
    "lora": lora, "lowrank": lowrank, "sparse": sparse,
}  # fmt: skip
UNSIZED = ("lora",)  # methods that find their size themselves


def recipes_of(method: str, bits: float, distill: int = 0, number: int = PLAIN) -> list[tuple[Pass, ...]]:
    """The passes of a method at `bits` bits a weight; for `bitdelta`, with `distill` steps of learning its scales.

    Returns several lists of passes if the caller should try which is better. `number` is the bits of the model's dtype.
    Raises RecipeError for an unknown method, a size that the method cannot reach, or `distill` without scales to learn.
    """
    if method not in METHODS:
        raise RecipeError(f"--method: {method!r} is unknown{nearest(method, METHODS)}")
    if not 0 < bits < PLAIN:
        raise RecipeError(f"--bits: {bits} is not allowed; give more than 0 and less than {PLAIN}")
    if distill and method != "bitdelta":
        raise RecipeError(f"--distill: {method} has no scales to learn; use bitdelta")
    learned: Steps = [{"finetune": {"steps": distill}}] if distill else []
    steps = lowrank(bits, number) if method == "lowrank" else METHODS[method](bits)
    choices = [steps, *([nearest_auto(bits)] if method == "auto" else [])]
    return [tuple(read_pass(step, method) for step in choice + learned) for choice in choices]


__all__ = ["METHODS", "UNSIZED", "kept_within", "nearest_auto", "recipes_of"]
