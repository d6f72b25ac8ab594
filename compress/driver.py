"""The compiler driver: it opens a checkpoint, plans a recipe for it, runs it, and puts the artifact in place.

Not here: the run itself (`job.py`).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import torch

from compress.deltas import against
from compress.errors import RecipeError
from compress.events import (
    BatchHalved,
    Event,
    RunFinished,
)
from compress.identity import machine, others, versions
from compress.job import Job, Report
from compress.journal import Journal
from compress.model.globs import matches
from compress.model.memory import gpu_peak_bytes, peak_bytes
from compress.model.source import Checkpoint, dtype_of, locate
from compress.model.walk import Walk
from compress.passes.base import BlockPass
from compress.passes.manager import ignore
from compress.plan import check_tensors, free_place, outline, plan, tokens_for, usable
from compress.planning import check_forms, check_room
from compress.recipe import Recipe
from compress.runtime.kv import check as check_cache
from compress.shards import SHARD_SIZE
from compress.sources import open_source
from compress.team import Team, joined
from compress.writer import ArtifactWriter


@torch.no_grad()
def compress(
    model: str | Path,
    recipe: Recipe,
    out: str | Path,
    *,
    emit: Callable[[Event], None] = ignore,
    device: str = "cpu",
    force: bool = False,
    shard_size: int = SHARD_SIZE,
    offload: bool = False,
    dequantize: bool = False,
    restart: bool = False,
) -> Report:
    """Compress a model folder by a recipe into a new folder `out`, or resume the same run after an interruption.

    Shards hold at most `shard_size` bytes. With `offload`, the hidden states of calibration windows are kept on disk
    beside `out` instead of in memory. With `dequantize`, a model that a known method has quantized is decoded first.
    What an interrupted run has left in `out`.partial is resumed, or discarded with `restart`. Processes started by
    torchrun share the work; only the first writes and emits events, and all return the same report.

    Raises CompressError subclasses for everything a user can cause; `out` is then as it was before.
    """
    began = time.monotonic()
    with joined(device) as team:
        divisible(recipe, team)
        emit = emit if team.chief else ignore
        source = open_source(locate(model), dequantize)
        target = Path(team.first(lambda: str(free_place(Path(out), source.path, force))))
        # the journal comes first, so that an unwritable place is refused before any work
        with Journal(target, emit, restart, team) as journal:
            # check again: opening the journal may have restored the folder that was there before
            team.first(lambda: str(free_place(target, source.path, force)))
            walk = Walk(source.config, source, dtype_of(source.config), usable(team.placed(device)))
            walk.fit.tell = lambda windows: emit(BatchHalved(windows=windows))
            job = planned(source, walk, recipe, target, offload, emit, journal)
            journal.follow(lambda: journal.match(job.identity(shard_size=shard_size, dequantize=dequantize)))
            if not journal.done:  # otherwise an earlier run has already checked the very same bytes
                team.first(job.check)
            if offload:
                walk.store = journal.scratch()
            writer = ArtifactWriter(target, shard_size, journal.artifact)
            report = job.run(writer)
            team.first(writer.commit)
    emit(
        RunFinished(
            out=str(report.out),
            source_bytes=report.source_bytes,
            artifact_bytes=report.artifact_bytes,
            bits_per_weight=report.bits_per_weight,
            kl=report.kl,
            fallbacks=report.fallbacks,
            starved=report.starved,
            seconds=time.monotonic() - began,
            peak_bytes=peak_bytes(),
            gpu_peak_bytes=gpu_peak_bytes(walk.device),
        )
    )
    return report


def divisible(recipe: Recipe, team: Team) -> None:
    """Raise RecipeError if several processes cannot share a pass of the recipe (a BlockPass needs all windows)."""
    for i, step in enumerate(recipe.passes):
        if team.size > 1 and isinstance(step, BlockPass):
            raise RecipeError(
                f"passes[{i}].{step.name}: needs all windows of a block at once, but {team.size} processes divide "
                "them; "
                "run this recipe without torchrun"
            )


def planned(
    source: Checkpoint, walk: Walk, recipe: Recipe, target: Path, offload: bool, emit: Callable[[Event], None],
    journal: Journal,
) -> Job:  # fmt: skip
    """The job of a recipe, once everything has been refused that headers can show, including too small a disk."""
    check_tensors(walk, source)
    beside = against(recipe.delta, source, walk) if recipe.delta else None
    if beside:
        base = beside.base
        journal.team.first(lambda: str(free_place(target, base.path, True)))  # against the base; force: checked before
        walk.base = base
    outlined, shaped = outline(walk, source, recipe)
    covered = plan(outlined, recipe)
    check_forms(outlined, recipe)
    journal.team.first(lambda: check_room(outlined, shaped, recipe, target, offload=offload, held=journal.nbytes))
    if recipe.kv:
        check_cache(outlined.model, recipe.kv, to_factor(outlined, recipe))
    tokens = tokens_for(walk, source.path, recipe)
    journal.team.agree(
        lambda: {
            "recipe": recipe.to_yaml(),
            "calibration": tokens.sha256,
            **machine(walk.device),
            **versions(),
            **others(),
        }
    )
    return Job(
        source=source, walk=walk, recipe=recipe, tokens=tokens, covered=covered, emit=emit, journal=journal,
        beside=beside,
    )  # fmt: skip


def to_factor(walk: Walk, recipe: Recipe) -> set[str]:
    """The modules whose weights some pass of the recipe will factor."""
    globs = [step.sites for step in recipe.weight_passes if step.gives == "factored"]
    return {p.module for p in walk.anatomy.places.values() if any(matches(p.site, glob) for glob in globs)}
