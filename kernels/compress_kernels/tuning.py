"""Tuning profiles: the path measured as fastest on this machine, by op, format, size and number of rows.

A profile is one JSON file for each device and version of torch, in the user's cache folder; without one, the defaults
in each kernel's module apply. On a CPU it is read when a weight is lowered; on a GPU a product looks its choice up, and
that is cached. The measurements are in `bench/`. A file that is damaged or belongs to another device raises an error
and is never ignored, because a user who has tuned expects the profile to be used.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from math import log2
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
LARGEST = 1 << 24  # the most bytes of a file; a real one has a few thousand
Choice = Mapping[str, str | int | float | bool]


class TuningError(ValueError):
    """A profile cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True, order=True)
class Key:
    """What a choice was measured for: an op, a weight [out, inputs] stored in `format`, and a number of rows of x."""

    op: str
    format: str
    out: int
    inputs: int
    rows: int


@dataclass(frozen=True)
class Profile:
    """The choices for one device and one version of torch.

    `measured` is an ISO date, `threads` the number of torch's threads at the time.
    """

    device: str
    torch: str
    measured: str
    threads: int
    entries: Mapping[Key, Choice]

    def choices(self, op: str, format: str, out: int, inputs: int) -> dict[int, Choice]:
        """The choices by number of rows, for the measured size nearest in number of weights; empty if there is none."""
        alike = [key for key in self.entries if (key.op, key.format) == (op, format)]
        if not alike:
            return {}

        def distance(size: tuple[int, int]) -> tuple[float, float]:
            return abs(log2(size[0] * size[1] / (out * inputs))), abs(log2(size[0] / out))

        nearest = min({(key.out, key.inputs) for key in alike}, key=distance)
        return {key.rows: self.entries[key] for key in sorted(alike) if (key.out, key.inputs) == nearest}

    def choice(self, op: str, format: str, out: int, inputs: int, rows: int) -> Choice | None:
        """The choice for this many rows: that of the next larger number measured, else of the largest; None if none."""
        found = self.choices(op, format, out, inputs)
        return found[bucket(rows, found)] if found else None


def bucket(rows: int, measured: Mapping[int, Any]) -> int:
    """The measured number of rows that stands for `rows`: the smallest that is not below it, else the largest."""
    return min((count for count in measured if count >= rows), default=max(measured))


def device_name(kind: str) -> str:
    """The name of the device `cpu`, `cuda` or `cuda:1` on this machine, such as `AMD EPYC AVX512` or `NVIDIA H200`."""
    device = torch.device(kind)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.cpu.get_capabilities().get('cpu_name', 'cpu')} {torch.backends.cpu.get_cpu_capability()}".strip()


def place(kind: str) -> Path:
    """The path of a device's profile: `$XDG_CACHE_HOME/compress/tuning/<device>-<torch>.json`."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"  # the XDG standard ignores relative paths
    name = re.sub(r"[^a-z0-9]+", "-", device_name(kind).lower()).strip("-")
    return root / "compress" / "tuning" / f"{name}-{torch.__version__}.json"


def known(kind: str) -> Profile | None:
    """The profile of a device, or None if it was never tuned; raises TuningError for a damaged or foreign file."""
    path = place(kind)
    try:
        found = path.stat()
    except FileNotFoundError:
        return None
    except OSError as error:
        raise TuningError(f"{path}: cannot be read: {error.strerror}") from error
    profile = _read(path, found.st_ino, found.st_ctime_ns, found.st_size)
    for what, here in (("device", device_name(kind)), ("torch", torch.__version__)):
        if getattr(profile, what) != here:
            raise TuningError(
                f"{path}: was measured with {what} {getattr(profile, what)!r}, this is {here!r}; {REMEDY}"
            )
    return profile


REMEDY = "delete it, or write a new one with `compress tune`"


def read(path: Path) -> Profile:
    """The profile in a file; raises TuningError if the file is missing, damaged or not a profile."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        return parsed(json.loads(raw))
    except OSError as error:
        raise TuningError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or not what it must say
        raise TuningError(f"{path}: is not a tuning profile: {error}; {REMEDY}") from error


@lru_cache(maxsize=8)
def _read(path: Path, file: int, changed: int, size: int) -> Profile:
    """The profile in a file, cached until the file changes: inode, change time and size are the cache key."""
    return read(path)


def parsed(value: Any) -> Profile:
    """A profile from its JSON; raises ValueError that names what is wrong."""
    told = checked(value, "the file", {"format": int, "entries": list} | HEAD)
    if told["format"] != FORMAT:
        raise ValueError(f"format {told['format']}, this program reads {FORMAT}")
    entries: dict[Key, Choice] = {}
    for i, entry in enumerate(told["entries"]):
        found = checked(entry, f"entries[{i}]", {**ENTRY, "choice": dict})
        key = Key(**{name: found[name] for name in ENTRY})
        if min(key.out, key.inputs, key.rows) < 1:
            raise ValueError(f"entries[{i}] has a size below 1")
        if not all(isinstance(part, (str, int, float)) for part in found["choice"].values()):
            raise ValueError(f"entries[{i}].choice holds more than text and numbers")
        if key in entries:
            raise ValueError(f"entries[{i}] is a duplicate")
        entries[key] = found["choice"]
    return Profile(**{name: told[name] for name in HEAD}, entries=entries)


HEAD = {"device": str, "torch": str, "measured": str, "threads": int}
ENTRY = {field.name: str if field.name in ("op", "format") else int for field in fields(Key)}


def checked(value: Any, where: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """`value`, if it is an object with exactly these names and types; raises ValueError otherwise."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    if value.keys() != kinds.keys():
        raise ValueError(f"{where} must have {', '.join(kinds)}; got {', '.join(map(str, value)) or 'nothing'}")
    for name, kind in kinds.items():
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise ValueError(f"{where}: {name} is {value[name]!r}, not {kind.__name__}")
    return value


def ready(path: Path) -> None:
    """Make the folder of a profile, before minutes of measuring; raises TuningError if no file can be written there."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise TuningError(f"{path}: cannot be written: {error.strerror}") from error


def write(profile: Profile, path: Path) -> None:
    """Write a profile atomically; raises TuningError if that fails."""
    head = {"format": FORMAT, **{name: getattr(profile, name) for name in HEAD}}
    entries = [{**vars(key), "choice": dict(profile.entries[key])} for key in sorted(profile.entries)]
    lines = ",\n  ".join(json.dumps(entry) for entry in entries)
    text = json.dumps(head, indent=1)[:-2] + f',\n "entries": [\n  {lines}\n ]\n}}\n'
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            Path(name).replace(path)
        except BaseException:
            Path(name).unlink(missing_ok=True)
            raise
    except OSError as error:
        raise TuningError(f"{path}: cannot be written: {error.strerror}") from error


__all__ = [
    "REMEDY",
    "Choice",
    "Key",
    "Profile",
    "TuningError",
    "bucket",
    "device_name",
    "known",
    "place",
    "read",
    "ready",
    "write",
]
