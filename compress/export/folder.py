"""The steps that all exports to a Hugging Face folder share.

The artifact is verified first, written one shard at a time, read back and compared with the artifact's matrices, and
only then put in place. How a format stores a weight is defined in the format's own module.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from compress.artifact import Artifact, verify
from compress.card import export_card
from compress.errors import ArtifactError, RecipeError, VerificationError, pass_on_memory
from compress.export.leaf import Leaf, leaf, leaves
from compress.frontmatter import CARD, carried
from compress.model.anatomy import Anatomy
from compress.model.architecture import skeleton
from compress.model.source import INDEX, Checkpoint
from compress.partial import beside
from compress.plan import free_place
from compress.shards import SHARD_SIZE, Entry, WriteError, split, write_shard
from compress.writer import copy_companions, refusal, write_json

EXPERTS = ".experts."  # part of the names of all experts of a mixture


@dataclass(frozen=True, kw_only=True)
class Exported:
    """The result of an export: the folder, the bytes of its tensors, and a line for the user on what the format costs.

    `rounding` is the largest relative RMS difference between a site as the format's library decodes it in the model's
    dtype and the artifact's matrix.
    """

    out: Path
    format: str
    bytes: int
    rounding: float
    note: str


class Form:
    """How a format represents the sites of one artifact; sites are checked and refused before anything is written."""

    name: ClassVar[str]
    experts: ClassVar[bool] = False  # whether loaders of the format support quantized experts of a mixture

    def __init__(self, artifact: Artifact) -> None:
        self.artifact = artifact
        self.schemes: dict[str, Any] = {}
        for site in leaves(artifact, self.name):
            scheme = self.scheme(site)
            if scheme is not None and EXPERTS in site.name and not self.experts:
                reason = "transformers holds all experts in one tensor and reads them only dense"
                raise site.refused(self.name, reason, "use --to compressed-tensors or dense")
            if scheme is not None:
                self.schemes[site.name] = scheme
        if not self.schemes:
            raise RecipeError(
                f"{artifact.path}: no site is quantized, so there is nothing to export as {self.name}; use --to dense"
            )

    def scheme(self, site: Leaf) -> Any:
        """How a site is stored, None for dense; raises UnsupportedWeight if the format cannot represent it."""
        raise NotImplementedError

    def pack(self, site: Leaf, scheme: Any) -> dict[str, Tensor]:
        """The stored tensors of a site, by the part of their name that follows its key."""
        raise NotImplementedError

    def unpack(self, stored: Mapping[str, Tensor], scheme: Any, dtype: torch.dtype) -> Tensor:
        """The matrix [out, in] that a model of `dtype` reads from the stored tensors."""
        raise NotImplementedError

    def slack(self, scheme: Any) -> float:
        """The relative RMS error in float32 that the format's own rules cause; 0 unless overridden."""
        del scheme
        return 0.0

    def config(self) -> dict[str, Any]:
        """The `quantization_config` of config.json."""
        raise NotImplementedError

    def check_config(self, told: Mapping[str, Any]) -> None:
        """Raise VerificationError if a loader would not find every site by the written config; unchecked by default."""

    def note(self, rounding: float) -> str:
        """One line that tells the user what to know about the export."""
        raise NotImplementedError

    def plain(self) -> list[str]:
        """The modules whose matrices are stored dense, always including `lm_head`, which is never quantized.

        An output head that is tied to the embedding has no tensor of its own but is still such a module.
        """
        matrices = [n for n, held in self.artifact.headers.items() if len(held.shape) > 1 and n.endswith(".weight")]
        stored = {self.module_of(self.key_of(site)) for site in self.schemes}
        return sorted({self.module_of(name.removesuffix(".weight")) for name in matrices} - stored | {"lm_head"})

    @cached_property
    def anatomy(self) -> Anatomy:
        """The parts of the model, which is built without weights, as a loader builds it."""
        return Anatomy(skeleton(self.artifact.config, self.artifact.dtype), self.artifact.shapes())

    def module_of(self, key: str) -> str:
        """The model's module whose weight is `<key>.weight` in the file, where a prefix may be missing or another one.

        Returns `key` itself for an expert of a stack, which is no module, and for a tensor unknown to the architecture.
        """
        slot = self.anatomy.layout.slots.get(f"{key}.weight")
        return key if slot is None or slot.expert is not None else slot.parameter.removesuffix(".weight")

    def key_of(self, site: str) -> str:
        """The prefix of the names of a site's tensors."""
        return str(self.artifact.specs[site].get("tensor", f"{site}.weight")).removesuffix(".weight")

    def entries(self, name: str) -> list[Entry]:
        """The entries to write in place of a tensor of the dense model."""
        sites = self.artifact.holders.get(name, [])
        if not sites or sites[0] not in self.schemes:
            return [self.artifact.entry(name)]
        site = leaf(self.artifact, sites[0], self.name)
        packed = self.pack(site, self.schemes[site.name])
        return [Entry.of(f"{site.key}.{end}", tensor.contiguous()) for end, tensor in packed.items()]


def write_folder(path: Path, out: Path, kind: type[Form]) -> Exported:
    """Write the artifact at `path` to the folder `out` in a format; it is put in place only after it was read back.

    Raises RecipeError if `out` exists or lies inside the artifact, or if no site is quantized; ArtifactError if `path`
    is not an artifact; UnsupportedWeight if the format cannot represent a site; VerificationError if the tensors read
    back do not decode to the artifact's matrices.
    """
    with put_in_place(path, out) as (artifact, partial):
        form = kind(artifact)
        size = write_shards(artifact, partial, form.entries)
        copy_companions(path, partial)
        config = {key: value for key, value in artifact.config.items() if key != "quantization_config"}
        write_json(partial / "config.json", {**config, "quantization_config": form.config()})
        written = Checkpoint(partial)
        form.check_config(written.config["quantization_config"])
        rounding = compare(form, written)
        note = form.note(rounding) + mask_note(artifact)
        write_card(artifact, partial, form.name, note)
    return Exported(out=out, format=form.name, bytes=size, rounding=rounding, note=note)


def write_card(artifact: Artifact, folder: Path, form: str, note: str) -> None:
    """Write the model card of an exported artifact, with the licence that the artifact's own card states."""
    text = export_card(artifact.provenance, form, note, carried(artifact.path))
    (folder / CARD).write_text(text, encoding="utf-8")


def mask_note(artifact: Artifact) -> str:
    """The note on lost masks if a site is pruned, else an empty string; no format here can represent a mask."""
    pruned = any(spec["tree"]["kind"] == "masked" for spec in artifact.specs.values())
    return "; pruned weights are stored as zeros: the mask is lost, and pruning saves no space" if pruned else ""


@contextmanager
def put_in_place(
    path: Path, out: Path, base: Path | None = None, alone: bool = False
) -> Iterator[tuple[Artifact, Path]]:
    """A context that gives the verified artifact and an empty folder, which is renamed to `out` at the end.

    A delta needs its `base`, unless it may stand `alone`. Raises ArtifactError if the folder cannot be written.
    """
    out = free_place(out, path, force=None)
    if base is not None:
        free_place(out, base, force=None)
    artifact = Artifact(path, base)
    if artifact.is_delta and base is None and not alone:
        raise ArtifactError(f"{path}: is a delta of {artifact.pin_name}; give its base, or apply it first")
    verify(path, base)
    with beside(out) as folder:
        partial = folder / "export"
        try:
            partial.mkdir()
            yield artifact, partial
            partial.rename(out)
        except (OSError, WriteError) as error:
            pass_on_memory(error)
            raise refusal(out, error) or ArtifactError(f"{out}: the export failed: {error}") from error


def write_shards(artifact: Artifact, folder: Path, entries: Any) -> int:
    """Write one shard for each shard of the artifact, and the index; returns the bytes of all tensors.

    `entries(name)` gives what is written in place of a tensor of the dense model.
    """
    held = shards_of(artifact)
    weight_map: dict[str, str] = {}
    size = 0
    for shard, names in sorted(held.items()):
        written: list[Entry] = [entry for name in names for entry in entries(name)]
        write_shard(folder / shard, written)
        weight_map |= dict.fromkeys((entry.name for entry in written), shard)
        size += sum(entry.nbytes for entry in written)
    write_json(folder / INDEX, {"metadata": {"total_size": size}, "weight_map": dict(sorted(weight_map.items()))})
    return size


def shards_of(artifact: Artifact) -> dict[str, list[str]]:
    """The tensors of the dense model by output shard: as in the artifact, or for a delta split by size."""
    held: dict[str, list[str]] = {}
    if artifact.base is None:
        for name in artifact.names():
            held.setdefault(artifact.shard_of(name), []).append(name)
        return held
    parts = list(split([artifact.entry(name) for name in artifact.names()], SHARD_SIZE))
    for i, part in enumerate(parts, 1):
        held[f"model-{i:05d}-of-{len(parts):05d}.safetensors"] = [entry.name for entry in part]
    return held


def compare(form: Form, written: Checkpoint) -> float:
    """The largest relative RMS difference between a site as read back and the artifact's, in the model's dtype.

    Raises VerificationError if a site differs in float32 by more than the format's own rules allow (`Form.slack`).
    """
    dtype, worst = form.artifact.dtype, 0.0
    plain = set(form.artifact.names())
    for site, scheme in form.schemes.items():
        key = f"{form.key_of(site)}."
        own = [n for n in written.names() if n.startswith(key) and (n == f"{key}weight" or n not in plain)]
        stored = {n.removeprefix(key): written.tensor(n) for n in own}
        meant = form.artifact.expression(site).dense().float()
        error = difference(form.unpack(stored, scheme, torch.float32), meant)
        if not error <= form.slack(scheme):
            raise VerificationError(
                f"{site}: the matrix read back from {form.name} differs from the artifact's by {error:.2g} "
                "(relative RMS)"
            )
        worst = max(worst, difference(form.unpack(stored, scheme, dtype), form.artifact.matrix(site)))
    return worst


def difference(got: Tensor, meant: Tensor) -> float:
    """|got - meant| / |meant| in the Frobenius norm, in float64; raises VerificationError if the shapes differ."""
    if got.shape != meant.shape:
        raise VerificationError(f"a matrix of {tuple(meant.shape)} reads back as {tuple(got.shape)}")
    norm = float(meant.double().norm())
    return float((got.double() - meant.double()).norm()) / (norm or 1.0)
