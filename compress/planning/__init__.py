"""`compress plan`: predicts what a run will write and need, from headers and the architecture, before a weight is read.

Not here: how bytes (`sizes.py`), memory and disk (`resources.py`) and time (`seconds.py`) are counted.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from compress.deltas import against
from compress.errors import PlanError, RecipeError
from compress.model.anatomy import Coverage
from compress.model.family import TESTED
from compress.model.globs import matches
from compress.model.source import Checkpoint, display_name, dtype_of, locate
from compress.model.walk import Walk
from compress.passes.base import Budget, Pass, Reshape, SitePass
from compress.plan import absolute, check_tensors, outline, plan, usable
from compress.planning import resources
from compress.planning.costs import modelled, not_modelled
from compress.planning.machine import Machine
from compress.planning.machine import machine as profile_of
from compress.planning.seconds import time_parts
from compress.planning.sizes import SitePlan, plan_sites, stored_bytes, stored_sites
from compress.planning.trust import licence, trust
from compress.recipe import Recipe, load, model_of
from compress.sources import open_source

ASSUMES = ("scales fit float16, as those of weights from 1e-4 to 1e5 do", "no two matrices of a block are equal")
AMPLE = 2  # times the bytes of the source: no recipe's artifact takes that much
SITES, TABLES, NORMS, OTHERS = "rewritten sites", "embeddings and head", "norms and biases", "other unchanged tensors"


@dataclass(frozen=True, kw_only=True)
class ClassPlan:
    """The tensors of one class: their number, parameters, and bytes before and after, and an upper bound."""

    name: str
    tensors: int
    parameters: int
    source_bytes: int
    bytes: int
    most: int


@dataclass(frozen=True, kw_only=True)
class PassPlan:
    """The contract of a pass, how much it rewrites, and the form of its first site `before` and `after` it.

    `modelled` says whether its own memory and time are part of the estimate.
    """

    name: str
    options: str
    sites: int
    parameters: int
    takes: tuple[str, ...]
    gives: str
    requires: tuple[str, ...]
    keeps: tuple[str, ...]
    before: str
    after: str
    modelled: bool


@dataclass(frozen=True, kw_only=True)
class Need:
    """The bytes needed, in total and by part, and those available (`there`; None if unknown), with their source."""

    bytes: int
    there: int | None
    parts: Mapping[str, int]
    where: str

    @property
    def fits(self) -> bool:
        """Whether enough is available; True if that is unknown."""
        return self.there is None or self.bytes <= self.there


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run of a recipe on a model will write and need.

    `bytes` is the expected size of all tensors (`sizes.bytes` of compress.json), `most` an upper bound. They are equal,
    and exact if what `assumes` states holds, unless sizes depend on values. `unmodelled` names the passes whose own
    memory and time are left out of `needs` and `seconds`; `needs` includes `vram` only on a GPU.
    """

    model: str
    family: str
    tested_family: bool
    dtype: str
    source_bytes: int
    bytes: int
    most: int
    exact: bool
    bits_per_weight: float
    classes: tuple[ClassPlan, ...]
    sites: tuple[SitePlan, ...]
    passes: tuple[PassPlan, ...]
    untouched: Mapping[str, int]
    reshaped: tuple[str, ...]
    needs: Mapping[str, Need]
    seconds: Mapping[str, float]
    unmodelled: tuple[str, ...]
    assumes: tuple[str, ...]
    licence: Mapping[str, str]
    trust: tuple[str, ...]

    @property
    def total_seconds(self) -> float:
        """Seconds of everything that is modelled."""
        return sum(self.seconds.values())

    def check(self) -> None:
        """Raise PlanError if there is too little memory, video memory or disk space."""
        short = [
            f"{name}: {need.bytes:,} bytes needed, {need.there or 0:,} available ({need.where}): "
            f"{need.bytes - (need.there or 0):,} short"
            for name, need in self.needs.items()
            if not need.fits
        ]
        if short:
            raise PlanError(f"it will not fit: {'; '.join(short)}")


def plan_run(
    model: str | Path | None,
    recipe: Recipe | str | Path,
    *,
    out: str | Path = "out",
    device: str = "cpu",
    memory: int | None = None,
    disk: int | None = None,
    offload: bool = False,
    dequantize: bool = False,
    machine: Machine | None = None,
) -> Plan:
    """Predict what `compress.run` of this recipe will write and need; reads headers, never weights or calibration data.

    `memory` and `disk` are limits in bytes that replace the amounts found free. Without `machine`, the cached profile
    of this machine is used; the first time, it is measured in a few seconds. `Plan.check` raises PlanError if something
    will not fit; this function raises the CompressError subclasses with which `run` would refuse to start its walk,
    except for damaged values and missing calibration data.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load(recipe)
    source = open_source(locate(model_of(recipe, model)), dequantize)
    target = absolute(Path(out))
    if target.exists() and not target.is_dir():  # an existing folder only says which disk to check
        raise RecipeError(f"--out: {target} exists; choose another folder")
    walk = Walk(source.config, source, dtype_of(source.config), usable(device))
    check_tensors(walk, source)
    if recipe.delta is not None:
        against(recipe.delta, source, walk)
    process = resources.process_bytes()
    planned, shaped = outline(walk, source, recipe)
    covered = plan(planned, recipe)
    sites = plan_sites(planned, recipe)
    size, most = stored_bytes(planned, shaped, sites, recipe.delta is not None)
    machine = machine if machine is not None else profile_of(device)
    return Plan(
        model=display_name(source.path),
        family=str(source.config.get("model_type")),
        tested_family=str(source.config.get("model_type")) in TESTED,
        dtype=str(walk.dtype).removeprefix("torch."),
        source_bytes=source.nbytes(),
        bytes=size,
        most=most,
        exact=all(site.exact for site in sites.values()),
        bits_per_weight=8 * sum(s.bytes for s in sites.values()) / max(1, sum(prod(s.shape) for s in sites.values())),
        classes=classes_of(planned, shaped, covered, sites, recipe.delta is not None),
        sites=tuple(sites.values()),
        passes=tuple(pass_plan(step, recipe, sites) for step in recipe.passes),
        untouched=covered.reasons(),
        reshaped=(str(getattr(shaped, "change", "")),) if recipe.reshapes else (),
        needs=needs(planned, shaped, recipe, sites, most, process, target, device, memory, disk, offload),
        seconds=time_parts(planned, shaped, recipe, sites, machine, size),
        unmodelled=tuple(not_modelled(recipe)),
        assumes=ASSUMES if any(site.steps for site in sites.values()) else (),
        licence=licence(source.path),
        trust=tuple(trust(source)),
    )


def classes_of(
    walk: Walk, source: Checkpoint, covered: Coverage, plans: Mapping[str, SitePlan], delta: bool
) -> tuple[ClassPlan, ...]:
    """The tensors of the artifact by class; classes without a tensor are left out."""
    places = walk.anatomy.places
    stored = stored_sites(walk, plans, delta)
    taken = {places[name].tensor for name in stored}
    rows: dict[str, list[tuple[int, int, int, int]]] = {}
    width = walk.dtype.itemsize
    rows[SITES] = [(prod(plans[n].shape), prod(plans[n].shape) * width, plans[n].bytes, plans[n].most) for n in stored]
    for name, held in source.headers.items():
        if name not in taken:
            size = (prod(held.shape), held.nbytes, held.nbytes, held.nbytes)
            rows.setdefault(class_of(covered.untouched.get(name, (0, ""))[1]), []).append(size)
    return tuple(
        ClassPlan(
            name=name, tensors=len(held), parameters=sum(r[0] for r in held), source_bytes=sum(r[1] for r in held),
            bytes=sum(r[2] for r in held), most=sum(r[3] for r in held),
        )
        for name, held in rows.items()
        if held
    )  # fmt: skip


def class_of(reason: str) -> str:
    """The class of a tensor that no pass touches, according to the reason."""
    if reason.startswith(("the output head", "an embedding")):
        return TABLES
    return NORMS if reason.startswith("a vector") else OTHERS


def pass_plan(step: Pass, recipe: Recipe, plans: Mapping[str, SitePlan]) -> PassPlan:
    """What a pass needs, gives and keeps, and how much it rewrites."""
    needed = tuple(kind.__name__ for kind in step.requires)
    row: dict[str, Any] = {"sites": 0, "parameters": 0, "takes": (), "gives": role(step), "keeps": (), "before": "",
                           "after": ""}  # fmt: skip
    if isinstance(step, SitePass):
        number = next(i for i, other in enumerate(recipe.weight_passes) if other is step)
        own = [(p, p.steps.index(number)) for p in plans.values() if number in p.steps]
        kept = dict.fromkeys(part for p, at in own for part in p.kept[at].split(", ") if part)
        row |= {
            "sites": len(own), "parameters": sum(prod(p.shape) for p, _ in own), "takes": tuple(step.takes),
            "gives": given_by(recipe.weight_passes, number, own[0][0].site if own else ""), "keeps": tuple(kept),
            "before": own[0][0].forms[own[0][1]] if own else "", "after": own[0][0].forms[own[0][1] + 1] if own else "",
        }  # fmt: skip
    return PassPlan(name=step.name, options=str(step), requires=needed, modelled=modelled(step), **row)


def given_by(steps: Sequence[SitePass], number: int, site: str) -> str:
    """The form in which the pass with this index leaves a site, as far as the passes state it."""
    form = "dense"
    for step in steps[: number + 1]:
        form = step.leaves(form) if matches(site, step.sites) else form
    return form or "same form as before"


def role(step: Pass) -> str:
    """What a pass gives if it rewrites no weight; empty for any other pass."""
    if isinstance(step, Reshape):
        return "a reshaped or rescaled model"
    return "one option value per site for the next pass" if isinstance(step, Budget) else ""


def needs(
    walk: Walk, source: Checkpoint, recipe: Recipe, plans: Mapping[str, SitePlan], most: int, process: int, out: Path,
    device: str, memory: int | None, disk: int | None, offload: bool,
) -> dict[str, Need]:  # fmt: skip
    """The memory, disk space and, on a GPU, video memory that a run needs."""
    parts = resources.memory_parts(walk, source, recipe, plans, offload)
    video = resources.video_memory(device)
    host = {"the process": process, **(parts if video is None else resources.host_parts(walk, source, recipe, offload))}
    there = memory if memory is not None else resources.free_memory()
    if memory is None and there is not None:
        there += resources.resident()  # the process itself counts as needed, so its memory counts as available
    stored = resources.disk_parts(walk, source, recipe, most, offload)
    folder = next(parent for parent in (out, *out.parents) if parent.is_dir())
    found = {
        "memory": Need(bytes=sum(host.values()), there=there, parts=host, where=limit_name(memory, "free now")),
        "disk": Need(
            bytes=sum(stored.values()), there=disk if disk is not None else shutil.disk_usage(folder).free,
            parts=stored, where=limit_name(disk, str(folder)),
        ),
    }  # fmt: skip
    if video is not None:
        found["vram"] = Need(bytes=sum(parts.values()), there=video[0], parts=parts, where=video[1])
    return found


def limit_name(limit: int | None, else_: str) -> str:
    """The source of an available amount: the limit given, if there is one, or `else_`."""
    return else_ if limit is None else "the limit given"


def check_forms(walk: Walk, recipe: Recipe) -> None:
    """Raise UnsupportedWeight for the first pass that cannot rewrite the form in which earlier passes leave a site.

    A form that depends on values is checked only when the run has made it.
    """
    plan_sites(walk, recipe)


def check_room(
    walk: Walk, source: Checkpoint, recipe: Recipe, target: Path, *, offload: bool = False, held: int = 0
) -> None:
    """Raise PlanError if the disk cannot hold what a run writes, of which `held` bytes are already there.

    If there is room even for tensors of AMPLE times the source's bytes, the sizes of the sites are not computed.
    """
    there = next(parent for parent in target.parents if parent.is_dir())
    free = shutil.disk_usage(there).free + held
    if free >= sum(resources.disk_parts(walk, source, recipe, AMPLE * source.nbytes(), offload).values()):
        return
    most = stored_bytes(walk, source, plan_sites(walk, recipe), recipe.delta is not None)[1]
    parts = resources.disk_parts(walk, source, recipe, most, offload)
    if free < sum(parts.values()):
        told = ", ".join(f"{name} {size:,}" for name, size in parts.items())
        raise PlanError(
            f"{there}: {free - held:,} bytes are free, the run may need {sum(parts.values()) - held:,} more ({told})"
        )


__all__ = ["ClassPlan", "Machine", "Need", "PassPlan", "Plan", "SitePlan", "check_forms", "check_room", "plan_run"]
