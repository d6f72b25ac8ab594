"""How much there is of a model and of what goes through it, from shapes: what memory and time are counted from."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from compress.calibration import LONGEST, PROBE, PROBE_LENGTH
from compress.model.source import Checkpoint
from compress.model.travellers import tokens_at_once
from compress.model.walk import Walk
from compress.passes.base import BlockPass, needs_twins, windows_at_once
from compress.plan import longest_window
from compress.planning.sizes import SitePlan
from compress.recipe import Recipe
from compress.stats import Statistic


@dataclass(frozen=True, kw_only=True)
class Load:
    """What goes through a model: calibration tokens and those of one forward, probe tokens, twins or not."""

    tokens: int
    batch: int
    probe: int
    length: int
    twins: bool


def load_of(walk: Walk, recipe: Recipe) -> Load:
    """The tokens of a recipe; a source that cannot give so many is not looked at."""
    limit = longest_window(walk)
    length = min(recipe.calibration.length or LONGEST, limit)
    measured = any(step.requires for step in recipe.passes)
    at_once = windows_at_once(recipe.passes) or max(1, tokens_at_once(walk.device) // length)
    windows = recipe.calibration.samples if measured else 0
    return Load(
        tokens=windows * length, batch=min(windows, at_once) * length, length=length,
        probe=PROBE * min(length, PROBE_LENGTH), twins=needs_twins(recipe.passes),
    )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Sized:
    """A model's parts in bytes, as they lie in memory."""

    hidden: int
    frame: int
    block: int
    index: int
    vocabulary: int
    width: int
    itemsize: int


def sized(walk: Walk, source: Checkpoint) -> Sized:
    """The frame, the largest block and the widest input."""
    anatomy, itemsize = walk.anatomy, walk.dtype.itemsize
    headers = source.headers
    blocks = [
        sum(prod(headers[n].shape) for n in anatomy.tensors_of(i) if n in headers) for i in range(len(walk.blocks))
    ]
    index = max(range(len(blocks)), key=blocks.__getitem__)
    frame = sum(prod(headers[n].shape) for n in anatomy.frame() if n not in anatomy.layout.unknown)
    text = walk.model.config.get_text_config()
    return Sized(
        hidden=int(text.hidden_size), frame=frame * itemsize, block=blocks[index] * itemsize, index=index,
        vocabulary=int(walk.model.get_input_embeddings().num_embeddings), itemsize=itemsize,
        width=max((p.shape[1] for p in anatomy.of_block(index)), default=int(text.hidden_size)),
    )  # fmt: skip


def remembers(recipe: Recipe) -> bool:
    """Whether what done parts of a block give is kept while the rest is measured."""
    return recipe.ordering == "site" and not any(isinstance(step, BlockPass) for step in recipe.passes)


def child_of(walk: Walk, site: str) -> str:
    """The direct child of a block in which a site lies."""
    inside = walk.anatomy.places[site].module.removeprefix(f"{walk.path}.")
    return ".".join(inside.split(".")[1:2])


def kinds_of(recipe: Recipe, plan: SitePlan) -> list[type[Statistic]]:
    """The statistics that the passes on a site need of its input."""
    steps = recipe.weight_passes
    return list(dict.fromkeys(kind for i in plan.steps for kind in steps[i].requires))
