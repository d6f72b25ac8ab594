"""The speed of this machine, measured once in a few seconds and cached; the times of a plan are predicted from it.

A profile is one JSON file for each device, version of torch and number of threads, beside the profiles of
`compress tune`. A damaged file raises an error and is never ignored.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch

from compress.errors import RecipeError
from compress.partial import put
from compress_kernels import tuning

FORMAT = 1
LARGEST = 1 << 16  # bytes of a profile, at most
SIDE = 512  # side of the multiplied matrices: a product takes milliseconds, which a busy machine rarely interrupts
HALF = SIDE // 2
LEAST = 12  # timed calls of each measurement, at least
FEW = 0.25  # seconds of timed calls of each measurement, at least
WRITTEN = 1 << 26  # bytes written to measure the disk


@dataclass(frozen=True, kw_only=True)
class Machine:
    """The measured rates of a device; `version` is that of torch.

    `float32`, `bfloat16` and `float16` are the operations a second of matrix products; `eigen` is n**3 a second of a
    symmetric n x n eigendecomposition; `memory`, reads plus writes, and `disk` are bytes a second; `call` is the
    seconds that one small operation takes.
    """

    device: str
    version: str
    threads: int
    float32: float
    bfloat16: float
    float16: float
    eigen: float
    memory: float
    disk: float
    call: float

    def product(self, dtype: torch.dtype) -> float:
        """Operations a second of a product in a dtype; the float32 rate for a dtype that was not measured."""
        rate: float = getattr(self, str(dtype).removeprefix("torch."), self.float32)
        return rate


def place(kind: str) -> Path:
    """The path of the profile of a device: `$XDG_CACHE_HOME/compress/machine/<device>-<torch>-<threads>.json`."""
    tuned = tuning.place(kind)
    return tuned.parent.parent / "machine" / f"{tuned.stem}-{torch.get_num_threads()}.json"


def machine(kind: str) -> Machine:
    """The profile of a device, which is measured if there is none yet, and saved if its folder can be written.

    Raises RecipeError for a damaged profile.
    """
    path = place(kind)
    if path.exists():
        return read(path)
    found = measure(kind)
    with suppress(RecipeError):  # if it cannot be saved, it is measured every time, as `compress plan` reports
        write(found, path)
    return found


def read(path: Path) -> Machine:
    """The profile in a file; raises RecipeError if it is damaged."""
    try:
        text = path.read_text(encoding="utf-8") if path.stat().st_size <= LARGEST else ""
        told = json.loads(text)
        if not isinstance(told, dict) or told.pop("format", None) != FORMAT:
            raise ValueError(f"format {FORMAT} is read")
        numbers = {f.name: told[f.name] for f in fields(Machine)}
        rates = [numbers[f.name] for f in fields(Machine) if f.type in ("int", "float")]
        if any(isinstance(rate, bool) or not isinstance(rate, (int, float)) or not rate > 0 for rate in rates):
            raise ValueError("rates must be positive numbers")
        return Machine(**numbers)
    except (OSError, ValueError, KeyError, RecursionError) as error:
        raise RecipeError(f"{path}: is not a machine profile: {error}; delete it to measure again") from error


def write(found: Machine, path: Path) -> None:
    """Save a profile atomically; raises RecipeError if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"format": FORMAT, **asdict(found)}, indent=1)
        put(path, lambda partial: partial.write_text(text, encoding="utf-8"))
    except OSError as error:
        raise RecipeError(f"{path}: cannot be written: {error.strerror}") from error


def measure(kind: str) -> Machine:
    """Measure the rates of a device; takes about three seconds, and 64 MB of disk in the folder for temporary files."""
    device = torch.device(kind)
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(SIDE, SIDE, generator=generator).to(device)
    gram = a[:HALF, :HALF] @ a[:HALF, :HALF].T
    long = torch.zeros(1 << 21, device=device)  # as many entries as a pass processes together (grid.py)
    rates = {
        str(dtype).removeprefix("torch."): 2 * SIDE**3 / seconds(device, products(a.to(dtype)))
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }
    small = torch.zeros(64, device=device)
    return Machine(
        device=tuning.device_name(kind), version=torch.__version__, threads=torch.get_num_threads(), **rates,
        eigen=HALF**3 / seconds(device, lambda: torch.linalg.eigh(gram)),
        memory=2 * long.nbytes / seconds(device, lambda: long + 1),
        disk=WRITTEN / disk_seconds(), call=seconds(device, lambda: small.add_(1)),
    )  # fmt: skip


def products(a: torch.Tensor) -> Callable[[], Any]:
    """A function that multiplies a matrix by itself."""
    return lambda: a @ a


def seconds(device: torch.device, run: Callable[[], Any]) -> float:
    """The shortest time of a call, after an untimed one: what the machine achieves when nothing interrupts it."""
    run()
    times: list[float] = []
    while len(times) < LEAST or sum(times) < FEW:
        finish(device)
        began = time.perf_counter()
        run()
        finish(device)
        times.append(time.perf_counter() - began)
    return min(times)


def finish(device: torch.device) -> None:
    """Wait until a GPU has finished all queued work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def disk_seconds() -> float:
    """Seconds to write WRITTEN bytes in the folder for temporary files and flush them to disk."""
    data = bytes(1 << 20)
    with tempfile.TemporaryFile() as file:
        began = time.perf_counter()
        for _ in range(WRITTEN // len(data)):
            file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return time.perf_counter() - began
