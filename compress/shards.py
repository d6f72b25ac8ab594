"""Writing safetensors files one tensor at a time, so that saving needs no more memory than one tensor.

safetensors' own writer takes all tensors of a file at once and copies each; it also makes files that only their owner
may read (0600, version 0.8). The format is the same: a length, a JSON header, the values.
"""

from __future__ import annotations

import hashlib
import json
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import torch
from torch import Tensor

from compress.errors import VerificationError
from compress.model.source import NAMES, digest

SHARD_SIZE = 5_000_000_000  # bytes, the default of transformers
AT_ONCE = 1 << 22  # values written at once


class WriteError(Exception):
    """A file could not be written; its cause says why."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A tensor to be written: its fields in the header, and `make`, which returns it when it is written."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    make: Callable[[], Tensor]

    @classmethod
    def of(cls, name: str, tensor: Tensor) -> Entry:
        """The entry of a tensor that is in memory."""
        return cls(
            name=name, dtype=NAMES[tensor.dtype], shape=tuple(tensor.shape), nbytes=tensor.nbytes,
            make=partial(torch.Tensor.contiguous, tensor),
        )  # fmt: skip


def split(entries: Iterable[Entry], limit: int) -> Iterator[list[Entry]]:
    """The entries in parts of at most `limit` bytes; a larger entry is a part of its own."""
    part: list[Entry] = []
    size = 0
    for entry in entries:
        if part and size + entry.nbytes > limit:
            yield part
            part, size = [], 0
        part.append(entry)
        size += entry.nbytes
    if part:
        yield part


def header_of(entries: Sequence[Entry]) -> bytes:
    """The header of a file whose values follow in the order of `entries`."""
    fields: dict[str, object] = {"__metadata__": {"format": "pt"}}
    start = 0
    for entry in entries:
        end = start + entry.nbytes
        fields[entry.name] = {"dtype": entry.dtype, "shape": list(entry.shape), "data_offsets": [start, end]}
        start = end
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    return struct.pack("<Q", len(text) + -len(text) % 8) + text + b" " * (-len(text) % 8)


def chunks(tensor: Tensor) -> Iterator[memoryview]:
    """The bytes of a tensor in order, in chunks; for a GPU tensor, each chunk is overwritten by the next."""
    flat = tensor.detach().reshape(-1)
    staged = torch.empty(min(AT_ONCE, len(flat)), dtype=flat.dtype, pin_memory=True) if flat.is_cuda else None
    for part in flat.split(AT_ONCE):
        there = part.cpu().contiguous() if staged is None else staged[: len(part)].copy_(part)
        yield memoryview(there.view(torch.uint8).numpy())  # type: ignore[arg-type]


def write_shard(path: Path, entries: Iterable[Entry]) -> str:
    """Write one safetensors file, readable by everyone, and read it back; returns its sha256.

    Raises WriteError if the disk refuses, VerificationError if the file does not hold what was written.
    """
    return write_tensors(path, entries, reread=True)


def write_tensors(path: Path, entries: Iterable[Entry], *, reread: bool = False) -> str:
    """Write one safetensors file, readable by everyone and flushed to disk; returns its sha256.

    The bytes are hashed while they are written, and with `reread` the file is read back while it is being flushed.
    Raises WriteError if the disk refuses, VerificationError if a tensor is not what its entry announced or the file
    does not hold what was written.
    """
    ordered = sorted(entries, key=lambda e: (-e.nbytes // max(1, prod(e.shape)), e.name))  # wide dtypes first: aligned
    sha = hashlib.sha256()
    try:
        with path.open("r+b" if path.exists() else "wb") as file, ThreadPoolExecutor(1) as aside:
            for piece in pieces(ordered):
                hashed = aside.submit(sha.update, piece)
                file.write(piece)
                hashed.result()
            file.truncate()
            file.flush()
            again = aside.submit(digest, path) if reread else None
            os.fchmod(file.fileno(), 0o644)
            os.fsync(file.fileno())
            found = again.result() if again else sha.hexdigest()
    except OSError as error:
        raise WriteError(str(path)) from error
    if found != sha.hexdigest():
        raise VerificationError(f"{path.name}: what is read back differs from what was written")
    return found


def pieces(entries: Sequence[Entry]) -> Iterator[bytes | memoryview]:
    """The content of a file in order; each tensor is made when it is reached and freed afterwards."""
    yield header_of(entries)
    for entry in entries:
        tensor = entry.make()
        if tensor.nbytes != entry.nbytes or NAMES[tensor.dtype] != entry.dtype:
            raise VerificationError(
                f"{entry.name}: {tensor.dtype} of {tensor.nbytes} bytes, but {entry.nbytes} were announced"
            )
        if tensor.nbytes:
            yield from chunks(tensor)
        del tensor
