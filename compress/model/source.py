"""A checkpoint folder: names, shapes and lazily read tensors; only safetensors is read, and no code is executed.

Every path that an index names must stay inside the folder. Tensors are memory-mapped, so opening a checkpoint reads
only headers.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import ArtifactError, pass_on_memory, visible, why

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"  # of PEFT
META = "__metadata__"
LONGEST_NAME = 255  # bytes of a file name
READERS = min(16, os.cpu_count() or 1)  # files that are read or written in parallel
AT_ONCE = 1 << 22  # bytes hashed and checked at once; with smaller chunks, threads wait for each other
LARGEST = 1 << 28  # bytes of a JSON file; a config.json with 100,000 compressed matrices has a quarter of that
DEEPEST = 100  # levels of a JSON value; the deepest tree of a weight has a fifth of that
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")  # such as org/name
NUMBERED = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.safetensors")
WIDTHS = {  # bits of one value
    "F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
NAMES = {  # dtypes by their names in a safetensors header
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.int16: "I16", torch.uint16: "U16",
    torch.int32: "I32", torch.uint32: "U32", torch.int64: "I64", torch.uint64: "U64", torch.float16: "F16",
    torch.bfloat16: "BF16", torch.float32: "F32", torch.float64: "F64", torch.complex64: "C64",
    torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.float8_e8m0fnu: "F8_E8M0",
}  # fmt: skip
DTYPES = {name: kind for kind, name in NAMES.items()}
FLOATS = {  # the integer type of a float's width, and its exponent mask: all of these bits are 1 in NaN and infinity
    "F16": (np.int16, 0x7C00), "BF16": (np.int16, 0x7F80), "F32": (np.int32, 0x7F800000),
    "F64": (np.int64, 0x7FF0000000000000),
}  # fmt: skip
VOCABULARIES = (  # files beside the weights, of which a tokenizer has at least one
    "tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
    "tekken.json",
)  # fmt: skip
BUILTIN = Path(__file__).parent.parent / "builtin" / "weights"
T = TypeVar("T")


def locate(model: str | Path) -> Path:
    """The model folder that a user names: a path, or `builtin` for the built-in reference model.

    Raises ArtifactError if it is not a folder with a config.json.
    """
    path = BUILTIN if str(model) == "builtin" else Path(str(model))
    try:
        path = path.expanduser()
        found, there = bool(str(model)) and (path / "config.json").is_file(), path.is_dir()
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown ~user, a NUL
        found = there = False
    if not found and there and (path / ADAPTER).is_file():
        raise ArtifactError(
            f"{path}: is an adapter; give its base here, or make a delta of it with `compress delta import`"
        )
    if not found:
        hint = "nothing is downloaded: " if HUB_ID.fullmatch(str(model)) and not there else ""
        raise ArtifactError(f"no model folder at {str(model)!r}; {hint}give a folder with config.json, or `builtin`")
    return path


def display_name(folder: Path) -> str:
    """The name of a model folder for messages and provenance, without its path; unprintable characters are escaped."""
    whole = folder.resolve()
    if whole.parent.name == "snapshots" and whole.parent.parent.name.startswith("models--"):  # of a hub's cache
        return visible(whole.parent.parent.name.split("--", 2)[-1])
    return "builtin" if folder == BUILTIN else visible(whole.name)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in a file; raises ArtifactError, naming the file, if there is none.

    Duplicate keys are refused, because readers differ in which one they take. Size and depth are limited.
    """
    try:
        if path.exists() and not path.is_file():
            raise ArtifactError(f"{path}: {what} is not a regular file")
        if path.stat().st_size > LARGEST:
            raise ArtifactError(f"{path}: {what} is larger than {LARGEST:,} bytes")
        value = strict_json(path.read_bytes())
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        pass_on_memory(error)
        raise ArtifactError(f"{path}: {what} cannot be read: {why(error)}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: {what} must be a JSON object")
    return value


def strict_json(content: bytes) -> Any:
    """A JSON value; raises ValueError for anything else, a duplicate key, or too many levels."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            twice, most = Counter(name for name, _ in pairs).most_common(1)[0]
            raise ValueError(f"the key {twice!r} stands {'twice' if most == 2 else f'{most} times'}")
        return found

    value = json.loads(content.decode("utf-8"), object_pairs_hook=unique)
    level: list[Any] = [[value]]
    depth = 0
    while level:
        if depth > DEEPEST:
            raise ValueError(f"it is nested deeper than {DEEPEST}")
        values = (v for node in level for v in (node.values() if isinstance(node, dict) else node))
        level, depth = [v for v in values if isinstance(v, (dict, list))], depth + 1
    return value


class Held(NamedTuple):
    """A tensor's entry in a safetensors header: dtype and shape."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """The bytes of its values."""
        return prod(self.shape) * WIDTHS[self.dtype] // 8


class Shard:
    """One safetensors file, whose header is read only once; the library reads it every time it opens the file."""

    def __init__(self, path: Path) -> None:
        """Raises ArtifactError if the file is damaged, or names a tensor twice."""
        with opened(path):  # the library checks everything else
            self.path, self._state = path, state_of(path)
        self._begin, self._told = header_of(path)
        self.held = {name: Held(told["dtype"], tuple(told["shape"])) for name, told in self._told.items()}

    def span(self, name: str) -> tuple[int, int]:
        """The byte offsets in the file at which this tensor starts and ends."""
        start, end = self._told[name]["data_offsets"]
        return self._begin + start, self._begin + end

    def tensor(self, name: str) -> Tensor:
        """One tensor in a memory map of its own, which keeps neither other tensors in memory nor the file open.

        Raises ArtifactError if the file has no such tensor, can no longer be read, or has changed since it was opened.
        """
        if name not in self.held:
            raise ArtifactError(f"{self.path}: cannot read {name!r}: the file has no such tensor")
        (start, end), (dtype, shape) = self.span(name), self.held[name]
        try:
            if state_of(self.path) != self._state:
                raise ArtifactError(f"{self.path}: cannot read {name!r}: the file was changed since it was opened")
            if dtype not in DTYPES:
                with opened(self.path) as file:
                    found: Tensor = file.get_tensor(name)
                return found
            if start == end:
                return torch.empty(shape, dtype=DTYPES[dtype])
            whole = torch.from_file(str(self.path), shared=False, size=end, dtype=torch.uint8, device="cpu")
        except (SafetensorError, OSError, ValueError, RuntimeError) as error:
            pass_on_memory(error)
            raise ArtifactError(f"{self.path}: cannot read {name!r}: {why(error)}") from error
        alone = torch.from_numpy(whole.numpy()[start:end])  # its storage has only its size, so a copy is no larger
        return alone.view(DTYPES[dtype]).reshape(shape)


class Checkpoint:
    """The tensors of a Hugging Face folder by name, read one at a time."""

    decoded_from = ""  # the format, of a subclass that decodes one

    def __init__(self, path: Path) -> None:
        """Raises ArtifactError for a folder without a config, or with a link to a file outside the folder."""
        self.path = path
        self.config = read_json(path / "config.json", "config.json")
        check_links(path)

    @cached_property
    def files(self) -> dict[str, Path]:
        """The shard that holds each tensor, by tensor name, sorted.

        Raises ArtifactError for pickled weights, missing or stray shards, or an index that leads out of the folder.
        """
        if (self.path / INDEX).exists():
            shards = read_json(self.path / INDEX, "the shard index").get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ArtifactError(f"{self.path / INDEX}: no weight_map")
            files = {name: self.inside(str(shard)) for name, shard in sorted(shards.items())}
            self._refuse_strays({path.name for path in files.values()})
            return visible_names(files, self.path / INDEX)
        if (self.path / SINGLE).is_file():  # not a pipe, which could block forever
            held = dict.fromkeys(sorted(self._shard(self.path / SINGLE).held), self.path / SINGLE)
            return visible_names(held, self.path / SINGLE)
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(pattern))
        if pickled:
            raise ArtifactError(
                f"{self.path / pickled[0]}: pickled weights can run code and are not read; "
                "convert the folder to safetensors first"
            )
        raise ArtifactError(f"{self.path}: no {SINGLE} and no {INDEX}")

    def _refuse_strays(self, known: set[str]) -> None:
        """Raise ArtifactError for a file of weights that the index does not name: it belongs to another save."""
        if SINGLE not in known and (self.path / SINGLE).is_file():
            raise ArtifactError(
                f"{self.path}: {SINGLE} and {INDEX} are two saves, and transformers reads the first; remove one of them"
            )
        strays = sorted(f.name for f in self.path.glob("*.safetensors") if NUMBERED.fullmatch(f.name))
        extra = [name for name in strays if name not in known]
        if extra:
            raise ArtifactError(f"{self.path / extra[0]}: {INDEX} does not name this shard; remove it or fix the index")

    def inside(self, shard: str) -> Path:
        """The path of a shard; raises ArtifactError unless it is a file of this folder."""
        path = self.path / shard
        named = Path(shard).name == shard and shard.isprintable() and len(os.fsencode(shard)) <= LONGEST_NAME
        if not named or not path.is_file():
            raise ArtifactError(f"{self.path / INDEX}: shard {shard!r} is not a file of this folder")
        return path

    def names(self) -> list[str]:
        """All tensor names, sorted."""
        return list(self.files)

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def tensor(self, name: str) -> Tensor:
        """One tensor, memory-mapped; raises ArtifactError if it is absent or its shard is damaged."""
        return self.stored_tensor(name)

    def stored_tensor(self, name: str) -> Tensor:
        """One tensor as the file holds it, memory-mapped."""
        if name not in self.files:
            raise ArtifactError(f"{self.path}: no tensor {name!r}")
        return self._shard(self.files[name]).tensor(name)

    @cached_property
    def _shards(self) -> dict[Path, Shard]:
        """The shards whose header has been read, by path."""
        return {}

    def _shard(self, path: Path) -> Shard:
        if path not in self._shards:
            self._shards[path] = Shard(path)
        return self._shards[path]

    def ahead(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors ahead, if it accepts such hints."""
        if not hasattr(os, "posix_fadvise"):
            return
        by_shard: dict[Path, list[str]] = {}
        for name in names:
            if name in self.files and name in self._shard(self.files[name]).held:
                by_shard.setdefault(self.files[name], []).append(name)
        for path, held in by_shard.items():
            with suppress(OSError), path.open("rb") as file:  # it is only a hint
                for start, end in map(self._shard(path).span, held):
                    os.posix_fadvise(file.fileno(), start, end - start, os.POSIX_FADV_WILLNEED)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of every tensor by name, from the headers alone."""
        return {name: held.shape for name, held in self.headers.items()}

    @property
    def headers(self) -> dict[str, Held]:
        """The dtype and shape of every tensor that `tensor` returns, by name."""
        return self.stored_headers

    @cached_property
    def stored_headers(self) -> dict[str, Held]:
        """The dtype and shape of every stored tensor by name, from the headers alone.

        Raises ArtifactError if a shard is damaged, empty, or lacks what the index promises.
        """
        headers: dict[str, Held] = {}
        by_shard: dict[Path, list[str]] = {}
        for name, shard in self.files.items():
            by_shard.setdefault(shard, []).append(name)
        for path, names in sorted(by_shard.items()):
            held = self._shard(path).held
            for name in names:
                if name not in held:
                    raise ArtifactError(f"{path}: the index lists {name!r}, but the shard lacks it")
                headers[name] = held[name]
                if headers[name].dtype not in WIDTHS:
                    raise ArtifactError(f"{path}: {name} holds {headers[name].dtype}, which is not supported")
        return headers

    def nbytes(self) -> int:
        """The bytes of all tensors, without headers."""
        return sum(held.nbytes for held in self.headers.values())

    def digests(self) -> dict[str, str]:
        """The sha256 of each shard, by its name."""
        return dict(self._digests)

    def unsound(self) -> frozenset[str]:
        """The stored floating-point tensors of 16 bits or more that hold NaN or infinite values.

        Reads every shard once; the same read computes the hashes, so `digests` costs nothing afterwards.
        """
        return self._unsound

    @cached_property
    def _digests(self) -> dict[str, str]:
        return dict(self._of_shards(digest))

    @cached_property
    def _unsound(self) -> frozenset[str]:
        found = dict(self._of_shards(read_through))
        self.__dict__["_digests"] = {shard: sha for shard, (sha, _) in found.items()}
        return frozenset(name for name, shard in self.files.items() if name in found[shard.name][1])  # not of a copy

    def _of_shards(self, read: Callable[[Path], T]) -> Iterator[tuple[str, T]]:
        """The name of each shard and the result of `read` on it, by several threads; `read` should release the GIL."""
        shards = sorted(set(self.files.values()))
        with ThreadPoolExecutor(READERS) as readers:
            yield from zip((shard.name for shard in shards), readers.map(read, shards), strict=True)


def check_links(folder: Path) -> None:
    """Raise ArtifactError if a link in a folder leads to a file outside it.

    The target would be read, and copied beside the result, as if it belonged to what the folder holds.
    """
    for link in sorted(file for file in folder.iterdir() if file.is_symlink() and file.is_file()):
        if leaves(link):
            raise ArtifactError(f"{link}: links out of the folder; put the file itself there")


def leaves(link: Path) -> bool:
    """Whether a link leads out of its folder, other than into the cache where huggingface_hub keeps snapshot files."""
    target = link.resolve()
    cached = target.parent.name == "blobs" and target.parent.parent.name.startswith("models--")
    return not cached and target.parent != link.parent.resolve()


def visible_names(files: dict[str, Path], where: Path) -> dict[str, Path]:
    """The same mapping; raises ArtifactError if a tensor name holds unprintable characters."""
    for name in files:
        if visible(name) != name:
            raise ArtifactError(f"{where}: the tensor name {name!r} contains unprintable characters")
    return files


def opened(path: Path) -> Any:
    """`safe_open`, with damage reported as an ArtifactError."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        pass_on_memory(error)
        raise ArtifactError(f"{path}: not a readable safetensors file: {error}") from error


def stored_share(headers: Mapping[str, Any], tensor: str, entries: int) -> int | None:
    """The bytes of so many entries of a stored tensor, of which they may be a part; None without such a tensor."""
    held = headers.get(tensor)
    return None if held is None else int(held.nbytes) * entries // max(1, prod(held.shape))


def state_of(path: Path) -> tuple[int, int, int]:
    """Inode, change time and size of a file: one of them changes if it is written or replaced, whatever its dates."""
    state = path.stat()
    return state.st_ino, state.st_ctime_ns, state.st_size


def digest(path: Path) -> str:
    """The sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(path)


def header_of(path: Path) -> tuple[int, dict[str, Any]]:
    """The offset at which values begin in a safetensors file, and the header's entry of each tensor.

    The library must have checked the file. Raises ArtifactError if the header names a tensor twice, which the library
    does not report: it keeps the last.
    """
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            told = strict_json(file.read(length))
        except ValueError as error:
            raise ArtifactError(f"{path}: not a readable safetensors file: its header: {error}") from error
    return 8 + length, {name: held for name, held in told.items() if name != META}


def read_through(path: Path) -> tuple[str, set[str]]:
    """The sha256 of a safetensors file and the names of its tensors with NaN or infinite values, in a single read."""
    sha, unsound = hashlib.sha256(), set[str]()
    room, other = memoryview(bytearray(AT_ONCE)), np.empty(AT_ONCE, np.uint8)
    with path.open("rb") as file:

        def pieces(size: int) -> Iterator[memoryview]:
            while size and (length := file.readinto(room[: min(size, AT_ONCE)])):
                sha.update(room[:length])
                size -= length
                yield room[:length]

        begin, told = header_of(path)
        held = sorted((tensor["data_offsets"], name, tensor["dtype"]) for name, tensor in told.items())
        for _ in pieces(begin):
            pass
        place = 0
        for (start, end), name, kind in held:
            if start < place:
                raise ArtifactError(f"{path}: not a readable safetensors file: {name!r} overlaps another tensor")
            for _ in pieces(start - place):
                pass
            sound = [finite(piece, kind, other) for piece in pieces(end - start)]
            unsound |= set() if all(sound) else {name}
            place = end
        for _ in pieces(sys.maxsize):
            pass
    return sha.hexdigest(), unsound


def finite(piece: memoryview, kind: str, room_B: np.ndarray) -> bool:
    """Whether all values are finite, found from their bits; other types than FLOATS count as finite.

    `room_B` is scratch space and is overwritten.
    """
    if kind not in FLOATS or not len(piece):
        return True
    word, exponent = FLOATS[kind]
    words_N = np.frombuffer(piece, word)
    magnitudes_N = np.bitwise_and(words_N, np.iinfo(words_N.dtype).max, out=room_B.view(word)[: len(words_N)])
    return bool(magnitudes_N.max() < exponent)


def _digest(path: Path) -> str:  # Python 3.10 has no hashlib.file_digest
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            sha.update(part)
    return sha.hexdigest()


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """The dtype that a config names, float32 if it names none; raises ArtifactError if torch does not know it."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"config.json: unknown dtype {name!r}")
    return found
