"""The time that a run takes, by part: operations counted from shapes, divided by the rates of the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import ceil, prod
from typing import Any

from compress.model.block import TOGETHER, WIDEST
from compress.model.source import Checkpoint
from compress.model.walk import Walk
from compress.passes.learned import LOOKS, Trainer
from compress.planning.costs import F32, LEARNED, Work, aheads, work_of
from compress.planning.costs.learning import BACKWARD
from compress.planning.machine import Machine
from compress.planning.scale import Load, Sized, child_of, kept_probes, kinds_of, load_of, remembers, selects, sized
from compress.planning.sizes import SitePlan, measured_together, read_together_names
from compress.recipe import Recipe
from compress.stats import SIDE, Gram

WRITING = 16  # passes over the entries of a block to pack, hash, read back and decode it
HASHED = 1.0e9  # bytes a second of sha256 on any x86-64 or ARM processor of this decade
READS = 3  # times that each written byte is hashed and read
FORWARD, SOLVING = 0.65, 0.65  # measured shares of a product's rate: of blocks; of statistics and solvers
COMPARED = 30  # passes over the logits to compute their divergence
READINGS = 3  # times that a reshaped model is computed: to hash it, to compare it and in the walk
SETTLING, TOKENS = 250_000, 250_000  # small calls: for plans, checks and cards; to tokenize the calibration text


def time_parts(
    walk: Walk, source: Checkpoint, recipe: Recipe, plans: Mapping[str, SitePlan], machine: Machine, written: int
) -> dict[str, float]:
    """Seconds of each part of a run; passes that are not modelled are left out."""
    load, size = load_of(walk, recipe), sized(walk, source)
    twice = load.tokens if load.twins else 0
    forwards = forwards_of(walk, recipe, plans, size.hidden) * load.tokens + twice
    probed = 6 * load.probe  # two for each of three models: dense, compressed, read back
    measured = [p for p in plans.values() if Gram in kinds_of(recipe, p)]
    energies = sum(2.0 * p.shape[0] * p.shape[1] * min(2 * p.shape[1], p.shape[1] + SIDE) for p in measured)
    entries = sum(prod(p.shape) for p in plans.values() if p.steps)
    work = [(p.shape, work_of(recipe.weight_passes[i], p.shape)) for p in plans.values() for i in p.steps]
    every = gathered(walk, plans, load.tokens, lambda names: [k for n in names for k in kinds_of(recipe, plans[n])])
    token = token_flops(walk, plans, load, size)
    return {
        "reading and checking": 2 * source.nbytes() / machine.memory + source.nbytes() / HASHED,
        "analysis before the walk": ahead_seconds(walk, source, recipe, plans, machine),
        "forward passes": (forwards + probed) * token / (FORWARD * machine.product(walk.dtype)),
        "statistics": every / (SOLVING * machine.float32),
        "solvers and rounding": worked(work, machine) + energies / (SOLVING * machine.float32)
        + 2 * F32 * WRITING * entries / machine.memory,
        "training of blocks": learning_seconds(walk, recipe, plans, machine, load, token),
        "writing": written / machine.disk + READS * written / HASHED,
        "set-up, checks and tokenizing": (SETTLING + TOKENS * recipe.needs_data()) * machine.call,
    }  # fmt: skip


def worked(work: Sequence[tuple[tuple[int, int], Work]], machine: Machine) -> float:
    """Seconds of these amounts of work, each on a matrix of the shape given with it."""
    passes = sum(w.passes * prod(shape) for shape, w in work)
    return (
        sum(w.flops for _, w in work) / (SOLVING * machine.float32)
        + sum(w.cubes for _, w in work) / machine.eigen
        + 2 * F32 * passes / machine.memory
        + sum(w.calls for _, w in work) * machine.call
    )


def token_flops(walk: Walk, plans: Mapping[str, SitePlan], load: Load, size: Sized) -> float:
    """Operations of one token in a forward pass through all blocks."""
    weights = sum(prod(plan.shape) * active(walk, name) for name, plan in plans.items())
    return 2.0 * weights + 4.0 * load.length * size.hidden * len(walk.blocks)


def ahead_seconds(
    walk: Walk, source: Checkpoint, recipe: Recipe, plans: Mapping[str, SitePlan], machine: Machine
) -> float:
    """Seconds of passes that examine the whole model before the walk: forward passes, statistics, and trials.

    After each trial, the probe runs on to the logits.
    """
    load, size, blocks = load_of(walk, recipe), sized(walk, source), len(walk.blocks)
    token, rate, total = token_flops(walk, plans, load, size), machine.product(walk.dtype), 0.0
    for ahead, governed in aheads(recipe):
        own = [p for n, p in plans.items() if selects(governed, n)]
        sent = kept_probes(plans, ahead, governed) * load.probe
        tokens = ahead.forwards * load.ahead + sent * (blocks + 1) / (2 * max(1, blocks))
        head = sent * 2.0 * size.vocabulary * size.hidden
        total += ((tokens + 3 * load.probe * ahead.reshapes) * token + head) / (FORWARD * rate)
        total += 2 * F32 * COMPARED * sent * size.vocabulary / machine.memory
        every = gathered(walk, plans, load.ahead, lambda _, kinds=ahead.kinds: kinds)  # type: ignore[misc]
        total += every / (SOLVING * machine.float32) + worked([(p.shape, ahead.work(*p.shape)) for p in own], machine)
        if ahead.reshapes:
            shapes = [*(p.shape for p in plans.values()), *[(size.vocabulary, size.hidden)] * 2]
            total += READINGS * worked([(shape, ahead.made(*shape)) for shape in shapes], machine)
            total += source.nbytes() / HASHED
    return total


def learning_seconds(
    walk: Walk, recipe: Recipe, plans: Mapping[str, SitePlan], machine: Machine, load: Load, token: float
) -> float:
    """Seconds of passes that learn blocks from their output: targets, training steps and held-out evaluations."""
    total = 0.0
    for i, step in enumerate(recipe.weight_passes):
        if step.name not in LEARNED or not isinstance(step, Trainer):
            continue
        looks = (LOOKS + 1) * step.held_out * load.length
        tokens = step.steps * (1 + BACKWARD) * step.batch * load.length + looks + load.tokens
        own = [(p.shape, LEARNED[step.name](step, p)) for p in plans.values() if i in p.steps]
        once = [(shape, Work(passes=learned.passes, calls=learned.calls)) for shape, learned in own]
        total += tokens * token / (FORWARD * machine.product(walk.dtype)) + (step.steps + LOOKS) * worked(once, machine)
    return total


def active(walk: Walk, site: str) -> float:
    """The share of tokens that reach a site; for an expert, the share of experts that the router chooses."""
    if not walk.anatomy.places[site].routed:
        return 1.0
    text = walk.model.config.get_text_config()
    known = (getattr(text, name, None) for name in ("num_local_experts", "num_experts", "n_routed_experts"))
    experts = next((int(count) for count in known if count), 1)
    return int(getattr(text, "num_experts_per_tok", 1) or 1) / experts


def forwards_of(walk: Walk, recipe: Recipe, plans: Mapping[str, SitePlan], hidden: int) -> float:
    """Forward passes of a block over the calibration tokens, in units of a full one.

    One runs up to each measured input and one to the end; what is cached is not computed again.
    """
    if not walk.blocks:
        return 0.0
    names = [p.site for p in walk.anatomy.of_block(0)]
    whole = sum(prod(plans[n].shape) for n in names) or 1
    total, child, inside, left = 0, "", 0, 0  # `left`: what the output of this child still needs
    for stage in measured_together(walk, names):
        group = stage[0]
        size = sum(prod(plans[n].shape) for group in stage for n in group)
        measured = any(kinds_of(recipe, plans[n]) for group in stage for n in group)
        inputs = [plans[group[0]] for group in stage]
        held = sum(kind.nbytes(p.shape[1]) for p in inputs for kind in kinds_of(recipe, p))
        if remembers(recipe) and child_of(walk, group[0]) != child:
            total, inside, left = total + left, 0, 0  # the child before is done: its output is computed once and cached
            child = child_of(walk, group[0])
        if measured:
            times = ceil(held / TOGETHER) if len(stage) > 1 else 1
            total = total + times * inside if recipe.ordering == "site" else inside  # one pass, up to the last input
        inside += size
        kept = remembers(recipe) and measured and plans[group[0]].shape[1] <= WIDEST * hidden
        left = size if kept else inside
    return (total + left) / whole


def gathered(
    walk: Walk, plans: Mapping[str, SitePlan], tokens: int, kinds_of: Callable[[Sequence[str]], Sequence[Any]]
) -> float:
    """Operations of all statistics: those of squares for vectors, those of the product xᵀ x for square matrices."""
    total = 0.0
    for index in range(len(walk.blocks)):
        for group in read_together_names([p.site for p in walk.anatomy.of_block(index)]):
            width = plans[group[0]].shape[1]
            kinds, read = dict.fromkeys(kinds_of(group)), tokens * active(walk, group[0])
            total += sum(read * width * (min(2 * width, width + SIDE) if k.square else 20) for k in kinds)
    return total
