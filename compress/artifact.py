"""The output folder: an ordinary Hugging Face folder whose sites are stored as weight expressions.

A recipe that only changes the model's shape stores plain tensors: then config.json names no method, and compress.json
alone says that the folder is ours.
One shard a block. Of every site, one stored tensor keeps the source's own key, `<site>.weight`, in a flat shape;
its companions are `<site>.weight_<path>`. Here it is read and verified; `writer.py` writes it.
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
SWELL = 1 << 12  # bytes that all tensors may denote for one that is stored: 1/256 bit a weight in bfloat16
SMALL = 1 << 30  # bytes that they may denote anyway


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
    """A compressed folder read as the plain model it denotes: sites are decoded on the way out.

    Where that is a delta, what it denotes needs its `base`; without, only what is stored can be read.
    """

    decoded_from = METHOD

    def __init__(self, path: Path, base: Path | None = None) -> None:
        """Raises ArtifactError if the folder is not an artifact, or `base` not the model that it is a delta of."""
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
        told = quantization.get("base")
        self.pin: dict[str, Any] | None = None if told is None else checked(PINS, told, f"{path}: base")
        if base is not None and self.pin is None:
            raise ArtifactError(f"{path}: is a whole model, not a delta; it has no base")
        self.base = None if base is None else self._base(base)

    def _base(self, path: Path) -> Checkpoint:
        """The model that this is a delta of, proved to be it."""
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
        """What the base was called."""
        return str((self.pin or {}).get("name"))

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """compress.json; raises ArtifactError if it is missing or malformed."""
        found = read_json(self.path / PROVENANCE, "the provenance file")
        return checked(PROVENANCES, found, f"{self.path / PROVENANCE}")

    def companion(self, name: str) -> Path | None:
        """A recorded file beside the weights: the folder's own, or the base's where a delta leaves it to that.

        None if the model has none; raises ArtifactError if the base's is not the one that was left to it.
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
        """Key in the file -> the site it belongs to."""
        return {key: site for site, spec in self.specs.items() for key in keys(site, spec).values()}

    @cached_property
    def holders(self) -> dict[str, list[str]]:
        """Tensor of the plain model -> the sites that hold it, in the order of their experts."""
        held: dict[str, list[str]] = {}
        for site, spec in self.specs.items():
            held.setdefault(tensor_of(site, spec), []).append(site)
        return {name: sorted(sites, key=lambda s: self.specs[s].get("expert") or 0) for name, sites in held.items()}

    def changed(self) -> list[str]:
        """The names of the tensors that are stored plainly, sorted; of a delta, those that differ from its base."""
        return sorted(name for name in self.files if name not in self.payloads)

    def names(self) -> list[str]:
        """The names of the plain model's tensors, sorted; of a delta without its base, those it says something of."""
        return sorted(self.headers)

    def tensor(self, name: str) -> Tensor:
        """One plain tensor, decoded and in the model's dtype if it is a site's weight."""
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
        """The stored expression of a site; raises ArtifactError for that of a delta without its base."""
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
        """The specification of what a delta adds at a site, and its stored bytes; reads headers only."""
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
        """Raise ArtifactError unless what is said of a site can be true; reads headers only, so nothing large is made.

        Its shape must be the base's and the one that compress.json has; in a delta its tree must be base + difference.
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
                    raise ArtifactError(f"{said} is not of {tensor}, which is {told} in {PROVENANCE}")
            there = self.base.headers.get(tensor) if self.base is not None else None
            if self.base is not None and not (there and (is_part(self.specs[site], there.shape) or self.grew(site))):
                raise ArtifactError(f"{said} is not of {tensor}, which is {there and list(there.shape)} in the base")
            self._check_stored(site)
            if site == self.swollen:
                raise ArtifactError(f"all sites denote more than {SWELL} times what {self.path.name} stores")
        except ArtifactError as error:
            raise ArtifactError(f"{self.path}: {site}: {error}") from error

    def _check_stored(self, site: str) -> None:
        """Raise ArtifactError unless the files hold what is said of a site's tensors, each under a key of its own.

        A key may be another site's too, which must then not have it from a third.
        """
        spec = self.specs[site]
        named = keys(site, spec)
        paths = [path for path, _, _ in spec["tensors"]]
        if len(set(paths)) < len(paths) or len(set(named.values())) < len(paths) or set(named) != set(paths):
            raise ArtifactError("its tensors and their keys are not one each")
        if not paths or paths[0] in spec.get("shared", {}):
            raise ArtifactError(f"its first tensor must be {named[paths[0]] if paths else 'there'}, its own")
        for path, dtype, shape in spec["tensors"]:
            key, held = named[path], self.stored_headers.get(named[path])
            told = f"{dtype} of {shape}"
            kind = getattr(torch, dtype, None)
            if held is None or not isinstance(kind, torch.dtype) or (NAMES.get(kind), tuple(shape)) != held[:2]:
                raise ArtifactError(
                    f"{key} is {held and f'{held.dtype} of {list(held.shape)}'} in the file, not {told}"
                )
            if (self.owners.get(key, site) == site) == (path in spec.get("shared", {})):
                raise ArtifactError(f"{key} is not one site's own, which others may share")

    @cached_property
    def owners(self) -> dict[str, str]:
        """Key in the file -> the site that holds it and does not have it from another."""
        return {
            key: site
            for site, spec in self.specs.items()
            for path, key in keys(site, spec).items()
            if path not in spec.get("shared", {})
        }

    @cached_property
    def swollen(self) -> str:
        """The largest site, if all together denote more than files of this size can mean; else empty."""
        denoted = {site: 4 * prod(spec["tree"]["shape"]) for site, spec in self.specs.items()}  # decoded in float32
        stored = sum(file.stat().st_size for file in set(self.files.values()))
        return (
            max(denoted, key=lambda site: denoted[site]) if sum(denoted.values()) > max(SMALL, SWELL * stored) else ""
        )

    def grew(self, site: str) -> bool:
        """Whether a table of a delta has more rows than its base's, and stores every entry, as only codes do."""
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
        """The shape of a site's base; of no values."""
        return torch.empty([int(n) for n in self.specs[site]["tree"]["shape"]], device="meta")

    def _base_matrix(self, site: str) -> Tensor:
        """The base's matrix [out, in] of a site; rows that only the fine-tuned model has are 0."""
        spec, shape = self.specs[site], [int(n) for n in self.specs[site]["tree"]["shape"]]
        if self.base is None:
            raise ArtifactError(f"{self.path}: is a delta of {self.pin_name}; give its base")
        found = self.base.tensor(tensor_of(site, spec)).to(self.dtype)
        found = found if spec.get("expert") is None else found[spec["expert"]]
        return padded(found.T if spec["transposed"] else found, shape[0])

    @cached_property
    def plain(self) -> dict[str, tuple[int, ...]]:
        """Tensor -> shape, of those that sites make up."""
        return plain_shapes(self.specs)

    @cached_property
    def headers(self) -> dict[str, Held]:
        """What the plain model's tensors are."""
        found = {name: held for name, held in self.stored_headers.items() if name not in self.payloads}
        found |= {name: Held(NAMES[self.dtype], shape) for name, shape in self.plain.items()}
        if self.base is not None:
            told, cast = self.provenance["tensors"], self.provenance.get("cast", {})
            given = {n: self.base.headers[n] for n in told if n not in found and n in self.base}
            found |= {n: Held(cast.get(n, held.dtype), held.shape) for n, held in given.items()}
        return found


def cast_as(tensor: Tensor, dtype: str) -> Tensor:
    """A tensor in the dtype that a header calls so; integers as they are."""
    wanted = DTYPES.get(dtype)
    return tensor if wanted is None or not tensor.is_floating_point() else tensor.to(wanted)


def is_part(spec: Mapping[str, Any], shape: Sequence[int] | None) -> bool:
    """Whether a site with this specification is a tensor of this shape, or an expert of it."""
    own = tuple(spec["tree"]["shape"])[:: -1 if spec["transposed"] else 1]
    if shape is None or "expert" not in spec:
        return shape is not None and own == tuple(shape)
    return len(shape) == 3 and 0 <= spec["expert"] < shape[0] and own == tuple(shape[1:])


def check_externals(tree: Mapping[str, Any], tensor: str | None) -> None:
    """Raise ArtifactError unless a tree is `tensor` of the base plus what needs no base; for None, all needs none."""
    inner = [tree]
    if tensor is not None:
        terms = tree.get("terms", ())
        first = [(term["kind"], term.get("source"), term.get("tensor")) for term in terms[:1]]
        if tree["kind"] != "sum" or len(terms) != 2 or first != [("external", BASE, tensor)]:
            raise ArtifactError(f"is not {tensor} of the base plus one difference")
        inner = [terms[1]]
    if any(node.get("kind") == "external" for root in inner for node in nodes(dict(root))):
        raise ArtifactError("names a tensor of a base where none may stand")


def padded(matrix: Tensor, rows: int) -> Tensor:
    """A matrix with rows of 0 below, `rows` in all."""
    return matrix if len(matrix) >= rows else F.pad(matrix, (0, 0, 0, rows - len(matrix)))


def fingerprint(checkpoint: Checkpoint) -> str:
    """One sha256 of all tensors of a model: names, dtypes, shapes and bytes, however they are spread over files.

    Reads the model once; then it is remembered for as long as the files stay as they are. Their own dates do not tell,
    which anybody may set, nor does a clock that was set back: the kernel's note of the last change does.
    """
    shards = [(str(path), path.stat()) for path in sorted(set(checkpoint.files.values()))]
    stamps = tuple((name, found.st_ino, found.st_ctime_ns, found.st_size) for name, found in shards)
    return _fingerprint(checkpoint.path, stamps)


@lru_cache(maxsize=64)
def _fingerprint(path: Path, stamps: tuple[tuple[str, int, int, int], ...]) -> str:
    del stamps
    return content_hash(Checkpoint(path))


def content_hash(checkpoint: Checkpoint) -> str:
    """One sha256 of all tensors that a checkpoint gives: names, dtypes, shapes and bytes; they are made one by one."""
    whole = sha256()
    for name, held in sorted(checkpoint.headers.items()):
        whole.update(f"{name} {held.dtype} {list(held.shape)} ".encode())
        for piece in chunks(checkpoint.tensor(name)):
            whole.update(piece)
    return whole.hexdigest()


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
    raise RecipeError(f"--base: name the dense model that {display_name(folder)} was made from")


def check_base(folders: Sequence[Path], base: Path) -> None:
    """Raise ArtifactError if an artifact was made from other weights than those of `base`."""
    known = set(Checkpoint(base).digests().values())
    for folder in filter(is_artifact, folders):
        made = set(Artifact(folder).provenance["source"]["sha256"].values())
        if made != known:
            raise ArtifactError(f"{folder}: was made from other weights than those of {base}; name its own --base")


def base_of(path: Path, given: Path | None = None, builtin: Path | None = None) -> Path | None:
    """The base of a delta: the one given, or the built-in model if that is it; None for what is no delta.

    Raises ArtifactError if it must be named.
    """
    if not is_artifact(path) or not (delta := Artifact(path)).is_delta:
        return None
    if given is not None:
        return given
    if delta.pin_name == "builtin" and builtin is not None:
        return builtin
    raise ArtifactError(f"{path}: is a delta of {delta.pin_name}; give its base, or apply it first")


def seal(told: Mapping[str, Any]) -> str:
    """The sha256 of what compress.json says, but for the field `sha256` that holds it."""
    said = {name: value for name, value in told.items() if name != "sha256"}
    return sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def check_seal(path: Path, sealed: str | None) -> None:
    """Raise VerificationError if compress.json says something else than when it was written.

    Folders written before there was a seal have none.
    """
    if sealed is not None and sealed != seal(read_json(path / PROVENANCE, "the provenance file")):
        raise VerificationError(f"{path / PROVENANCE}: its sha256 is not that of what it says; it was changed")


def verify(path: Path, base: Path | None = None) -> list[str]:
    """What was checked, one line each.

    Every file against its recorded sha256, and none beside them; every site decoded and finite, every name and shape
    against the source's. Of a delta without its base only the difference is decoded, and no shapes are compared.
    Raises VerificationError at the first difference, ArtifactError if the folder is not ours.
    """
    artifact = Artifact(path, base)
    recorded = artifact.provenance["files"]
    for name, known in sorted(recorded.items()):
        file = path / name
        if Path(name).name != name or not file.is_file() or digest(file) != known:
            raise VerificationError(f"{file}: its sha256 is not the recorded one; the file was changed or is missing")
    unknown = artifact.specs.keys() - artifact.provenance["sites"].keys()
    if unknown:
        raise VerificationError(f"{path / PROVENANCE}: it says nothing of {sorted(unknown)[0]}")
    there = {file.name for file in path.iterdir() if not file.name.startswith(".")}
    extra = {"config.json", *there} - {PROVENANCE} - recorded.keys()  # a loader may read any of them
    if extra:
        raise VerificationError(f"{path / sorted(extra)[0]} is not a recorded file")
    for site in artifact.specs:
        try:
            alone = artifact.is_delta and base is None
            held = artifact.difference(site) if alone else artifact.expression(site)
            finite = bool(torch.isfinite(held.dense()).all())
        except ArtifactError as error:
            raise VerificationError(str(error)) from error
        except RuntimeError as error:  # torch, of stored tensors whose dtypes do not go together
            if out_of_memory(error):  # which says nothing about the file
                raise
            raise VerificationError(f"{path}: {site} cannot be decoded: {error}") from error
        if not finite:
            raise VerificationError(f"{path}: {site} decodes to values that are not finite")
    check_seal(path, artifact.provenance.get("sha256"))  # behind the rest, which says better what is wrong
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
