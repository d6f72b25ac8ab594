"""Merges several fine-tunes of one base into one ordinary model folder, tensor by tensor.

The models may be plain folders or compressed deltas of the base. A merge holds only a few tensors in memory, whatever
the size of the models; only RegMean, which needs the layers' inputs, holds one block of each model.
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
    """The result of a merge: the folder, the bytes of its tensors, and entry counts by model.

    `changed` counts the entries in which a model differs from the base, `kept` those of them that were merged.
    """

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

    `models` maps names to folders, or lists folders, which then go by their own names. `weights` maps a model's name to
    a number, or to numbers by glob over tensor names, of which the last matching glob counts; the default is 1.
    `options` are those of the method. `calibration` and `device` are used by `regmean` only: `calibration` describes
    the tokens on which inputs are measured, for all models or by name. The result depends only on which models are
    merged, bit for bit, not on their order or names. Raises subclasses of CompressError; `out` then does not exist.
    """
    if method not in METHODS:
        raise RecipeError(f"method: {method!r} is not a method{nearest(str(method), METHODS)}")
    chosen = build(METHODS[method], options, f"merge.{method}")
    folders, root = labelled(models), locate(base)
    for folder in (root, *folders.values()):  # check the target before anything that takes time
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
    """Yields the merged tensors in parts, and describes how they were made."""

    def parts(self) -> Iterator[list[Entry]]:
        """The tensors to write; each part must be written before the next is requested."""

    def facts(self) -> dict[str, Any]:
        """Additional facts for compress.json, available once everything has been written."""


@dataclass(frozen=True)
class Whole:
    """Merges all tensors one by one, without running the models."""

    stream: Stream

    def parts(self) -> Iterator[list[Entry]]:
        """One part with all tensors."""
        yield self.stream.entries(self.stream.inputs.names())

    def facts(self) -> dict[str, Any]:
        """No additional facts."""
        return {}


def by_label(
    told: Calibration | Mapping[str, Calibration] | None, labels: Sequence[str], method: Method
) -> dict[str, Calibration]:
    """Label -> calibration; raises RecipeError if the method uses no calibration, or if a model is unknown."""
    if told is None:
        return dict.fromkeys(labels, Calibration())
    if not isinstance(method, RegMean):
        raise RecipeError(f"calibration: {method.name} uses no calibration data; only regmean does")
    if isinstance(told, Calibration):
        return dict.fromkeys(labels, told)
    for label in told:
        if label not in labels:
            raise RecipeError(f"calibration: no model is called {label!r}{nearest(str(label), labels)}")
    return {label: told.get(label, Calibration()) for label in labels}


def announced(entry: Entry, on_progress: Callable[[str], None]) -> Entry:
    """The entry, with its name reported to `on_progress` when its tensor is made."""

    def make() -> Tensor:
        on_progress(entry.name)
        return entry.make()

    return replace(entry, make=make)


def finish(writer: ArtifactWriter, inputs: Inputs, facts: dict[str, Any]) -> None:
    """Write everything but the weights; raises VerificationError if the tensors in the folder are not as planned."""
    told = {key: value for key, value in without_code(inputs.teller.config).items() if key != "quantization_config"}
    kept = {key: inputs.base.config[key] for key in ("dtype", "torch_dtype") if key in inputs.base.config}
    config = {key: value for key, value in told.items() if key not in ("dtype", "torch_dtype")} | kept
    if isinstance(inputs.teller, Artifact):  # a delta folder leaves out the files that equal its base's
        copy_shared(inputs.teller, writer.partial)
    merged = {member.label: member.source for member in inputs.members}
    named = [(display_name(inputs.base.path), inputs.base), *((label, merged[label]) for label in inputs.order)]
    cards = [(name, carried(source.path)) for name, source in named]
    writer.describe(inputs.teller.path, config, facts, card(facts, cards))
    written = Checkpoint(writer.partial).headers
    if written != {name: inputs.header(name) for name in inputs.names()}:
        raise VerificationError(f"{writer.out}: the written tensors do not have the planned names, dtypes and shapes")


__all__ = ["METHODS", "Merged", "Method", "merge"]
