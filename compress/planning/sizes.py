"""The bytes that an artifact will take, site by site, found by running the passes on weights without values.

Every pass provides the outline of its result on the meta device, and the codec that packs weights counts the bytes of
that, so no format has a second calculation that could disagree. What a reader would question: scales are assumed to fit
float16, as those of weights between 1e-4 and 1e5 do; a matrix with one scale that needs float32 takes two bytes more
for each of its scales.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

from torch import Tensor

from compress.errors import UnsupportedWeight
from compress.model.anatomy import Place
from compress.model.globs import matches
from compress.model.site import Site
from compress.model.source import Checkpoint, stored_share
from compress.model.walk import Walk
from compress.passes.base import Pruner, Quantizer, SitePass, WeightPass
from compress.passes.budget import governed
from compress.passes.codec import Codec
from compress.passes.factor_pruner import FactorPruner
from compress.recipe import Recipe
from compress.weights import Codebook, Dense, Hadamard, Masked, Permutation, Weight
from compress.weights.bits import packed_size
from compress.weights.masks import likely_bytes
from compress.weights.pack import SMALLEST

NUMBER = re.compile(r"(?<=\.)\d+(?=\.|$)")
TOGETHER = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("gate_proj", "up_proj"), ("w1", "w3"))
DIFFERENCE = "upper bound, because a difference is stored"
VALUES = "size depends on the values; counted at its size before the pass"


@dataclass(frozen=True, kw_only=True)
class SitePlan:
    """The form in which a site will be stored, and its bytes; `most` is an upper bound where these depend on values.

    `steps` are the indices of the passes that rewrite it; `forms` describe its weight before each of them and after the
    last; `kept` names the parts that each left unchanged. Of the last form, `held` are the bytes in memory, unpacked,
    in addition to the original weight, `reals` the number of real-valued entries, and `books` the number of codebooks,
    each of which costs one lookup per entry. `note` says why `bytes` is not exact.
    """

    site: str
    shape: tuple[int, int]
    steps: tuple[int, ...]
    forms: tuple[str, ...]
    kept: tuple[str, ...]
    bytes: int
    most: int
    held: int
    reals: int
    books: int
    note: str = ""

    @property
    def exact(self) -> bool:
        """Whether the bytes are independent of the values."""
        return self.bytes == self.most and not self.note


def plan_sites(walk: Walk, recipe: Recipe) -> dict[str, SitePlan]:
    """The plans of all sites by name, in order; a site that no pass touches counts in the model's dtype."""
    found: dict[str, SitePlan] = {}
    known: dict[Any, list[SitePlan]] = {}
    tight, loose = likely(recipe), loosened(recipe)
    steps = tight[-1][1]
    for index in range(len(walk.blocks)):
        places = walk.anatomy.of_block(index)
        alike = tuple((NUMBER.sub("*", p.site), p.shape, selected(p, steps)) for p in places)
        if alike not in known:
            exact = recipe.delta is None
            known[alike] = averaged([(share, block_plans(walk, places, t, loose, exact)) for share, t in tight])
        found |= {p.site: replace(done, site=p.site) for p, done in zip(places, known[alike], strict=True)}
    return found


def selected(place: Place, steps: Sequence[SitePass]) -> tuple[int, ...]:
    """The indices of the passes that select a site."""
    return tuple(i for i, step in enumerate(steps) if matches(place.site, step.sites))


def likely(recipe: Recipe) -> list[tuple[float, list[SitePass]]]:
    """The passes with the options that their budgets set on average, as shares of the weights that sum to 1."""
    found: list[tuple[float, list[SitePass]]] = [(1.0, list(recipe.weight_passes))]
    for budget, i in governed(recipe.passes):
        taker = recipe.weight_passes[i]
        parts = budget.likely(taker) if isinstance(taker, WeightPass) else ((1.0, taker),)
        found = [(share * part, [*steps[:i], step, *steps[i + 1 :]]) for share, steps in found for part, step in parts]
    return found


def averaged(parts: Sequence[tuple[float, list[SitePlan]]]) -> list[SitePlan]:
    """The plans of the last part, with the mean bytes of all."""
    return [
        replace(plan, bytes=round(sum(share * plans[i].bytes for share, plans in parts)))
        for i, plan in enumerate(parts[-1][1])
    ]


def loosened(recipe: Recipe) -> list[SitePass]:
    """The passes, with every option that a budget sets at the value at which most is kept; this bounds the size."""
    steps = list(recipe.weight_passes)
    for _, i in governed(recipe.passes):
        step = steps[i]
        if isinstance(step, WeightPass):
            options: dict[str, Any] = {step.shared_out: loosest(step)}
            steps[i] = replace(step, **options)
    return steps


def loosest(step: WeightPass) -> float | str:
    """The value at which most is kept, of the option that a budget may set."""
    if isinstance(step, Pruner):
        m = str(step.sparsity).partition(":")[2]
        return f"{int(m) - 1}:{m}" if m else 0.0
    return 0.0 if step.shared_out == "removed" else 16.0 if isinstance(step, Codec) else 8


def block_plans(
    walk: Walk, places: Sequence[Place], tight: Sequence[SitePass], loose: Sequence[SitePass], exact: bool
) -> list[SitePlan]:
    """The plans of the sites of one block; without `exact`, as for a delta, no rewritten site is exact."""
    modules = walk.anatomy.modules
    sites = {p.site: Site(p.site, modules[p.module], p) for p in places}
    likely = Outlines(sites, tight)
    most = likely if list(loose) == list(tight) else Outlines(sites, loose)
    spared = shared_bytes(likely.sites, places)
    spared_most = shared_bytes(most.sites, places)
    plans = []
    for place in places:
        name, size, bound = place.site, likely.nbytes(place.site), most.nbytes(place.site)
        if not likely.touched[name]:  # copied as the file holds it, in whatever dtype
            size = bound = stored_share(getattr(walk.source, "headers", {}), place.tensor, prod(place.shape)) or size
        bound = max(size, bound + room(most.sites[name].weight)) - spared_most.get(name, 0)
        note = likely.notes.get(name, "") or ("" if exact or not likely.touched[name] else DIFFERENCE)
        if loose != tight and any(tight[i] != loose[i] for i in likely.touched[name]):
            note = note or "distributed by a budget"
        plans.append(
            SitePlan(
                site=name, shape=place.shape, steps=tuple(likely.touched[name]), forms=tuple(likely.forms[name]),
                kept=tuple(likely.kept[name]), bytes=size - spared.get(name, 0), most=bound, note=note,
                held=unpacked(likely.sites[name].weight, sites[name].original.data),
                reals=reals(likely.sites[name].weight),
                books=sum(isinstance(node, Codebook) for node in every(likely.sites[name].weight)),
            )
        )  # fmt: skip
    return plans


class Outlines:
    """Outlines of the sites of a block after all passes.

    `touched` are the indices of the passes on each site; `forms` and `kept` are those of a SitePlan.
    """

    def __init__(self, sites: Mapping[str, Site], steps: Sequence[SitePass]) -> None:
        self.sites = dict(sites)
        self.steps = steps
        self.touched: dict[str, list[int]] = {name: [] for name in sites}
        self.forms = {name: [site.weight.describe()] for name, site in sites.items()}
        self.kept: dict[str, list[str]] = {name: [] for name in sites}
        self.notes: dict[str, str] = {}
        self.unknown: set[str] = set()  # sites whose form depends on values
        self.codecs: dict[str, int] = {}
        for i, step in enumerate(steps):
            chosen = [site for site in self.sites.values() if matches(site.name, step.sites)]
            for group in read_together(chosen) if step.joint else [[site] for site in chosen]:
                self.take(i, step, group)

    def take(self, i: int, step: SitePass, group: Sequence[Site]) -> None:
        """Replace these sites by a pass's outlines of them; raises UnsupportedWeight where the run would."""
        try:
            made = step.outline_peers(group)
        except UnsupportedWeight:
            if self.unknown.isdisjoint(site.name for site in group):
                raise
            made = {}  # the form that it is given depends on values
        for site in group:
            weight, name = made.get(site.name), site.name
            self.touched[name].append(i)
            if weight is None:
                self.notes.setdefault(name, VALUES)
                self.unknown.add(name)
                if isinstance(step, Codec):
                    self.codecs[name], self.notes[name] = step.budget(site.shape), "upper bound: the codec's bit budget"
                weight = replace(site.weight)
            elif not step.foreseen:
                self.notes.setdefault(name, "upper bound; the size depends on the values")
            if (
                isinstance(step, Quantizer | FactorPruner)
                and step.factors
                and any(self.steps[j].joint for j in self.touched[name])
            ):
                self.notes.setdefault(name, "upper bound; a factor may be stored only once")
            self.kept[name].append(", ".join(kept_parts(site.weight, weight)))
            self.sites[name] = site.apart(weight)
            self.forms[name].append(weight.describe())

    def nbytes(self, name: str) -> int:
        """Bytes of a site in its present form."""
        return self.codecs.get(name) or self.sites[name].weight.nbytes()


def read_together(sites: Sequence[Site]) -> Iterator[list[Site]]:
    """Groups of sites that read the same input, as far as module names tell; any other site is a group of its own."""
    named = {site.name: site for site in sites}
    yield from ([named[name] for name in group] for group in read_together_names(list(named)))


def read_together_names(sites: Sequence[str]) -> list[list[str]]:
    """The same groups, of the names of sites."""
    groups: dict[Any, list[str]] = {}
    for site in sites:
        parent, _, leaf = site.rpartition(".")
        family = next((names for names in TOGETHER if leaf in names), leaf)
        groups.setdefault((parent, family), []).append(site)
    return list(groups.values())


def measured_together(walk: Walk, sites: Sequence[str]) -> list[list[list[str]]]:
    """The groups of sites whose inputs a run measures in one pass: those of the independent experts of a layer."""
    stages: dict[str, list[list[str]]] = {}
    for group in read_together_names(sites):
        place = walk.anatomy.places[group[0]]
        stages.setdefault(place.peers if place.routed else group[0], []).append(group)
    return list(stages.values())


def kept_parts(before: Weight, after: Weight) -> list[str]:
    """The names of those parts of a weight, as in `parts`, that a pass left unchanged."""
    held = {id(tensor) for _, tensor in parts(after)}
    return list(dict.fromkeys(name for name, tensor in parts(before) if id(tensor) in held))


def parts(weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """The parts of an expression that later passes must respect, with their names."""
    for node in every(weight):
        match node:
            case Masked(_, mask_OI):
                yield "mask", mask_OI
            case Permutation(order_I):
                yield "permutation", order_I
            case Hadamard(positive_I):
                yield "rotation", positive_I
            case _:
                pass


def room(weight: Weight) -> int:
    """Bytes by which masks may exceed the estimate for random masks; none takes more than a bitmap."""
    masks = [(node.kept, node.mask_OI.numel(), node.pattern) for node in every(weight) if isinstance(node, Masked)]
    return sum(packed_size(entries, 1) - likely_bytes(kept, entries, rule) for kept, entries, rule in masks)


def unpacked(weight: Weight, original: Tensor) -> int:
    """Bytes in memory of all tensors of an expression, except the original weight."""
    own = {
        id(value): value.nbytes for node in every(weight) for value in vars(node).values() if isinstance(value, Tensor)
    }
    own.pop(id(original), None)
    return sum(own.values())


def reals(weight: Weight) -> int:
    """The number of floating-point entries of 16 bits or more, except predefined codebooks: what fine-tuning learns."""
    held = {
        id(value): value
        for node in every(weight)
        for field, value in vars(node).items()
        if isinstance(value, Tensor) and not (isinstance(node, Codebook) and node.name and field == "book")
    }
    return sum(value.numel() for value in held.values() if value.is_floating_point() and value.dtype.itemsize > 1)


def every(weight: Weight) -> Iterator[Weight]:
    """An expression and all of its subexpressions."""
    yield weight
    for child in weight.children():
        yield from every(child)


def shared_bytes(sites: Mapping[str, Site], places: Sequence[Place]) -> dict[str, int]:
    """Bytes of each site that are not stored again, because another site of its block stores the same tensor."""
    seen: set[int] = set()
    spared: dict[str, int] = {}
    for place in places:
        for node in every(sites[place.site].weight) if place.expert is None else ():
            match node:
                case Hadamard(tensor):
                    size = packed_size(tensor.numel(), 1)
                case Dense(tensor):
                    size = tensor.nbytes
                case _:
                    continue
            if size >= SMALLEST and id(tensor) in seen:
                spared[place.site] = spared.get(place.site, 0) + size
            seen.add(id(tensor))
    return spared


def stored_bytes(walk: Walk, source: Checkpoint, plans: Mapping[str, SitePlan], delta: bool = False) -> tuple[int, int]:
    """(expected, most) bytes of all tensors of the artifact, as in `sizes.bytes` of compress.json; no file headers."""
    written = stored_sites(walk, plans, delta)
    taken = {walk.anatomy.places[name].tensor for name in written}
    plain = sum(held.nbytes for name, held in source.headers.items() if name not in taken)
    return plain + sum(plans[n].bytes for n in written), plain + sum(plans[n].most for n in written)


def stored_sites(walk: Walk, plans: Mapping[str, SitePlan], delta: bool = False) -> list[str]:
    """The sites stored as expressions: those that a pass rewrites, and all experts of a module if it rewrites one.

    In a delta the latter holds only for experts stacked in one tensor of the file, as in `Job.divide`.
    """
    places = walk.anatomy.places
    touched = [name for name, plan in plans.items() if plan.steps]
    opened = {places[n].module for n in touched if (places[n].stacked if delta else places[n].expert is not None)}
    return [n for n, p in plans.items() if p.steps or (places[n].expert is not None and places[n].module in opened)]
