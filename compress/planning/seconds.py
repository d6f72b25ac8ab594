"""How long a run takes, part by part: operations counted from shapes, divided by the rates of the machine."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from math import prod
from typing import Any

from compress.model.block import WIDEST
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.planning.costs import F32, Work, work_of
from compress.planning.machine import Machine
from compress.planning.scale import child_of, kinds_of, load_of, remembers, sized
from compress.planning.sizes import SitePlan, read_together_names
from compress.recipe import Recipe
from compress.stats import SIDE, Gram

WRITING = 16  # passes over the entries of a block while it is packed, hashed, read back and decoded
HASHED = 1.0e9  # bytes a second of sha256, of any x86-64 or ARM processor of this decade
READS = 3  # hashes and readings of each byte that is written, and of the source
FORWARD, SOLVING = 0.5, 0.65  # of the rate of one product: shares that blocks, and statistics and solvers, reached
SETTLING = 4.0  # seconds: calibration text through the tokenizer, plans, cards


def time_parts(
    walk: Walk, source: Checkpoint, recipe: Recipe, plans: Mapping[str, SitePlan], machine: Machine, written: int
) -> dict[str, float]:
    """Seconds by what is done; the passes that are not modelled are left out."""
    load, product = load_of(walk, recipe), machine.product(walk.dtype)
    weights = sum(prod(plan.shape) * active(walk, name) for name, plan in plans.items())
    tokens, hidden = load.tokens * (2 if load.twins else 1), sized(walk, source).hidden
    attention = 4.0 * load.length * hidden * len(walk.blocks)  # a token
    forwards = forwards_of(walk, recipe, plans, hidden) * load.tokens + (tokens - load.tokens)
    probed = 6 * load.probe  # dense, compressed, read back; each in and out
    work = [work for _, work in pairs(recipe, plans)]
    measured = [p for p in plans.values() if Gram in kinds_of(recipe, p)]
    energies = sum(2.0 * p.shape[0] * p.shape[1] * min(2 * p.shape[1], p.shape[1] + SIDE) for p in measured)
    entries = sum(prod(p.shape) for p in plans.values() if p.steps)
    passes = sum(w.passes * prod(p.shape) for p, w in pairs(recipe, plans)) + WRITING * entries
    return {
        "reading and checking": 2 * source.nbytes() / machine.memory + source.nbytes() / HASHED,
        "forwards": (forwards + probed) * (2.0 * weights + attention) / (FORWARD * product),
        "statistics": gathered(walk, recipe, plans, load.tokens) / (SOLVING * machine.float32),
        "passes": (sum(w.flops for w in work) + energies) / (SOLVING * machine.float32)
        + sum(w.cubes for w in work) / machine.eigen
        + 2 * F32 * passes / machine.memory
        + sum(w.calls for w in work) * machine.call,
        "writing": written / machine.disk + READS * written / HASHED,
        "settling": SETTLING,
    }  # fmt: skip


def active(walk: Walk, site: str) -> float:
    """The share of tokens that reach a site: of an expert, as many as a router chooses of all."""
    if not walk.anatomy.places[site].routed:
        return 1.0
    text = walk.model.config.get_text_config()
    known = (getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next((int(count) for count in known if count), 1)
    return int(getattr(text, "num_experts_per_tok", 1) or 1) / experts


def pairs(recipe: Recipe, plans: Mapping[str, SitePlan]) -> list[tuple[SitePlan, Work]]:
    """Each site with the work of each pass on it."""
    return [(p, work_of(recipe.weight_passes[i], p.shape) or Work()) for p in plans.values() for i in p.steps]


def forwards_of(walk: Walk, recipe: Recipe, plans: Mapping[str, SitePlan], hidden: int) -> float:
    """Forwards of a block over the calibration tokens: as far as each input, then to the end, less what is kept."""
    if not walk.blocks:
        return 0.0
    names = [p.site for p in walk.anatomy.of_block(0)]
    whole = sum(prod(plans[n].shape) for n in names) or 1
    total, child, inside, left = 0, "", 0, 0  # `left`: of what the child before gives, what was not computed yet
    for group in read_together_names(names):
        size = sum(prod(plans[n].shape) for n in group)
        measured = any(kinds_of(recipe, plans[n]) for n in group)
        if remembers(recipe) and child_of(walk, group[0]) != child:
            total, inside, left = total + left, 0, 0  # done: it is computed to its end once, and kept
            child = child_of(walk, group[0])
        if measured:
            total = total + inside if recipe.ordering == "site" else inside  # at once, as far as the last
        inside += size
        kept = remembers(recipe) and measured and plans[group[0]].shape[1] <= WIDEST * hidden
        left = size if kept else inside
    return (total + left) / whole


def gathered(walk: Walk, recipe: Recipe, plans: Mapping[str, SitePlan], tokens: int) -> float:
    """Operations of all statistics: squares for vectors, products of inputs with themselves for square ones."""
    total = 0.0
    for index in range(len(walk.blocks)):
        for group in read_together_names([p.site for p in walk.anatomy.of_block(index)]):
            kinds: Sequence[Any] = list(dict.fromkeys(kind for n in group for kind in kinds_of(recipe, plans[n])))
            width = plans[group[0]].shape[1]
            total += sum(tokens * width * (min(2 * width, width + SIDE) if k.square else 20) for k in kinds)
    return total
