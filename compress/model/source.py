"""A checkpoint folder: names, shapes and lazily read tensors; safetensors only, nothing executed.

Every path an index names must stay inside the folder. Tensors are memory-mapped, so opening costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from compress.errors import ArtifactError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
LONGEST_NAME = 255  # bytes of a file name
NUMBERED = re.compile(r"(model|pytorch_model)-\d+-of-\d+\.safetensors")
WIDTHS = {  # bits
    "F4": 4, "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "U16": 16, "I16": 16, "F16": 16,
    "BF16": 16, "U32": 32, "I32": 32, "F32": 32, "U64": 64, "I64": 64, "F64": 64, "C64": 64,
}  # fmt: skip
BUILTIN = Path(__file__).parent.parent / "builtin" / "weights"


def locate(model: str | Path) -> Path:
    """The folder a user means: a path, or `builtin` for the reference model.

    Raises ArtifactError if there is no such folder.
    """
    path = BUILTIN if str(model) == "builtin" else Path(str(model))
    try:
        path = path.expanduser()
        found = bool(str(model)) and (path / "config.json").is_file()
    except (OSError, RuntimeError, ValueError):  # a name too long, an unknown ~user, a NUL
        found = False
    if not found:
        raise ArtifactError(f"no model folder at {str(model)!r}; give a folder with config.json, or `builtin`")
    return path


def display_name(folder: Path) -> str:
    """How a model folder is called in messages and provenance: its name, never where it lies."""
    return "builtin" if folder == BUILTIN else folder.resolve().name


def read_json(path: Path, what: str) -> dict[str, Any]:
    """A JSON object from a file; raises ArtifactError naming it otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ArtifactError(f"{path}: missing {what}") from error
    except (OSError, ValueError, RecursionError) as error:
        raise ArtifactError(f"{path}: {what} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise ArtifactError(f"{path}: {what} must be a JSON object")
    return value


class Held(NamedTuple):
    """What a header says of a tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of its values."""
        return prod(self.shape) * WIDTHS[self.dtype] // 8


class Checkpoint:
    """The tensors of a Hugging Face folder by name, read one at a time."""

    decoded_from = ""  # the format, of a subclass that decodes one

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = read_json(path / "config.json", "config.json")

    @cached_property
    def files(self) -> dict[str, Path]:
        """Tensor name -> the shard that holds it, in sorted order of names.

        Raises ArtifactError for pickled weights, missing shards, or an index that leaves the folder.
        """
        if (self.path / INDEX).exists():
            shards = read_json(self.path / INDEX, "the shard index").get("weight_map")
            if not isinstance(shards, dict) or not shards:
                raise ArtifactError(f"{self.path / INDEX}: no weight_map")
            files = {name: self.inside(str(shard)) for name, shard in sorted(shards.items())}
            self._refuse_strays({path.name for path in files.values()})
            return files
        if (self.path / SINGLE).exists():
            with opened(self.path / SINGLE) as file:
                return dict.fromkeys(sorted(file.keys()), self.path / SINGLE)
        pickled = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in self.path.glob(pattern))
        if pickled:
            raise ArtifactError(
                f"{self.path / pickled[0]}: pickled weights are not read, they can run code; "
                "convert the folder to safetensors first"
            )
        raise ArtifactError(f"{self.path}: no {SINGLE} and no {INDEX}")

    def _refuse_strays(self, known: set[str]) -> None:
        """Raise ArtifactError for a numbered shard that the index does not name: it is of another save."""
        strays = sorted(f.name for f in self.path.glob("*.safetensors") if NUMBERED.fullmatch(f.name))
        extra = [name for name in strays if name not in known]
        if extra:
            raise ArtifactError(
                f"{self.path / extra[0]}: {INDEX} does not name this shard; remove it or mend the index"
            )

    def inside(self, shard: str) -> Path:
        """The path of a shard, checked to be a plain file of this folder."""
        path = self.path / shard
        if Path(shard).name != shard or len(os.fsencode(shard)) > LONGEST_NAME or not path.is_file():
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
        with opened(self.files[name]) as file:
            try:
                found: Tensor = file.get_tensor(name)
            except SafetensorError as error:
                raise ArtifactError(f"{self.files[name]}: cannot read {name!r}: {error}") from error
        return found

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Name -> shape of every tensor, from the headers alone."""
        return {name: held.shape for name, held in self.headers.items()}

    @property
    def headers(self) -> dict[str, Held]:
        """Name -> dtype, shape and bytes of every tensor that `tensor` gives."""
        return self.stored_headers

    @cached_property
    def stored_headers(self) -> dict[str, Held]:
        """Name -> dtype, shape and bytes of every stored tensor, from the headers alone.

        Raises ArtifactError if a shard is damaged, empty, or lacks what the index promises.
        """
        headers: dict[str, Held] = {}
        by_shard: dict[Path, list[str]] = {}
        for name, shard in self.files.items():
            by_shard.setdefault(shard, []).append(name)
        for shard, names in sorted(by_shard.items()):
            with opened(shard) as file:
                held = set(file.keys())
                for name in names:
                    if name not in held:
                        raise ArtifactError(f"{shard}: the index promises {name!r}, the shard lacks it")
                    part = file.get_slice(name)
                    headers[name] = Held(str(part.get_dtype()), tuple(part.get_shape()))
        return headers

    def nbytes(self) -> int:
        """Bytes of all tensors, headers not counted."""
        return sum(held.nbytes for held in self.headers.values())

    def digests(self) -> dict[str, str]:
        """Shard name -> sha256 of its bytes."""
        return dict(self._digests)

    @cached_property
    def _digests(self) -> dict[str, str]:
        return {shard.name: digest(shard) for shard in sorted(set(self.files.values()))}


def opened(path: Path) -> Any:
    """`safe_open`, with damage reported as an ArtifactError."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ArtifactError(f"{path}: not a readable safetensors file: {error}") from error


def digest(path: Path) -> str:
    """sha256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() if hasattr(hashlib, "file_digest") else _digest(path)


def _digest(path: Path) -> str:  # Python 3.10 has no hashlib.file_digest
    sha = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(1 << 20):
            sha.update(part)
    return sha.hexdigest()


def dtype_of(config: dict[str, Any]) -> torch.dtype:
    """The dtype a config names, float32 if it names none."""
    name = str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype):
        raise ArtifactError(f"config.json: unknown dtype {name!r}")
    return found
