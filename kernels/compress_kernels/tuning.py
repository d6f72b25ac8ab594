"""What was measured on this machine: which way to compute, by op, format, size and number of rows.

A profile is one JSON file for each device and version of torch, in the user's cache folder; without one, the defaults
that stand beside each kernel hold. It is read when a weight is lowered, never while one is multiplied. Not here: how
to measure. A file that is damaged, or of another device, is an error and never ignored: whoever tuned wants it used.
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
LARGEST = 1 << 24  # bytes of a file; a real one has a few thousand
Choice = Mapping[str, str | int | float | bool]


class TuningError(ValueError):
    """A profile cannot be read; the message names the file and the remedy."""


@dataclass(frozen=True, order=True)
class Key:
    """What a choice was measured for: a weight [out, inputs] stored in `format`, and so many rows of x."""

    op: str
    format: str
    out: int
    inputs: int
    rows: int


@dataclass(frozen=True)
class Profile:
    """Choices of one device with one version of torch; `measured` is a date, `threads` those of torch."""

    device: str
    torch: str
    measured: str
    threads: int
    entries: Mapping[Key, Choice]

    def choices(self, op: str, format: str, out: int, inputs: int) -> dict[int, Choice]:
        """By number of rows, what was measured at the size nearest in weights; empty if nothing was."""
        alike = [key for key in self.entries if (key.op, key.format) == (op, format)]
        if not alike:
            return {}

        def distance(size: tuple[int, int]) -> tuple[float, float]:
            return abs(log2(size[0] * size[1] / (out * inputs))), abs(log2(size[0] / out))

        nearest = min({(key.out, key.inputs) for key in alike}, key=distance)
        return {key.rows: self.entries[key] for key in sorted(alike) if (key.out, key.inputs) == nearest}

    def choice(self, op: str, format: str, out: int, inputs: int, rows: int) -> Choice | None:
        """What to do for so many rows: as at the next larger number measured, or the largest; None if nothing was."""
        found = self.choices(op, format, out, inputs)
        return found[bucket(rows, found)] if found else None


def bucket(rows: int, measured: Mapping[int, Any]) -> int:
    """The number of rows that stands for `rows` among those measured: the next one above, else the last."""
    return min((count for count in measured if count >= rows), default=max(measured))


def device_name(kind: str) -> str:
    """What `cpu`, `cuda` or `cuda:1` is here, such as `AMD EPYC AVX512` or `NVIDIA H200`."""
    device = torch.device(kind)
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"{torch.cpu.get_capabilities().get('cpu_name', 'cpu')} {torch.backends.cpu.get_cpu_capability()}".strip()


def place(kind: str) -> Path:
    """Where the profile of a device lies: `$XDG_CACHE_HOME/compress/tuning/<device>-<torch>.json`."""
    cache = os.environ.get("XDG_CACHE_HOME", "")
    root = Path(cache) if os.path.isabs(cache) else Path.home() / ".cache"  # the standard ignores relative paths
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
    """The profile in a file; raises TuningError if it is missing, damaged or none."""
    try:
        with path.open("rb") as file:
            raw = file.read(LARGEST + 1)
        if len(raw) > LARGEST:
            raise ValueError(f"more than {LARGEST} bytes")
        return parsed(json.loads(raw))
    except OSError as error:
        raise TuningError(f"{path}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or not what it must say
        raise TuningError(f"{path}: is no tuning profile: {error}; {REMEDY}") from error


@lru_cache(maxsize=8)
def _read(path: Path, file: int, changed: int, size: int) -> Profile:
    """A file as it was when it changed last."""
    return read(path)


def parsed(value: Any) -> Profile:
    """A profile from its JSON; raises ValueError naming what is wrong."""
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
            raise ValueError(f"entries[{i}] is there twice")
        entries[key] = found["choice"]
    return Profile(**{name: told[name] for name in HEAD}, entries=entries)


HEAD = {"device": str, "torch": str, "measured": str, "threads": int}
ENTRY = {field.name: str if field.name in ("op", "format") else int for field in fields(Key)}


def checked(value: Any, where: str, kinds: Mapping[str, type]) -> dict[str, Any]:
    """`value`, an object of exactly these names and types; raises ValueError else."""
    if not isinstance(value, dict):
        raise ValueError(f"{where} is not an object")
    if value.keys() != kinds.keys():
        raise ValueError(f"{where} must have {', '.join(kinds)}; got {', '.join(map(str, value)) or 'nothing'}")
    for name, kind in kinds.items():
        if not isinstance(value[name], kind) or isinstance(value[name], bool):
            raise ValueError(f"{where}: {name} is {value[name]!r}, not {kind.__name__}")
    return value


def ready(path: Path) -> None:
    """Make the folder of a profile; raises TuningError if none can be written there, before minutes are measured."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise TuningError(f"{path}: cannot be written: {error.strerror}") from error


def write(profile: Profile, path: Path) -> None:
    """Write a profile whole or not at all; raises TuningError if it cannot be."""
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
