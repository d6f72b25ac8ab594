"""The artifact: an ordinary Hugging Face folder whose sites are stored as weight expressions.

If a recipe only changes the model's shape, plain tensors are stored: then config.json names no quantization method,
and only compress.json identifies the folder as ours.
Each block has shards of its own. For every site, one stored tensor keeps the source's key, `<site>.weight`, in a flat
shape; the others are called `<site>.weight_<path>`. This module reads and verifies artifacts; `writer.py` writes them.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property, lru_cache, partial
from hashlib import sha256
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from compress.errors import ArtifactError, RecipeError, VerificationError, out_of_memory
from compress.model.source import DTYPES, NAMES, Checkpoint, Held, digest, display_name, dtype_of, read_json
from compress.schema import PINS, PROVENANCES, SPECS, checked
from compress.shards import Entry, chunks
from compress.weights import External, Sum, Weight, check_claims, nodes, unpack
from compress.weights.leaves import BASE

METHOD = "compress"
VERSION = 1
PROVENANCE = "compress.json"
SWELL = 1 << 12  # decoded bytes allowed per stored byte, over all sites: 1/256 bit a weight in bfloat16
SMALL = 1 << 30  # decoded bytes that are always allowed


def keys(site: str, spec: Mapping[str, Any]) -> dict[str, str]:
    """The stored tensors of a site, tree path -> key in the file; the first tensor keeps the key of the source.

    If the source tensor held a stack of experts, only expert 0 keeps its key; the others append their number. A tensor
    that is bit-identical to one of another site of the block is stored only once, under that site's key.
    """
    base = tensor_of(site, spec)
    if spec.get("expert"):
        base = f"{base}.{spec['expert']}"
    paths = [path for path, _, _ in spec["tensors"]]
    own = {path: base if i == 0 else f"{base}_{path.replace('.', '_')}" for i, path in enumerate(paths)}
    return {**own, **spec.get("shared", {})}


def tensor_of(site: str, spec: Mapping[str, Any]) -> str:
    """The name of the source tensor that is this site, or that holds it as one of its experts."""
    return str(spec.get("tensor") or f"{site}.weight")


def plain_shapes(specs: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """The plain tensors that sites with these specifications decode to, name -> shape."""
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
    """An artifact, read as the plain model that it denotes: sites are decoded as they are read.

    The plain model of a delta needs its `base`; without it, only what is stored can be read.
    """

    decoded_from = METHOD

    def __init__(self, path: Path, base: Path | None = None) -> None:
        """Raises ArtifactError if the folder is not an artifact, or `base` is not the model that it is a delta of."""
        super().__init__(path)
        quantization = self.config.get("quantization_config")
        self.packed = not (quantization is None and is_plain(path))  # whether config.json holds weight expressions
        if not self.packed:
            quantization = {"quant_method": METHOD, "version": VERSION, "weights": {}}
        if not isinstance(quantization, dict) or quantization.get("quant_method") != METHOD:
            raise ArtifactError(f"{path}: not a Compress artifact (config.json names no quant_method {METHOD!r})")
        if quantization.get("version") != VERSION:
            raise ArtifactError(f"{path}: format version {quantization.get('version')}, this program reads {VERSION}")
        self.specs: dict[str, Any] = checked(SPECS, quantization.get("weights"), f"{path}: quantization_config.weights")
        self.dtype = dtype_of(self.config)
        told = quantization.get("base")
        self.pin: dict[str, Any] | None = None if told is None else checked(PINS, told, f"{path}: base")
        if base is not None and self.pin is None:
            raise ArtifactError(f"{path}: is a whole model, not a delta; it has no base")
        self.base = None if base is None else self._base(base)

    def _base(self, path: Path) -> Checkpoint:
        """The base model in `path`; raises ArtifactError if its fingerprint is not the one this delta records."""
        base = Checkpoint(path)
        if fingerprint(base) != (self.pin or {}).get("sha256"):
            raise ArtifactError(f"{path}: is not the base of {self.path}, which is a delta of {self.pin_name}")
        return base

    @property
    def is_delta(self) -> bool:
        """Whether only the difference from a base is stored."""
        return self.pin is not None

    @property
    def pin_name(self) -> str:
        """The recorded name of the base."""
        return str((self.pin or {}).get("name"))

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """The content of compress.json; raises ArtifactError if it is missing or malformed."""
        if not (self.path / PROVENANCE).exists():
            raise ArtifactError(
                f"{self.path / PROVENANCE}: missing the provenance file, which save_pretrained of a loaded model does "
                "not write; use the folder that `compress run` wrote"
            )
        found = read_json(self.path / PROVENANCE, "the provenance file")
        return checked(PROVENANCES, found, f"{self.path / PROVENANCE}")

    def companion(self, name: str) -> Path | None:
        """A recorded file beside the weights: the folder's own, or the base's if a delta shares it with its base.

        None if no such file is recorded, or if the base is needed and was not given; raises ArtifactError if the base's
        file is missing or changed.
        """
        if name in self.provenance["files"]:
            return self.path / name
        known = self.provenance.get("base_files", {}).get(name)
        if known is None or self.base is None:
            return None
        file = self.base.path / name
        if Path(name).name != name or not file.is_file() or digest(file) != known:
            raise ArtifactError(f"{file}: {self.path} shares this file with its base; it was changed or is missing")
        return file

    @cached_property
    def payloads(self) -> dict[str, str]:
        """The keys of the sites' tensors in the files, key -> site."""
        return {key: site for site, spec in self.specs.items() for key in keys(site, spec).values()}

    @cached_property
    def holders(self) -> dict[str, list[str]]:
        """The sites that make up each tensor of the plain model, tensor -> sites in the order of their experts."""
        held: dict[str, list[str]] = {}
        for site, spec in self.specs.items():
            held.setdefault(tensor_of(site, spec), []).append(site)
        return {name: sorted(sites, key=lambda s: self.specs[s].get("expert") or 0) for name, sites in held.items()}

    def changed(self) -> list[str]:
        """The names of the tensors that are stored plainly, sorted; in a delta, they differ from those of its base."""
        return sorted(name for name in self.files if name not in self.payloads)

    def names(self) -> list[str]:
        """The names of the plain model's tensors, sorted; of a delta without its base, only those it stores."""
        return sorted(self.headers)

    def tensor(self, name: str) -> Tensor:
        """One plain tensor; a site's weight is decoded and returned in the model's dtype."""
        sites = self.holders.get(name)
        if sites is None and self.base is not None and name not in self.files:
            return cast_as(self.base.tensor(name), self.headers[name].dtype)
        if sites is None:
            return super().tensor(name)
        if "expert" not in self.specs[sites[0]]:
            return self.matrix(sites[0])
        stack = torch.empty(self.plain[name], dtype=self.dtype)
        for expert, site in enumerate(sites):
            stack[expert] = self.matrix(site)
        return stack

    def entry(self, name: str) -> Entry:
        """A shard entry for one plain tensor, which is read only when it is written."""
        held = self.headers[name]
        return Entry(name=name, make=partial(self.tensor, name), **held._asdict(), nbytes=held.nbytes)

    def shard_of(self, name: str) -> str:
        """The name of the file that holds a plain tensor, or its first expert."""
        sites = self.holders.get(name)
        return self.files[next(iter(keys(sites[0], self.specs[sites[0]]).values())) if sites else name].name

    def matrix(self, site: str) -> Tensor:
        """The decoded matrix of a site in the model's dtype, transposed if the source stores it so."""
        plain = self.expression(site).dense().to(self.dtype)
        return plain.T.contiguous() if self.specs[site]["transposed"] else plain

    def stored(self, site: str) -> dict[str, Tensor]:
        """The stored tensors of a site, by their keys in the file."""
        return {key: self.stored_tensor(key) for key in keys(site, self.specs[site]).values()}

    def expression(self, site: str) -> Weight:
        """The weight expression of a site; raises ArtifactError for a delta whose base was not given."""
        if self.is_delta and self.base is None:
            raise ArtifactError(f"{self.path}: is a delta of {self.pin_name}; give its base")
        return self._unpacked(site, self._base_matrix)

    def difference(self, site: str) -> Weight:
        """What a delta adds to its base at a site."""
        found = self._unpacked(site, self._no_matrix)
        match found:
            case Sum((External(), Weight() as difference)):
                return difference
            case _:
                raise ArtifactError(f"{self.path}: {site} is {found.describe()}, not a difference from a base")

    def difference_form(self, site: str) -> tuple[dict[str, Any], int]:
        """The tree of what a delta adds at a site, and its stored bytes; reads headers only."""
        self.check(site)
        spec = self.specs[site]
        return spec["tree"]["terms"][1], sum(self.stored_headers[key].nbytes for key in keys(site, spec).values())

    def _unpacked(self, site: str, matrix: Callable[[str], Tensor]) -> Weight:
        self.check(site)
        stored, spec = self.stored(site), self.specs[site]
        tensors = {path: stored[key] for path, key in keys(site, spec).items()}
        try:
            return unpack(spec["tree"], tensors, resolve=lambda source, tensor: matrix(site))
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: {site}: {error}") from error

    def check(self, site: str) -> None:
        """Raise ArtifactError unless a site's specification is consistent; reads headers and allocates nothing large.

        The shape must be that of compress.json and of the base; in a delta, the tree must be base + difference.
        """
        tree, tensor = self.specs[site]["tree"], tensor_of(site, self.specs[site])
        said = ", ".join(f"{key} {value}" for key, value in self.specs[site].items() if key in ("expert", "transposed"))
        said = f"{list(tree['shape'])} ({said})"
        try:
            check_claims(tree, tree["shape"])
            check_externals(tree, tensor if self.is_delta else None)
            if self.is_delta or (self.path / PROVENANCE).is_file():
                told = self.provenance["tensors"].get(tensor)
                if not is_part(self.specs[site], told):
                    raise ArtifactError(f"{said} does not fit {tensor}, which is {told} in {PROVENANCE}")
            there = self.base.headers.get(tensor) if self.base is not None else None
            if self.base is not None and not (there and (is_part(self.specs[site], there.shape) or self.grew(site))):
                raise ArtifactError(f"{said} does not fit {tensor}, which is {there and list(there.shape)} in the base")
            self._check_stored(site)
            if site == self.swollen:
                raise ArtifactError(f"all sites denote more than {SWELL} times what {self.path.name} stores")
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: {site}: {error}") from error

    def _check_stored(self, site: str) -> None:
        """Raise ArtifactError unless the files hold a site's tensors as specified, each under a key of its own.

        A key may be shared with another site, which must then own it and not share it from a third.
        """
        spec = self.specs[site]
        named = keys(site, spec)
        paths = [path for path, _, _ in spec["tensors"]]
        if len(set(paths)) < len(paths) or len(set(named.values())) < len(paths) or set(named) != set(paths):
            raise ArtifactError("its tensors do not each have a key of their own")
        if not paths or paths[0] in spec.get("shared", {}):
            raise ArtifactError(
                f"its first tensor must be {named[paths[0]] if paths else 'present'} and belong to it alone"
            )
        for path, dtype, shape in spec["tensors"]:
            key, held = named[path], self.stored_headers.get(named[path])
            told = f"{dtype} of {shape}"
            kind = getattr(torch, dtype, None)
            if held is None or not isinstance(kind, torch.dtype) or (NAMES.get(kind), tuple(shape)) != held[:2]:
                raise ArtifactError(
                    f"{key} is {held and f'{held.dtype} of {list(held.shape)}'} in the file, not {told}"
                )
            if (self.owners.get(key, site) == site) == (path in spec.get("shared", {})):
                raise ArtifactError(f"{key} must belong to one site, from which others may share it")

    @cached_property
    def owners(self) -> dict[str, str]:
        """The keys in the files, key -> the site that owns it rather than sharing it from another."""
        return {
            key: site
            for site, spec in self.specs.items()
            for path, key in keys(site, spec).items()
            if path not in spec.get("shared", {})
        }

    @cached_property
    def swollen(self) -> str:
        """The largest site, if all sites together decode to more bytes than SWELL and SMALL allow; else empty."""
        denoted = {site: 4 * prod(spec["tree"]["shape"]) for site, spec in self.specs.items()}  # decoded in float32
        stored = sum(file.stat().st_size for file in set(self.files.values()))
        return (
            max(denoted, key=lambda site: denoted[site]) if sum(denoted.values()) > max(SMALL, SWELL * stored) else ""
        )

    def grew(self, site: str) -> bool:
        """Whether a delta's table has more rows than its base's and stores at least one bit of code per entry."""
        spec = self.specs[site]
        there = self.base.headers[tensor_of(site, spec)].shape if self.base is not None else ()
        rows, columns = spec["tree"]["shape"]
        if "expert" in spec or spec["transposed"] or there[1:] != (columns,) or rows < there[0]:
            return False
        codes = self.stored_headers.get(keys(site, spec).get("terms.1.codes", ""))
        return (
            spec["tree"]["terms"][1]["kind"] == "quantized" and codes is not None and 8 * codes.nbytes >= rows * columns
        )

    def _no_matrix(self, site: str) -> Tensor:
        """A tensor on the meta device with the shape of a site's base matrix."""
        return torch.empty([int(n) for n in self.specs[site]["tree"]["shape"]], device="meta")

    def _base_matrix(self, site: str) -> Tensor:
        """The base's matrix [out, in] of a site; rows that only the fine-tuned model has are filled with 0."""
        spec, shape = self.specs[site], [int(n) for n in self.specs[site]["tree"]["shape"]]
        if self.base is None:
            raise ArtifactError(f"{self.path}: is a delta of {self.pin_name}; give its base")
        found = self.base.tensor(tensor_of(site, spec)).to(self.dtype)
        found = found if spec.get("expert") is None else found[spec["expert"]]
        return padded(found.T if spec["transposed"] else found, shape[0])

    @cached_property
    def plain(self) -> dict[str, tuple[int, ...]]:
        """The tensors that sites decode to, name -> shape."""
        return plain_shapes(self.specs)

    @cached_property
    def headers(self) -> dict[str, Held]:
        """The dtype and shape of every tensor of the plain model, by name."""
        found = {name: held for name, held in self.stored_headers.items() if name not in self.payloads}
        found |= {name: Held(NAMES[self.dtype], shape) for name, shape in self.plain.items()}
        if self.base is not None:
            told, cast = self.provenance["tensors"], self.provenance.get("cast", {})
            given = {n: self.base.headers[n] for n in told if n not in found and n in self.base}
            found |= {n: Held(cast.get(n, held.dtype), held.shape) for n, held in given.items()}
        return found


def cast_as(tensor: Tensor, dtype: str) -> Tensor:
    """The tensor in the dtype that a safetensors header calls `dtype`; integers stay as they are."""
    wanted = DTYPES.get(dtype)
    return tensor if wanted is None or not tensor.is_floating_point() else tensor.to(wanted)


def is_part(spec: Mapping[str, Any], shape: Sequence[int] | None) -> bool:
    """Whether a site with this specification fits a tensor of this shape, as the whole of it or as one expert."""
    own = tuple(spec["tree"]["shape"])[:: -1 if spec["transposed"] else 1]
    if shape is None or "expert" not in spec:
        return shape is not None and own == tuple(shape)
    return len(shape) == 3 and 0 <= spec["expert"] < shape[0] and own == tuple(shape[1:])


def check_externals(tree: Mapping[str, Any], tensor: str | None) -> None:
    """Raise ArtifactError unless a tree is `tensor` of the base plus a term without the base.

    If `tensor` is None, the whole tree must do without a base.
    """
    inner = [tree]
    if tensor is not None:
        terms = tree.get("terms", ())
        first = [(term["kind"], term.get("source"), term.get("tensor")) for term in terms[:1]]
        if tree["kind"] != "sum" or len(terms) != 2 or first != [("external", BASE, tensor)]:
            raise ArtifactError(f"is not {tensor} of the base plus one difference")
        inner = [terms[1]]
    if any(node.get("kind") == "external" for root in inner for node in nodes(dict(root))):
        raise ArtifactError("refers to a tensor of a base where that is not allowed")


def padded(matrix: Tensor, rows: int) -> Tensor:
    """A matrix with rows of 0 appended until it has `rows` rows."""
    return matrix if len(matrix) >= rows else F.pad(matrix, (0, 0, 0, rows - len(matrix)))


def fingerprint(checkpoint: Checkpoint) -> str:
    """One sha256 of all tensors of a model: names, dtypes, shapes and bytes, independent of how they are sharded.

    Reads the whole model once; the result is cached for as long as the files are unchanged. A change is detected by
    inode, size and the kernel's change time (ctime), because anybody may set a file's modification time.
    """
    shards = [(str(path), path.stat()) for path in sorted(set(checkpoint.files.values()))]
    stamps = tuple((name, found.st_ino, found.st_ctime_ns, found.st_size) for name, found in shards)
    return _fingerprint(checkpoint.path, stamps)


@lru_cache(maxsize=64)
def _fingerprint(path: Path, stamps: tuple[tuple[str, int, int, int], ...]) -> str:
    del stamps
    return content_hash(Checkpoint(path))


def content_hash(checkpoint: Checkpoint) -> str:
    """One sha256 of all tensors of a checkpoint: names, dtypes, shapes and bytes; it holds one tensor at a time."""
    whole = sha256()
    for name, held in sorted(checkpoint.headers.items()):
        whole.update(f"{name} {held.dtype} {list(held.shape)} ".encode())
        for piece in chunks(checkpoint.tensor(name)):
            whole.update(piece)
    return whole.hexdigest()


def is_artifact(path: Path) -> bool:
    """Whether a folder claims to be an artifact; does not check that it is a valid one."""
    config = path / "config.json"
    if not config.is_file():
        return False
    told = read_json(config, "config.json").get("quantization_config")
    return is_plain(path) if told is None else isinstance(told, dict) and told.get("quant_method") == METHOD


def is_plain(path: Path) -> bool:
    """Whether compress.json says that Compress only changed the model's shape and rewrote no site."""
    if not (path / PROVENANCE).is_file():
        return False
    told = read_json(path / PROVENANCE, "the provenance file")
    return bool(told.get("reshaped")) and told.get("sites") == {}


def recorded_base(folder: Path) -> str:
    """The model that an artifact was made from, if it is `builtin`; raises RecipeError if the user must name it."""
    if is_artifact(folder) and (folder / PROVENANCE).is_file():
        name = str(Artifact(folder).provenance.get("source", {}).get("name"))
        if name == "builtin":
            return name
    raise RecipeError(f"--base: give the dense model that {display_name(folder)} was made from")


def check_base(folders: Sequence[Path], base: Path) -> None:
    """Raise ArtifactError if an artifact among `folders` was made from other weights than those of `base`."""
    known = set(Checkpoint(base).digests().values())
    for folder in filter(is_artifact, folders):
        made = set(Artifact(folder).provenance["source"]["sha256"].values())
        if made != known:
            raise ArtifactError(
                f"{folder}: was made from other weights than those of {base}; give the model it was made from as --base"
            )


def base_of(path: Path, given: Path | None = None, builtin: Path | None = None) -> Path | None:
    """The base of a delta: the one given, or the built-in model if that is its base; None if `path` is no delta.

    Raises ArtifactError if the caller must name the base.
    """
    if not is_artifact(path) or not (delta := Artifact(path)).is_delta:
        return None
    if given is not None:
        return given
    if delta.pin_name == "builtin" and builtin is not None:
        return builtin
    raise ArtifactError(f"{path}: is a delta of {delta.pin_name}; give its base, or apply it first")


def seal(told: Mapping[str, Any]) -> str:
    """The sha256 of the content of compress.json without the field `sha256`, which holds it."""
    said = {name: value for name, value in told.items() if name != "sha256"}
    return sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_seal(path: Path, sealed: str | None) -> None:
    """Raise VerificationError if compress.json was changed after it was written.

    `sealed` is None, and nothing is checked, for folders written before there was a seal.
    """
    if sealed is not None and sealed != seal(read_json(path / PROVENANCE, "the provenance file")):
        raise VerificationError(f"{path / PROVENANCE}: its content does not match its own sha256; it was changed")


def verify(path: Path, base: Path | None = None) -> list[str]:
    """Check an artifact, and return one line for each kind of check that it passed.

    Every file must match its recorded sha256, and there must be no other file; every site must decode to finite values;
    every tensor must have the name and shape that it has in the source. Of a delta without its base, only the
    difference is decoded, and names and shapes are not compared.
    Raises VerificationError at the first failure, ArtifactError if the folder is not an artifact.
    """
    artifact = Artifact(path, base)
    recorded = artifact.provenance["files"]
    for name, known in sorted(recorded.items()):
        file = path / name
        if Path(name).name != name or not file.is_file() or digest(file) != known:
            raise VerificationError(f"{file}: its sha256 is not the recorded one; the file was changed or is missing")
    unknown = artifact.specs.keys() - artifact.provenance["sites"].keys()
    if unknown:
        raise VerificationError(f"{path / PROVENANCE}: it has no entry for {sorted(unknown)[0]}")
    there = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    extra = {"config.json", *there} - {PROVENANCE} - recorded.keys()  # a loader may read any such file
    if extra:
        raise VerificationError(f"{path / sorted(extra)[0]} is not a recorded file")
    for site in artifact.specs:
        try:
            alone = artifact.is_delta and base is None
            held = artifact.difference(site) if alone else artifact.expression(site)
            finite = bool(torch.isfinite(held.dense()).all())
        except ArtifactError as error:
            raise VerificationError(str(error)) from error
        except RuntimeError as error:  # torch raises it if stored tensors have dtypes that cannot be combined
            if out_of_memory(error):  # says nothing about the file
                raise
            raise VerificationError(f"{path}: {site} cannot be decoded: {error}") from error
        if not finite:
            raise VerificationError(f"{path}: {site} decodes to values that are not finite")
    check_seal(path, artifact.provenance.get("sha256"))  # last, because the checks above give more specific errors
    checks = [
        f"{len(recorded)} files match their sha256",
        f"{len(artifact.specs)} compressed sites decode to finite values",
    ]
    if artifact.is_delta and base is None:
        return [*checks, "not checked against its base: give --base"]
    shapes = {name: list(shape) for name, shape in artifact.shapes().items()}
    wanted = artifact.provenance["tensors"]
    for name in sorted(set(shapes) | set(wanted)):
        if shapes.get(name) != wanted.get(name):
            raise VerificationError(f"{path}: {name} is {shapes.get(name)}, the source had {wanted.get(name)}")
    return [*checks, f"{len(shapes)} tensors have the names and shapes of the source"]
