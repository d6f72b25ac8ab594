"""The sizes of a model and the tokens that pass through it, from shapes; memory and time are counted from these."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from compress.calibration import LONGEST, PROBE, PROBE_LENGTH
from compress.model.globs import matches
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
    """The numbers of tokens that pass through a model.

    `tokens` are the calibration tokens of the walk, `batch` those of one forward pass, `length` those of one window,
    and `probe` those of the probe. `ahead` are the calibration tokens for passes that examine the whole model before
    the walk; they may be needed even if the walk itself needs none. `twins` says whether the calibration tokens also
    pass through the dense model.
    """

    tokens: int
    batch: int
    ahead: int
    probe: int
    length: int
    twins: bool


def load_of(walk: Walk, recipe: Recipe) -> Load:
    """The tokens that a recipe asks for; whether its source has as many is not checked."""
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
    """The sizes of a model in memory.

    `frame` is the bytes of the tensors outside all blocks, `block` those of the largest block, `index` its index, and
    `width` the widest input of its sites. `hidden` is the hidden size, `vocabulary` the rows of the input embedding,
    and `itemsize` the bytes of a number in the model's dtype.
    """

    hidden: int
    frame: int
    block: int
    index: int
    vocabulary: int
    width: int
    itemsize: int


def sized(walk: Walk, source: Checkpoint) -> Sized:
    """The sizes of a model, from its headers and configuration."""
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
    """Whether the outputs of finished submodules of a block are cached while its remaining inputs are measured."""
    return recipe.ordering == "site" and not any(isinstance(step, BlockPass) for step in recipe.passes)


def child_of(walk: Walk, site: str) -> str:
    """The name of the direct child of a block that contains a site."""
    inside = walk.anatomy.places[site].module.removeprefix(f"{walk.path}.")
    return ".".join(inside.split(".")[1:2])


def kinds_of(recipe: Recipe, plan: SitePlan) -> list[type[Statistic]]:
    """The statistics of a site's input that the passes on it need."""
    steps = recipe.weight_passes
    return list(dict.fromkeys(kind for i in plan.steps for kind in steps[i].requires))


def selects(step: SitePass | None, site: str) -> bool:
    """Whether a pass selects a site; without a pass, every site is selected."""
    return step is None or matches(site, step.sites)


def kept_probes(plans: Mapping[str, SitePlan], ahead: Ahead, governed: SitePass | None) -> int:
    """How many copies of the probe's hidden states run on to the logits, over all parts of the model."""
    if not ahead.kept:
        return 0
    names = [n for n in plans if selects(governed, n)]
    return ahead.kept * (len(names) if ahead.each else len(read_together_names(names)))
