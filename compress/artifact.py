"""The output folder: an ordinary Hugging Face folder whose sites are stored as weight expressions.

A recipe that only changes the model's shape stores plain tensors: then config.json names no method, and compress.json
alone says that the folder is ours.
One shard a block. Of every site, one stored tensor keeps the source's own key, `<site>.weight`, in a flat shape;
its companions are `<site>.weight_<path>`. Here it is read and verified; `writer.py` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.errors import ArtifactError, RecipeError, VerificationError
from compress.model.source import Checkpoint, Held, digest, dtype_of, read_json
from compress.schema import PROVENANCES, SPECS, checked
from compress.shards import NAMES, Entry
from compress.weights import Weight, unpack

METHOD = "compress"
VERSION = 1
PROVENANCE = "compress.json"


def keys(site: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """Tree path -> key in the file; the first payload keeps the key of the source.

    Of a tensor that held a stack of experts, only expert 0 can keep it; the others add their number. A payload that
    another site of the block holds too, bit for bit, is stored under that site's key only.
    """
    base = tensor_of(site, spec)
    if spec.get("expert"):
        base = f"{base}.{spec['expert']}"
    paths = [path for path, _, _ in spec["tensors"]]
    own = {path: base if i == 0 else f"{base}_{path.replace('.', '_')}" for i, path in enumerate(paths)}
    return {**own, **spec.get("shared", {})}


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


class Artifact(Checkpoint):
    """A compressed folder read as the plain model it denotes: sites are decoded on the way out."""

    decoded_from = METHOD

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        quantization = self.config.get("quantization_config")
        self.packed = not (quantization is None and is_plain(path))  # whether sites are stored as expressions
        if not self.packed:
            quantization = {"quant_method": METHOD, "version": VERSION, "weights": {}}
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
        found = {name: held for name, held in self.stored_headers.items() if name not in self.payloads}
        return found | {name: Held(NAMES[self.dtype], shape) for name, shape in self.plain.items()}


def is_artifact(path: Path) -> bool:
    """Whether a folder says it is ours."""
    config = path / "config.json"
    if not config.is_file():
        return False
    told = read_json(config, "config.json").get("quantization_config")
    return is_plain(path) if told is None else isinstance(told, dict) and told.get("quant_method") == METHOD


def is_plain(path: Path) -> bool:
    """Whether a folder's compress.json says that we made it another shape and rewrote none of its sites."""
    if not (path / PROVENANCE).is_file():
        return False
    told = read_json(path / PROVENANCE, "the provenance file")
    return bool(told.get("reshaped")) and told.get("sites") == {}


def recorded_base(folder: Path) -> str:
    """The model an artifact was made from; raises RecipeError if it must be named."""
    if is_artifact(folder) and (folder / PROVENANCE).is_file():
        name = str(Artifact(folder).provenance.get("source", {}).get("name"))
        if name == "builtin":
            return name
    raise RecipeError(f"--base: name the dense model that {folder.name} was made from")


def check_base(folders: Sequence[Path], base: Path) -> None:
    """Raise ArtifactError if an artifact was made from other weights than those of `base`."""
    known = set(Checkpoint(base).digests().values())
    for folder in filter(is_artifact, folders):
        made = set(Artifact(folder).provenance["source"]["sha256"].values())
        if made != known:
            raise ArtifactError(f"{folder}: was made from other weights than those of {base}; name its own --base")


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
