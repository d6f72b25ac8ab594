"""Merging: several fine-tunes of one base become one ordinary model folder, tensor by tensor.

The models may be plain folders or compressed deltas of the base. Memory is a few tensors whatever their size; only
RegMean, which needs what flows through the models, holds a block of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from compress.artifact import Artifact
from compress.errors import RecipeError, VerificationError, nearest
from compress.frontmatter import carried
from compress.merging.arithmetic import Average, TaskArithmetic
from compress.merging.breadcrumbs import Breadcrumbs
from compress.merging.dare import DareLinear, DareTies
from compress.merging.della import Della
from compress.merging.describe import card, provenance
from compress.merging.inputs import Inputs, labelled, open_inputs
from compress.merging.method import Method
from compress.merging.regmean import RegMean, SideBySide
from compress.merging.shares import Weights, shares
from compress.merging.stream import Stream
from compress.merging.ties import Ties
from compress.model.architecture import without_code
from compress.model.source import Checkpoint, display_name, locate
from compress.options import build
from compress.plan import check_disk, free_place, usable
from compress.recipe import Calibration
from compress.shards import SHARD_SIZE, Entry
from compress.writer import ArtifactWriter, copy_shared, writing

METHODS: dict[str, type[Method]] = {
    kind.name: kind
    for kind in (Average, Breadcrumbs, DareLinear, DareTies, Della, RegMean, TaskArithmetic, Ties)
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Merged:
    """What was written: the folder, bytes of its tensors, and how many entries each model changed and were kept."""

    out: Path
    method: str
    bytes: int
    changed: dict[str, int]
    kept: dict[str, int]


@torch.no_grad()
def merge(
    base: str | Path,
    models: Mapping[str, str | Path] | Sequence[str | Path],
    out: str | Path,
    *,
    method: str = "task-arithmetic",
    weights: Weights | None = None,
    calibration: Calibration | Mapping[str, Calibration] | None = None,
    device: str = "cpu",
    shard_size: int = SHARD_SIZE,
    on_progress: Callable[[str], None] = lambda text: None,
    **options: Any,
) -> Merged:
    """Merge fine-tunes of `base` into the folder `out`, with the base's config and tokenizer.

    `models` are folders, by name or called as their folders are. `weights` maps a name to a number, or to numbers by
    globs over tensor names of which the last match counts; 1 where nothing is said. `options` are those of the method.
    `calibration` and `device` are for `regmean`: the tokens on which inputs are measured, for all models or by name.
    Which models are merged decides the result, bit for bit, not their order or names. Raises CompressError children;
    `out` is then not there.
    """
    if method not in METHODS:
        raise RecipeError(f"method: {method!r} is not a method{nearest(str(method), METHODS)}")
    chosen = build(METHODS[method], options, f"merge.{method}")
    folders, root = labelled(models), locate(base)
    for folder in (root, *folders.values()):  # before anything that takes time
        target = free_place(Path(out), folder, force=None)
    calibrations = by_label(calibration, list(folders), chosen)
    where = usable(device)
    inputs = open_inputs(root, folders)
    told = shares(weights or {}, inputs.order, inputs.names(), chosen)
    check_disk(target, inputs.base)
    with writing(target, shard_size) as writer:
        stream = Stream(inputs, chosen, told)
        work: Work = Whole(stream)
        if isinstance(chosen, RegMean):
            work = SideBySide(inputs, stream, chosen, calibrations, where)
        for entries in work.parts():
            writer.add({}, [announced(entry, on_progress) for entry in entries])
        finish(writer, inputs, provenance(inputs, chosen, told, stream.tally, work.facts()))
        writer.commit()
    return Merged(
        out=target, method=method, bytes=writer.size,
        changed={label: stream.tally[label][0] for label in inputs.order},
        kept={label: stream.tally[label][1] for label in inputs.order},
    )  # fmt: skip


class Work(Protocol):
    """What yields the merged tensors, some at a time, and what is to be said of how they were made."""

    def parts(self) -> Iterator[list[Entry]]:
        """What is to be written; each part before the next is asked for."""

    def facts(self) -> dict[str, Any]:
        """For compress.json, once all is written."""


@dataclass(frozen=True)
class Whole:
    """All tensors, made one by one."""

    stream: Stream

    def parts(self) -> Iterator[list[Entry]]:
        """One part."""
        yield self.stream.entries(self.stream.inputs.names())

    def facts(self) -> dict[str, Any]:
        """Nothing."""
        return {}


def by_label(
    told: Calibration | Mapping[str, Calibration] | None, labels: Sequence[str], method: Method
) -> dict[str, Calibration]:
    """Label -> calibration; raises RecipeError if the method reads none, or a model is unknown."""
    if told is None:
        return dict.fromkeys(labels, Calibration())
    if not isinstance(method, RegMean):
        raise RecipeError(f"calibration: {method.name} reads no tokens; only regmean does")
    if isinstance(told, Calibration):
        return dict.fromkeys(labels, told)
    for label in told:
        if label not in labels:
            raise RecipeError(f"calibration: no model is called {label!r}{nearest(str(label), labels)}")
    return {label: told.get(label, Calibration()) for label in labels}


def announced(entry: Entry, on_progress: Callable[[str], None]) -> Entry:
    """The entry, whose name is said when its turn comes."""

    def make() -> Tensor:
        on_progress(entry.name)
        return entry.make()

    return replace(entry, make=make)


def finish(writer: ArtifactWriter, inputs: Inputs, facts: dict[str, Any]) -> None:
    """Write everything that is not weights; raises VerificationError if the folder does not hold what was meant."""
    told = {key: value for key, value in without_code(inputs.teller.config).items() if key != "quantization_config"}
    kept = {key: inputs.base.config[key] for key in ("dtype", "torch_dtype") if key in inputs.base.config}
    config = {key: value for key, value in told.items() if key not in ("dtype", "torch_dtype")} | kept
    if isinstance(inputs.teller, Artifact):  # a delta leaves out what its base has alike
        copy_shared(inputs.teller, writer.partial)
    merged = {member.label: member.source for member in inputs.members}
    named = [(display_name(inputs.base.path), inputs.base), *((label, merged[label]) for label in inputs.order)]
    cards = [(name, carried(source.path)) for name, source in named]
    writer.describe(inputs.teller.path, config, facts, card(facts, cards))
    written = Checkpoint(writer.partial).headers
    if written != {name: inputs.header(name) for name in inputs.names()}:
        raise VerificationError(f"{writer.out}: its tensors are not those that were meant")


__all__ = ["METHODS", "Merged", "Method", "merge"]
