"""The output folder: an ordinary Hugging Face folder whose sites are stored as weight expressions.

One shard a block. Of every site, one stored tensor keeps the source's own key, `<site>.weight`, in a flat shape;
its companions are `<site>.weight_<path>`. Everything is written into `OUT.partial-<id>`, verified, then renamed.
Nothing in it depends on time, place or speed: the same run writes the same bytes.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from torch import Tensor

from compress.errors import ArtifactError, VerificationError
from compress.model.source import INDEX, Checkpoint, Held, digest, dtype_of, read_json
from compress.schema import PROVENANCES, SPECS, checked
from compress.shards import NAMES, SHARD_SIZE, Entry, WriteError, split, write_shard
from compress.weights import Dense, Weight, pack, specify, unpack

METHOD = "compress"
VERSION = 1
PROVENANCE = "compress.json"
COPIED = (".json", ".txt", ".model", ".jinja")  # tokenizer and generation files of the source
REFUSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # a disk's ways to say no
NOT_COPIED = ("config.json", INDEX, PROVENANCE)


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A rewritten site and the tensor of the source it comes from, of which it may be one `expert`."""

    weight: Weight
    tensor: str
    transposed: bool = False
    expert: int | None = None
    part: bool = False  # of a stack in the model, whether or not in the file


def keys(site: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """Tree path -> key in the file; the first payload keeps the key of the source.

    Of a tensor that held a stack of experts, only expert 0 can keep it; the others add their number.
    """
    base = tensor_of(site, spec)
    if spec.get("expert"):
        base = f"{base}.{spec['expert']}"
    paths = [path for path, _, _ in spec["tensors"]]
    return {path: base if i == 0 else f"{base}_{path.replace('.', '_')}" for i, path in enumerate(paths)}


def tensor_of(site: str, spec: Mapping[str, Any]) -> str:
    """The tensor of the source that a site is, or is an expert of."""
    return str(spec.get("tensor") or f"{site}.weight")


def plain_shapes(specs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the plain tensors that the sites of these specifications make up."""
    held: dict[str, list[Mapping[str, Any]]] = {}
    for site, spec in specs.items():
        held.setdefault(tensor_of(site, spec), []).append(spec)
    shapes: dict[str, tuple[int, ...]] = {}
    for name, parts in held.items():
        shape = tuple(int(n) for n in parts[0]["tree"]["shape"])
        shape = tuple(reversed(shape)) if parts[0]["transposed"] else shape
        shapes[name] = (len(parts), *shape) if "expert" in parts[0] else shape
    return shapes


def site_spec(site: str, stored: Stored, packed: Mapping[str, Tensor]) -> dict[str, Any]:
    """The specification stored in config.json: the tree, (path, dtype, shape) of each tensor, and its place.

    A list, because transformers sorts the keys of a config it saves and the order names the payload.
    """
    tensors = [[p, str(t.dtype).removeprefix("torch."), list(t.shape)] for p, t in packed.items()]
    weight = stored.weight
    spec: dict[str, Any] = {"tree": specify(weight), "tensors": tensors, "name": weight.describe()}
    spec["transposed"] = stored.transposed
    if stored.tensor != f"{site}.weight":
        spec["tensor"] = stored.tensor
    if stored.expert is not None:
        spec["expert"] = stored.expert
    return spec


@dataclass
class ArtifactWriter:
    """Writes OUT block by block into a partial folder; `commit` puts it in place, `abandon` removes it.

    A shard holds at most one block and, unless one tensor is larger, at most `shard_size` bytes.
    """

    out: Path
    shard_size: int = SHARD_SIZE
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

    def scratch(self) -> Path:
        """A folder for what the run needs on disk; gone before the artifact is described."""
        folder = self.partial / "scratch"
        folder.mkdir(exist_ok=True)
        return folder

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
        if isinstance(error, OSError) and error.errno in REFUSING:
            raise ArtifactError(f"{self.out}: cannot be written: {error}") from error

    def add(self, sites: Mapping[str, Stored], plain: Iterable[Entry]) -> int:
        """Write rewritten sites and untouched tensors, read them back, and compare; their bytes.

        Raises VerificationError if a file does not hold what was meant.
        """
        entries, packed = list(plain), {}
        for site, stored in sites.items():
            if isinstance(stored.weight, Dense) and not stored.part:
                kept = stored.weight.data.T if stored.transposed else stored.weight.data
                entries.append(Entry.of(stored.tensor, kept))
                continue
            packed[site] = pack(stored.weight)
            self.specs[site] = site_spec(site, stored, packed[site])
            entries += [Entry.of(key, packed[site][path]) for path, key in keys(site, self.specs[site]).items()]
        for part in split(entries, self.shard_size):
            path = self.partial / f"part-{len(self.digests) + 1:05d}.safetensors"
            self.digests[path.name] = write_shard(path, part)
            self.weight_map |= {entry.name: path.name for entry in part}
        self._check(packed)
        size = sum(entry.nbytes for entry in entries)
        self.size += size
        return size

    def _check(self, packed: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Decode each site from its file; raises VerificationError unless it packs to the bytes that were meant."""
        for site, meant in packed.items():
            stored = {p: self._read(key) for p, key in keys(site, self.specs[site]).items()}
            again = pack(unpack(self.specs[site]["tree"], stored))
            if any(not torch.equal(as_bytes(again[p]), as_bytes(t.cpu())) for p, t in meant.items()):
                raise VerificationError(
                    f"{self.weight_map[tensor_of(site, self.specs[site])]}: {site} decodes differently"
                )

    def _read(self, key: str) -> Tensor:
        """One tensor of what was written."""
        from safetensors import safe_open

        with safe_open(self.partial / self.weight_map[key], framework="pt") as file:
            found: Tensor = file.get_tensor(key)
        return found

    def _number(self) -> None:
        """Give the shards their final names, now that their number is known."""
        names = {old: f"model-{i:05d}-of-{len(self.digests):05d}.safetensors" for i, old in enumerate(self.digests, 1)}
        for old, new in names.items():
            (self.partial / old).rename(self.partial / new)
        self.digests = {names[old]: sha for old, sha in self.digests.items()}
        self.weight_map = {key: names[old] for key, old in self.weight_map.items()}

    def describe(self, source: Path, config: Mapping[str, Any], provenance: Mapping[str, Any], card: str) -> None:
        """Write everything that is not weights."""
        shutil.rmtree(self.partial / "scratch", ignore_errors=True)
        self._number()
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


def copy_companions(source: Path, target: Path) -> None:
    """Copy tokenizer, generation and licence files; never code, weights or what the target writes itself."""
    for file in sorted(source.iterdir()):
        licence = file.name.upper().startswith(("LICENSE", "LICENCE", "NOTICE"))
        wanted = file.suffix in COPIED and file.name not in NOT_COPIED and not file.name.endswith("index.json")
        if file.is_file() and (wanted or licence):
            try:
                shutil.copyfile(file, target / file.name)
            except OSError as error:
                raise WriteError(str(target / file.name)) from error


def flush(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON; raises WriteError if the disk refuses."""
    try:
        path.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise WriteError(str(path)) from error


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes, so that NaN equals itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)


class Artifact(Checkpoint):
    """A compressed folder read as the plain model it denotes: sites are decoded on the way out."""

    decoded_from = METHOD

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

    @cached_property
    def holders(self) -> dict[str, list[str]]:
        """Tensor of the plain model -> the sites that hold it, in the order of their experts."""
        held: dict[str, list[str]] = {}
        for site, spec in self.specs.items():
            held.setdefault(tensor_of(site, spec), []).append(site)
        return {name: sorted(sites, key=lambda s: self.specs[s].get("expert") or 0) for name, sites in held.items()}

    def names(self) -> list[str]:
        """The names of the plain model's tensors, sorted."""
        return sorted({name for name in self.files if name not in self.payloads} | self.holders.keys())

    def tensor(self, name: str) -> Tensor:
        """One plain tensor, decoded and in the model's dtype if it is a site's weight."""
        sites = self.holders.get(name)
        if sites is None:
            return super().tensor(name)
        if "expert" not in self.specs[sites[0]]:
            return self.matrix(sites[0])
        stack = torch.empty(self.plain[name], dtype=self.dtype)
        for expert, site in enumerate(sites):
            stack[expert] = self.matrix(site)
        return stack

    def entry(self, name: str) -> Entry:
        """One plain tensor, to be written when its turn comes."""
        held = self.headers[name]
        return Entry(name=name, make=partial(self.tensor, name), **held._asdict(), nbytes=held.nbytes)

    def shard_of(self, name: str) -> str:
        """The file that holds a plain tensor, or its first expert."""
        sites = self.holders.get(name)
        return self.files[next(iter(keys(sites[0], self.specs[sites[0]]).values())) if sites else name].name

    def matrix(self, site: str) -> Tensor:
        """The plain matrix of a site, as the source lays it out."""
        plain = self.expression(site).dense().to(self.dtype)
        return plain.T.contiguous() if self.specs[site]["transposed"] else plain

    def stored(self, site: str) -> dict[str, Tensor]:
        """The stored tensors of a site by their key in the file."""
        return {key: self.stored_tensor(key) for key in keys(site, self.specs[site]).values()}

    def expression(self, site: str) -> Weight:
        """The stored expression of a site."""
        stored, paths = self.stored(site), keys(site, self.specs[site])
        return unpack(self.specs[site]["tree"], {path: stored[key] for path, key in paths.items()})

    @cached_property
    def plain(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, of those that sites make up."""
        return plain_shapes(self.specs)

    @cached_property
    def headers(self) -> dict[str, Held]:
        """What the plain model's tensors are."""
        found = {name: held for name, held in super().headers.items() if name not in self.payloads}
        return found | {name: Held(NAMES[self.dtype], shape) for name, shape in self.plain.items()}


def is_artifact(path: Path) -> bool:
    """Whether a folder says it is ours."""
    config = path / "config.json"
    told = read_json(config, "config.json").get("quantization_config") if config.is_file() else None
    return isinstance(told, dict) and told.get("quant_method") == METHOD


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
    shapes = {name: list(shape) for name, shape in artifact.shapes().items()}
    wanted = artifact.provenance["tensors"]
    for name in sorted(set(shapes) | set(wanted)):
        if shapes.get(name) != wanted.get(name):
            raise VerificationError(f"{path}: {name} is {shapes.get(name)}, the source had {wanted.get(name)}")
    return [
        f"{len(recorded)} files match their sha256",
        f"{len(artifact.specs)} compressed sites decode to finite values",
        f"{len(shapes)} tensors have the names and shapes of the source",
    ]
