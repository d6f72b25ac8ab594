"""How much there is of a model and of what goes through it, from shapes: what memory and time are counted from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from math import prod

from compress.calibration import LONGEST, PROBE, PROBE_LENGTH
from compress.model.source import Checkpoint
from compress.model.travellers import tokens_at_once
from compress.model.walk import Walk
from compress.passes.base import BlockPass, SitePass, needs_twins, windows_at_once
from compress.plan import longest_window
from compress.planning.costs.ahead import Ahead
from compress.planning.sizes import SitePlan, read_together_names
from compress.recipe import Recipe
from compress.stats import Statistic


@dataclass(frozen=True, kw_only=True)
class Load:
    """What goes through a model: calibration tokens and those of one forward, probe tokens, twins or not.

    `ahead` are the tokens for what looks at the whole model before the walk, for which the walk may need none.
    """

    tokens: int
    batch: int
    ahead: int
    probe: int
    length: int
    twins: bool


def load_of(walk: Walk, recipe: Recipe) -> Load:
    """The tokens of a recipe; a source that cannot give so many is not looked at."""
    limit = longest_window(walk)
    length = min(recipe.calibration.length or LONGEST, limit)
    measured = any(step.requires for step in recipe.weight_passes)
    at_once = windows_at_once(recipe.passes) or max(1, tokens_at_once(walk.device) // length)
    windows = recipe.calibration.samples if measured else 0
    return Load(
        tokens=windows * length, batch=min(windows, at_once) * length, length=length,
        ahead=recipe.calibration.samples * length if recipe.needs_data() else 0,
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


def selects(step: SitePass | None, site: str) -> bool:
    """Whether a pass selects a site; all are if there is no pass to ask."""
    return step is None or fnmatchcase(site, step.sites)


def kept_probes(plans: Mapping[str, SitePlan], ahead: Ahead, governed: SitePass | None) -> int:
    """How many hidden states of the probe are sent on, of all parts of the model."""
    if not ahead.kept:
        return 0
    names = [n for n in plans if selects(governed, n)]
    return ahead.kept * (len(names) if ahead.each else len(read_together_names(names)))
