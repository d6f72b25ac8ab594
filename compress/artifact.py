"""The output folder: an ordinary Hugging Face folder whose sites are stored as weight expressions.

One shard a block. Of every site, one stored tensor keeps the source's own key, `<site>.weight`, in a flat shape;
its companions are `<site>.weight_<path>`. Everything is written into `OUT.partial-<id>`, verified, then renamed.
Nothing in it depends on time, place or speed: the same run writes the same bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from compress.errors import ArtifactError, VerificationError
from compress.model.source import INDEX, Checkpoint, digest, dtype_of, read_json
from compress.schema import PROVENANCES, SPECS, checked
from compress.weights import Dense, Weight, pack, specify, unpack

METHOD = "compress"
VERSION = 1
PROVENANCE = "compress.json"
COPIED = (".json", ".txt", ".model", ".jinja")  # tokenizer and generation files of the source
NOT_COPIED = ("config.json", INDEX, PROVENANCE)


def keys(site: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """Tree path -> key in the file; the first payload keeps the key of the source."""
    paths = [path for path, _, _ in spec["tensors"]]
    return {
        path: f"{site}.weight" if i == 0 else f"{site}.weight_{path.replace('.', '_')}" for i, path in enumerate(paths)
    }


def site_spec(weight: Weight, packed: Mapping[str, Tensor]) -> dict[str, Any]:
    """The specification stored in config.json: the tree, and (path, dtype, shape) of each tensor.

    A list, because transformers sorts the keys of a config it saves and the order names the payload.
    """
    tensors = [[p, str(t.dtype).removeprefix("torch."), list(t.shape)] for p, t in packed.items()]
    return {"tree": specify(weight), "tensors": tensors, "name": weight.describe()}


@dataclass
class ArtifactWriter:
    """Writes OUT block by block into a partial folder; `commit` puts it in place, `abandon` removes it."""

    out: Path
    shards: int
    partial: Path = field(init=False)
    weight_map: dict[str, str] = field(default_factory=dict)
    specs: dict[str, Any] = field(default_factory=dict)
    digests: dict[str, str] = field(default_factory=dict)
    size: int = 0

    def __post_init__(self) -> None:
        self.partial = self.out.parent / f"{self.out.name}.partial-{uuid4().hex[:8]}"
        self.made = [parent for parent in self.out.parents if not parent.exists()]  # innermost first

    def __enter__(self) -> ArtifactWriter:
        try:
            self.partial.mkdir(parents=True)
        except OSError as error:
            raise ArtifactError(f"{self.out.parent}: cannot write there: {error.strerror}") from error
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        """Leave nothing behind unless committed; a failure to write becomes an ArtifactError."""
        shutil.rmtree(self.partial, ignore_errors=True)
        if kind is None:
            return
        for parent in self.made:
            if parent.is_dir() and not any(parent.iterdir()):
                parent.rmdir()
        if isinstance(error, WriteError):
            raise ArtifactError(f"{self.out}: cannot be written: {error.__cause__}") from error

    def add(self, sites: Mapping[str, Weight], plain: Mapping[str, Tensor], transposed: Collection[str] = ()) -> int:
        """Write one shard of rewritten sites and untouched tensors, read it back, and compare; its bytes.

        The source keeps the weights of the sites in `transposed` as [in, out].

        Raises VerificationError if the file does not hold what was meant.
        """
        name = f"model-{len(self.digests) + 1:05d}-of-{self.shards:05d}.safetensors"
        tensors = {key: t.cpu().contiguous() for key, t in plain.items()}
        expected: dict[str, Weight] = {}
        for site, weight in sites.items():
            if isinstance(weight, Dense):
                kept = weight.data.T if site in transposed else weight.data
                tensors[f"{site}.weight"] = kept.cpu().contiguous()
                continue
            packed = pack(weight)
            self.specs[site] = site_spec(weight, packed) | {"transposed": site in transposed}
            tensors |= {key: packed[path].cpu().contiguous() for path, key in keys(site, self.specs[site]).items()}
            expected[site] = weight
        path = self.partial / name
        write_shard(path, tensors)
        check_shard(path, tensors, expected, self.specs)
        self.weight_map |= dict.fromkeys(tensors, name)
        self.digests[name] = digest(path)
        self.size += sum(t.nbytes for t in tensors.values())
        return sum(t.nbytes for t in tensors.values())

    def describe(self, source: Path, config: Mapping[str, Any], provenance: Mapping[str, Any], card: str) -> None:
        """Write everything that is not weights."""
        copy_companions(source, self.partial)
        index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(self.weight_map.items()))}
        write_json(self.partial / INDEX, index)
        quantization = {"quant_method": METHOD, "version": VERSION, "weights": self.specs}
        write_json(self.partial / "config.json", {**config, "quantization_config": quantization})
        (self.partial / "README.md").write_text(card, encoding="utf-8")
        others = {f.name: digest(f) for f in sorted(self.partial.iterdir()) if f.name not in self.digests}
        write_json(self.partial / PROVENANCE, {**provenance, "files": {**self.digests, **others}})

    def commit(self) -> None:
        """Flush every file and rename the folder into place; what was there before goes last, and stays on failure."""
        for path in (*self.partial.iterdir(), self.partial):
            flush(path)
        before = self.partial.with_name(f"{self.partial.name}-replaced")
        replaced = self.out.exists()
        if replaced:
            self.out.rename(before)
        try:
            self.partial.rename(self.out)
        except BaseException as error:
            if replaced:
                before.rename(self.out)
            if isinstance(error, OSError):
                raise ArtifactError(f"{self.out}: cannot be put in place: {error}") from error
            raise
        flush(self.out.parent)
        shutil.rmtree(before, ignore_errors=True)


class WriteError(Exception):
    """A file could not be written; its cause says why."""


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one safetensors file, readable by everyone; raises WriteError if the disk refuses."""
    try:
        save_file({k: unaliased(t) for k, t in tensors.items()}, path, metadata={"format": "pt"})
        path.chmod(0o644)  # safetensors 0.8 creates files as 0600
    except (OSError, SafetensorError) as error:
        raise WriteError(str(path)) from error


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation and licence files; never code, weights or what the target writes itself."""
    for file in sorted(source.iterdir()):
        licence = file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        wanted = file.suffix in COPIED and file.name not in NOT_COPIED and not file.name.endswith("index.json")
        if file.is_file() and (wanted or licence):
            shutil.copyfile(file, target / file.name)


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def unaliased(tensor: Tensor) -> Tensor:
    """A tensor that owns its storage, as safetensors demands."""
    whole = tensor.untyped_storage().nbytes() == tensor.nbytes
    return tensor if whole else tensor.clone()


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; raises WriteError if the disk refuses."""
    try:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise WriteError(str(path)) from error


def check_shard(
    path: Path, tensors: Mapping[str, Tensor], expected: Mapping[str, Weight], specs: Mapping[str, Any]
) -> None:
    """Reopen a shard; every tensor must be what was written, every site decode to what was meant."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        if set(file.keys()) != set(tensors):
            raise VerificationError(f"{path.name}: its tensors are not the ones written")
        for key, tensor in tensors.items():
            if not torch.equal(as_bytes(file.get_tensor(key)), as_bytes(tensor)):
                raise VerificationError(f"{path.name}: {key} reads back differently")
        for site, weight in expected.items():
            stored = keys(site, specs[site])
            read = unpack(specs[site]["tree"], {p: file.get_tensor(k) for p, k in stored.items()})
            again, meant = pack(read), pack(weight)
            if any(not torch.equal(as_bytes(again[p]), as_bytes(t.cpu())) for p, t in meant.items()):
                raise VerificationError(f"{path.name}: {site} decodes differently")


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Artifact(Checkpoint):
    """A compressed folder read as the plain model it denotes: sites are decoded on the way out."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        quantization = self.config.get("quantization_config")
        if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
            raise ArtifactError(f"{path}: not a Compress artifact (config.json names no quant_method {METHOD!r})")
        if quantization.get("version") != VERSION:
            raise ArtifactError(f"{path}: format version {quantization.get('version')}, this program reads {VERSION}")
        self.specs: dict[str, Any] = checked(SPECS, quantization.get("weights"), f"{path}: quantization_config.weights")
        self.dtype = dtype_of(self.config)

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """compress.json; raises ArtifactError if it is missing or malformed."""
        found = read_json(self.path / PROVENANCE, "the provenance file")
        return checked(PROVENANCES, found, f"{self.path / PROVENANCE}")

    @cached_property
    def payloads(self) -> dict[str, str]:
        """Key in the file -> the site it belongs to."""
        return {key: site for site, spec in self.specs.items() for key in keys(site, spec).values()}

    def names(self) -> list[str]:
        """The names of the plain model's tensors, sorted."""
        plain = [name for name in self.files if name not in self.payloads]
        return sorted(plain + [f"{site}.weight" for site in self.specs])

    def tensor(self, name: str) -> Tensor:
        """One plain tensor, decoded and in the model's dtype if it is a site's weight."""
        site = name.removesuffix(".weight")
        if name.endswith(".weight") and site in self.specs:
            plain = self.expression(site).dense().to(self.dtype)
            return plain.T.contiguous() if self.specs[site]["transposed"] else plain
        return super().tensor(name)

    def stored(self, site: str) -> dict[str, Tensor]:
        """The stored tensors of a site by their key in the file."""
        return {key: super(Artifact, self).tensor(key) for key in keys(site, self.specs[site]).values()}

    def expression(self, site: str) -> Weight:
        """The stored expression of a site."""
        stored, paths = self.stored(site), keys(site, self.specs[site])
        return unpack(self.specs[site]["tree"], {path: stored[key] for path, key in paths.items()})

    def plain_shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of the plain model's tensors."""
        shapes = {name: shape for name, shape in self.shapes().items() if name not in self.payloads}
        for site, spec in self.specs.items():
            shape = spec["tree"]["shape"]
            shapes[f"{site}.weight"] = tuple(reversed(shape)) if spec["transposed"] else tuple(shape)
        return shapes


def is_artifact(path: Path) -> bool:
    """Whether a folder says it is ours."""
    config = path / "config.json"
    return config.is_file() and (read_json(config, "config.json").get("quantization_config") or {}).get(
        "quant_method"
    ) == METHOD  # fmt: skip


def verify(path: Path) -> list[str]:
    """What was checked, one line each.

    Every file against its recorded sha256, every site decoded and finite, every name and shape against the
    source's. Raises VerificationError at the first difference, ArtifactError if the folder is not ours.
    """
    artifact = Artifact(path)
    recorded = artifact.provenance["files"]
    for name, known in sorted(recorded.items()):
        file = path / name
        if Path(name).name != name or not file.is_file() or digest(file) != known:
            raise VerificationError(f"{file}: its sha256 is not the recorded one; the file was changed or is missing")
    unknown = artifact.specs.keys() - artifact.provenance["sites"].keys()
    if unknown:
        raise VerificationError(f"{path / PROVENANCE}: it says nothing of {sorted(unknown)[0]}")
    extra = {file.name for file in artifact.files.values()} - recorded.keys()
    if extra:
        raise VerificationError(f"{path}: {sorted(extra)[0]} is not a recorded file")
    for site in artifact.specs:
        try:
            finite = bool(torch.isfinite(artifact.expression(site).dense()).all())
        except ArtifactError as error:
            raise VerificationError(f"{path}: {site}: {error}") from error
        if not finite:
            raise VerificationError(f"{path}: {site} decodes to values that are not finite")
    shapes = {name: list(shape) for name, shape in artifact.plain_shapes().items()}
    wanted = artifact.provenance["tensors"]
    for name in sorted(set(shapes) | set(wanted)):
        if shapes.get(name) != wanted.get(name):
            raise VerificationError(f"{path}: {name} is {shapes.get(name)}, the source had {wanted.get(name)}")
    return [
        f"{len(recorded)} files match their sha256",
        f"{len(artifact.specs)} compressed sites decode to finite values",
        f"{len(shapes)} tensors have the names and shapes of the source",
    ]
