"""Writing an artifact: block by block into a folder beside OUT, verified, then renamed into place.

Nothing written depends on time, place or speed: the same run writes the same bytes.
"""

from __future__ import annotations

import errno
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import METHOD, PROVENANCE, VERSION, Artifact, is_artifact, keys, seal
from compress.errors import ArtifactError, VerificationError
from compress.model.source import ADAPTER, INDEX, Shard, digest, leaves
from compress.partial import beside, exchange, flush
from compress.shards import Entry, WriteError, split, write_shard
from compress.weights import Dense, External, Weight, pack, specify, unpack
from compress.weights.pack import SMALLEST

COPIED = (".json", ".txt", ".model", ".jinja")  # tokenizer and generation files of the source
REFUSING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)  # errors of a disk that does not take the data
NOTICES = ("LICENSE", "LICENCE", "NOTICE", "USE_POLICY")
LONGEST_NOTICE = 1 << 20  # bytes; a longer file is not a licence text and is not copied
NOT_COPIED = (
    "config.json", INDEX, PROVENANCE,
    ADAPTER,  # beside whole weights, transformers would look for an adapter
)  # fmt: skip
PICTURE = "ledger.svg"


@dataclass(frozen=True, kw_only=True)
class Stored:
    """A rewritten site and the source tensor it comes from, of which it may be one `expert`."""

    weight: Weight
    tensor: str
    transposed: bool = False
    inputs: str = ""  # the format that the module rounds its input to; empty for none
    expert: int | None = None
    part: bool = False  # whether it is part of a stack in the model; the file may hold it alone


def site_spec(site: str, stored: Stored, packed: Mapping[str, Tensor]) -> dict[str, Any]:
    """The specification of a site in config.json: the tree, (path, dtype, shape) of each tensor, and its place.

    The tensors are a list, because transformers sorts the keys of a config that it saves, and the first tensor must
    remain the one that keeps the source's key.
    """
    tensors = [[p, str(t.dtype).removeprefix("torch."), list(t.shape)] for p, t in packed.items()]
    weight = stored.weight
    spec: dict[str, Any] = {"tree": specify(weight), "tensors": tensors, "name": weight.describe()}
    spec["transposed"] = stored.transposed
    if stored.tensor != f"{site}.weight":
        spec["tensor"] = stored.tensor
    if stored.inputs:
        spec["inputs"] = stored.inputs
    if stored.expert is not None:
        spec["expert"] = stored.expert
    return spec


@dataclass(kw_only=True)
class Part:
    """What was written, at once or in total: shards with their hashes, keys, and specifications; `size` in bytes."""

    digests: dict[str, str] = field(default_factory=dict)  # file -> sha256
    weight_map: dict[str, str] = field(default_factory=dict)  # key -> file
    specs: dict[str, Any] = field(default_factory=dict)
    size: int = 0

    def take(self, other: Part) -> None:
        """Add the content of another part."""
        self.digests |= other.digests
        self.weight_map |= other.weight_map
        self.specs |= other.specs
        self.size += other.size


@dataclass(frozen=True, kw_only=True)
class Packed:
    """What will be written at once: entries, the packed tensors of rewritten sites, and their leaves in a base."""

    entries: list[Entry]
    meant: dict[str, dict[str, Tensor]]
    bases: dict[str, list[External]]
    specs: dict[str, Any]
    spared: dict[str, int]  # bytes of a site that are stored only under another site's keys

    @property
    def size(self) -> int:
        """The bytes of all tensors."""
        return sum(entry.nbytes for entry in self.entries)

    def nbytes(self, site: str, weight: Weight) -> int:
        """The bytes that a site adds to the file, without those that it shares from another site."""
        return weight.nbytes() - self.spared.get(site, 0)


class ArtifactWriter(Part):
    """Writes OUT block by block into the folder `partial`, which the caller owns; `commit` puts it in place.

    A shard holds tensors of at most one block and at most `shard_size` bytes, unless a single tensor is larger.
    """

    def __init__(self, out: Path, shard_size: int, partial: Path) -> None:
        super().__init__()
        self.out, self.shard_size, self.partial = out, shard_size, partial

    def add(self, sites: Mapping[str, Stored], plain: Iterable[Entry]) -> Part:
        """Write rewritten sites and untouched tensors, read them back and compare; returns what was added.

        Raises VerificationError if a file does not hold what was meant.
        """
        return self.write(self.pack(sites, plain))

    def pack(self, sites: Mapping[str, Stored], plain: Iterable[Entry]) -> Packed:
        """Pack rewritten sites, together with untouched tensors, to be written later.

        Rewritten weights are held packed, plain ones and a delta's base as they are: these must not be changed until
        `write` has returned.
        """
        entries, packed = list(plain), {}
        known: dict[Any, str] = {}
        specs: dict[str, Any] = {}
        spared: dict[str, int] = {}
        for site, stored in sites.items():
            if isinstance(stored.weight, Dense) and not stored.part:
                kept = stored.weight.data.T if stored.transposed else stored.weight.data
                entries.append(Entry.of(stored.tensor, kept))
                continue
            packed[site] = pack(stored.weight)
            specs[site] = spec = site_spec(site, stored, packed[site])
            shared = {} if stored.part else share(packed[site], keys(site, spec), known)
            entries += [
                Entry.of(key, packed[site][path]) for path, key in keys(site, spec).items() if path not in shared
            ]
            if shared:
                spec["shared"] = shared
                spared[site] = sum(packed[site][path].nbytes for path in shared)
        bases = {site: externals(sites[site].weight) for site in packed}
        return Packed(entries=entries, meant=packed, bases=bases, specs=specs, spared=spared)

    def write(self, packed: Packed) -> Part:
        """Write what was packed, read it back and compare; returns what was added.

        Raises VerificationError if a file does not hold what was meant.
        """
        added = Part(specs=packed.specs, size=packed.size)
        for i, part in enumerate(split(packed.entries, self.shard_size), len(self.digests) + 1):
            path = self.partial / f"part-{i:05d}.safetensors"
            added.digests[path.name] = write_shard(path, part)
            added.weight_map |= {entry.name: path.name for entry in part}
        self.take(added)
        self._check(packed, added)
        return added

    def _check(self, packed: Packed, added: Part) -> None:
        """Decode each site from its file; raises VerificationError unless it packs to the bytes that were meant."""
        shards = {name: Shard(self.partial / name) for name in added.digests}
        for site, meant in packed.meant.items():
            device = next(iter(meant.values())).device  # decode where the weights are, which may be a GPU
            stored = {
                p: shards[added.weight_map[key]].tensor(key).to(device)
                for p, key in keys(site, self.specs[site]).items()
            }
            again = pack(unpack(self.specs[site]["tree"], stored, resolve=partial(base_in, packed.bases[site])))
            if any(not torch.equal(as_bytes(again[p]), as_bytes(t)) for p, t in meant.items()):
                raise VerificationError(f"{site} decodes to other values than were to be stored")

    def _number(self) -> None:
        """Give the shards their final names, now that their number is known."""
        names = {old: f"model-{i:05d}-of-{len(self.digests):05d}.safetensors" for i, old in enumerate(self.digests, 1)}
        for old, new in names.items():
            (self.partial / old).rename(self.partial / new)
        self.digests = {names[old]: sha for old, sha in self.digests.items()}
        self.weight_map = {key: names[old] for key, old in self.weight_map.items()}

    def describe(
        self,
        source: Path,
        config: Mapping[str, Any],
        provenance: Mapping[str, Any],
        card: str,
        kv: Mapping[str, Any] | str | None = None,
        pin: Mapping[str, str] | None = None,
        base: Path | None = None,
        picture: str = "",
        over: Path | None = None,
    ) -> None:
        """Write everything but the weights; without rewritten sites, config.json names no quantization method.

        `kv` is how the loaded model keeps its key-value cache. A delta names its base by `pin`, and files that are
        identical in the folder `base` are left out. `picture` is the SVG of the ledger; empty for none. Companion files
        in the folder `over` replace the source's of the same name.
        """
        self._number()
        shared = copy_companions(source, self.partial, base, over)
        index = {"metadata": {"total_size": self.size}, "weight_map": dict(sorted(self.weight_map.items()))}
        write_json(self.partial / INDEX, index, small=bool(pin))
        quantization = {"quant_method": METHOD, "version": VERSION, "weights": self.specs}
        quantization |= {"kv": kv} if kv else {}
        quantization |= {"base": dict(pin)} if pin else {}
        named = {"quantization_config": quantization} if provenance["sites"] or pin else {}
        write_json(self.partial / "config.json", {**config, **named}, small=bool(pin))
        (self.partial / "README.md").write_text(card, encoding="utf-8")
        if picture:
            (self.partial / PICTURE).write_text(picture, encoding="utf-8")
        others = {f.name: digest(f) for f in sorted(self.partial.iterdir()) if f.name not in self.digests}
        files = {**self.digests, **others}
        told = {**provenance, **({"base_files": shared} if pin else {}), "files": files}
        write_json(self.partial / PROVENANCE, {**told, "sha256": seal(told)}, small=bool(pin))

    def commit(self) -> None:
        """Flush every file and rename the folder into place; an earlier folder is deleted last, or kept on failure."""
        for path in (*self.partial.iterdir(), self.partial):
            flush(path)
        exchange(self.partial, self.out)


@contextmanager
def writing(out: Path, shard_size: int) -> Iterator[ArtifactWriter]:
    """A writer in a temporary folder that is removed at the end; a failed write becomes an ArtifactError."""
    with beside(out) as folder:
        writer = ArtifactWriter(out, shard_size, folder / "artifact")
        try:
            writer.partial.mkdir()
            yield writer
        except (OSError, WriteError) as error:
            if refused := refusal(out, error):
                raise refused from error
            raise


def refusal(out: Path, error: BaseException) -> ArtifactError | None:
    """The ArtifactError to raise if `error` means that the disk refused the data; None for any other error."""
    if isinstance(error, WriteError):
        return ArtifactError(f"{out}: cannot be written: {error.__cause__}")
    if isinstance(error, OSError) and error.errno in REFUSING:
        return ArtifactError(f"{out}: cannot be written: {error}")
    return None


def externals(weight: Weight) -> list[External]:
    """The leaves of a weight expression that refer to a base model: itself, or its children."""
    return [leaf for leaf in (weight, *weight.children()) if isinstance(leaf, External)]


def base_in(found: Iterable[External], source: str, tensor: str) -> Tensor:
    """The base model's matrix of this name among the leaves; raises ArtifactError if there is none."""
    for leaf in found:
        if (leaf.source, leaf.tensor) == (source, tensor):
            return leaf.data
    raise ArtifactError(f"the weight to write does not refer to {tensor} of {source}")


def share(packed: Mapping[str, Tensor], names: Mapping[str, str], known: dict[Any, str]) -> dict[str, str]:
    """Find duplicates: path -> key of each of these tensors that `known` already has; the others are added to it.

    The first tensor is never shared, because its key must be the site's own, nor is one below SMALLEST bytes, whose
    entry in a header would be as large.
    """
    found: dict[str, str] = {}
    for path, tensor in list(packed.items())[1:]:
        if tensor.nbytes >= SMALLEST:
            content = sha256(as_bytes(tensor.cpu()).numpy().tobytes()).digest()
            key = known.setdefault((tensor.dtype, tuple(tensor.shape), content), names[path])
            if key != names[path]:
                found[path] = key
    return found


def copy_companions(source: Path, target: Path, base: Path | None = None, over: Path | None = None) -> dict[str, str]:
    """Copy tokenizer, generation and licence files; never code, weights or what the target writes itself.

    Files in the folder `over` replace the source's of the same name. Files that the folder `base` has byte for byte are
    not copied; their sha256 is returned by name. If `source` is itself an artifact, which may come from an untrusted
    place, only its recorded files are copied, and a link that leads out of the folder raises ArtifactError.
    """
    recorded = Artifact(source).provenance["files"] if is_artifact(source) else None
    shared: dict[str, str] = {}
    files = {file.name: file for folder in (source, over) if folder for file in folder.iterdir()}
    for _, file in sorted(files.items()):
        if not is_companion(file.name) or not file.is_file() or (recorded is not None and file.name not in recorded):
            continue
        if file.name.upper().startswith(NOTICES) and file.stat().st_size > LONGEST_NOTICE:
            continue
        if recorded is not None and leaves(file):
            raise ArtifactError(f"{file}: links out of the folder; put the file itself there")
        if base is not None and same_file(file, base / file.name):
            shared[file.name] = digest(file)
        else:
            copy(file, target)
    return shared


def copy_shared(delta: Artifact, target: Path) -> None:
    """Copy the companion files that a delta shares with its base.

    Raises ArtifactError if the base's file has changed or is missing, or if a name is not that of a companion file.
    """
    for name in sorted(delta.provenance.get("base_files", {})):
        file = delta.companion(name)
        if file is None or not is_companion(name):
            raise ArtifactError(
                f"{delta.path / PROVENANCE}: base_files names {name!r}, which cannot be taken from a base"
            )
        copy(file, target)


def is_companion(name: str) -> bool:
    """Whether a file of this name belongs beside the weights in any format (tokenizer, generation, licence)."""
    licence = name.upper().startswith(NOTICES)
    wanted = Path(name).suffix in COPIED and name not in NOT_COPIED and not name.endswith("index.json")
    return wanted or licence


def copy(file: Path, target: Path) -> None:
    """Copy a file into a folder; raises WriteError if the disk refuses."""
    try:
        shutil.copyfile(file, target / file.name)
    except OSError as error:
        raise WriteError(str(target / file.name)) from error


def same_file(one: Path, other: Path) -> bool:
    """Whether two files hold the same bytes; reads them only if their sizes are equal."""
    alike = other.is_file() and one.stat().st_size == other.stat().st_size
    return alike and digest(one) == digest(other)


def write_json(path: Path, value: Any, small: bool = False) -> None:
    """Write JSON, indented for readers or, if `small`, without whitespace; raises WriteError if the disk refuses."""
    form: dict[str, Any] = {"separators": (",", ":")} if small else {"indent": 1}
    try:
        path.write_text(json.dumps(value, ensure_ascii=False, **form) + "\n", encoding="utf-8")
    except OSError as error:
        raise WriteError(str(path)) from error


def as_bytes(tensor: Tensor) -> Tensor:
    """The tensor's bytes as uint8, so that NaN compares equal to itself."""
    return tensor.contiguous().reshape(-1).view(torch.uint8)
