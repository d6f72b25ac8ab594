"""Which way a packed product goes on a GPU: its own kernel, or decoded to scratch memory and multiplied as dense.

Measured choices come from a tuning profile (`tuning.py`, written by `compress tune`). Where nothing was measured, the
roofline predicts: a product takes at least the time to read its bytes, to multiply, and to issue its instructions.
Instructions for each weight are read off compiled code (`gpu/aot.py`); how far each format stays behind its roof was
measured on an H200 once (`bench/fit.py`). On another GPU it is a prediction, and says so. `defaults.json` holds what it
rests on.
Source of the issue bound: a lane issues one instruction a cycle at most; our low-bit kernels reach `ISSUED` of that.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from compress_kernels import tuning

KERNEL, DENSE = "kernel", "dense"  # the ways
OP = "gpu"  # how a profile calls the products of packed forms
START = 4.5e-6  # seconds of any product within a CUDA graph, however small; on an H200, of cuBLAS's too
ISSUED = 0.3  # of the issue slots that int2, int3 and int4 reach on an H200
MULTIPLIED = 0.6  # of the tensor cores' rate that a kernel with decoding reaches; an estimate, which binds nothing yet
LANES = 128  # of a multiprocessor
SMALL = 64  # inputs of a group: in smaller ones, their scales and sums weigh more than their weights
WORDS = ("int2", "int3", "int4", "int8", "e4m3", "e5m2", "e2m1", "book")
LIKE = {"e5m2": "e4m3", "e2m1": "book", "fp8 x fp8": "int8 x int8"}  # of which no slack was measured
# rows of x above which, where nothing was tuned, another way is taken: with a dense copy of the matrix, beside whose
# product decoding costs little, or by torch's own 8-bit products (specs, not measured). On an H200 4 and 8 bits take as
# long at 256 rows as dense and the bytes that decoding moves, other words and slots much longer, bitmaps at one row
DENSE_ABOVE, HALF_DENSE_ABOVE, BITMAP_DENSE_ABOVE, LIBRARY_ABOVE = 256, 128, 0, 64
# words whose kernel is taken up to DENSE_ABOVE, if their groups are not SMALL
FAST = ("int4", "int8", "e4m3", "e5m2")
SPARSE_FROM = 1024  # rows of x from which sparse tensor cores are used, if they were asked for; specs, not measured


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of one kind of GPU: bytes a second, bf16 operations a second, multiprocessors, cycles a second."""

    kind: str
    bandwidth: float
    operations: float
    multiprocessors: int
    clock: float


SHIPPED = json.loads((Path(__file__).parent / "defaults.json").read_text(encoding="utf-8"))
DEVICES = tuple(Device(**rates) for rates in SHIPPED["devices"])
INSTRUCTIONS: dict[str, tuple[float, float, float]] = {name: tuple(n) for name, n in SHIPPED["instructions"].items()}
SLACK: dict[str, tuple[float, float, float]] = {name: tuple(n) for name, n in SHIPPED["slack"].items()}


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a weight costs: bytes a weight as stored, and instructions a weight with a tile of 8, 16 and 64 rows.

    `slack` is how many times longer than the roofline such tiles take.
    """

    name: str
    bytes: float
    instructions: tuple[float, float, float]
    slack: tuple[float, float, float] = (1.0, 1.0, 1.0)


def format_of(form: Any, weights: int) -> Format:
    """What a packed form of so many weights costs; n:m that was not counted is taken for the dearest of its values.

    So are small groups for the smallest that were measured, and what was not measured for the one like it.
    """
    kind, group = str(form.kind), int(getattr(form, "group", 0))
    alike = [counts for name, counts in INSTRUCTIONS.items() if name.endswith(kind.rpartition(" ")[2])]
    return Format(
        name=kind,
        bytes=form.nbytes / weights,
        instructions=INSTRUCTIONS.get(kind) or max(alike),
        slack=SLACK[slack_of(kind, group)],
    )


def slack_of(kind: str, group: int) -> str:
    """Under which name the slack of a kind was measured, or of the one like it."""
    if kind in WORDS and 0 < group < SMALL:
        return "int4 g32"
    if kind in SLACK or ":" not in kind:
        return LIKE.get(kind, kind)
    return "4:8 half" if kind.endswith("half") else "2:4 nibble"


def above(kind: str, group: int) -> int | None:
    """Rows of x above which the product of a kind decodes, where nothing was tuned; None if it never does."""
    if kind == "bitmap":
        return BITMAP_DENSE_ABOVE
    if kind in WORDS:
        return DENSE_ABOVE if kind in FAST and not 0 < group < SMALL else HALF_DENSE_ABOVE
    return HALF_DENSE_ABOVE if ":" in kind else None


def way(form: Any, rows: int, device: torch.device) -> str:
    """Which way a packed form goes for so many rows of x."""
    limit = above(str(form.kind), int(getattr(form, "group", 0)))
    out, inputs = form.shape
    decoded = limit is not None and decodes(str(form.kind), rows, out, inputs, device, limit)
    return DENSE if decoded else KERNEL


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`kernel` or `dense`, how many seconds that is expected to take and how often faster than dense it would be."""

    path: str
    seconds: float
    speedup: float
    bound: str  # what limits the kernel: memory, issue or multiplication


OLDEST = (3, 6)  # version of triton; older ones compile other code
CAPABLE = (8, 0)  # of a GPU: asynchronous copies and products of bfloat16


@lru_cache(maxsize=16)
def missing(device: torch.device) -> str:
    """What keeps the kernels from running on a device, or nothing."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} is no NVIDIA GPU"
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'compress-llm[kernels]'"
    if tuple(map(int, version("triton").split(".")[:2])) < OLDEST:
        return f"triton {version('triton')} is older than {'.'.join(map(str, OLDEST))}"
    if torch.cuda.get_device_capability(device) < CAPABLE:
        return f"a GPU of capability {torch.cuda.get_device_capability(device)}; kernels need {CAPABLE}"
    return ""


def known(name: str) -> Device:
    """The rates of a GPU by its name; an unknown one is taken for the slowest known."""
    return next((device for device in DEVICES if device.kind in name), DEVICES[-1])


def predict(form: Format, m: int, weights: int, device: Device, path: str = "") -> Choice:
    """What a way would take for x of `m` rows and a matrix of so many weights; the faster one if none is named."""
    tile = next((i for i, rows in enumerate((8, 16)) if m <= rows), 2)
    times = {
        "memory": weights * form.bytes / device.bandwidth,
        "multiplication": 2 * m * weights / (MULTIPLIED * device.operations),
        "issue": -(-m // (8, 16, 64)[tile]) * weights * form.instructions[tile] / issue_rate(device),
    }
    bound = max(times, key=times.__getitem__)
    packed = START + form.slack[tile] * times[bound]
    dense = START + max(2 * weights / device.bandwidth, 2 * m * weights / device.operations)
    decoded = dense + weights * (form.bytes + 2) / device.bandwidth
    path = path or (KERNEL if packed <= decoded else DENSE)
    taken = packed if path == KERNEL else decoded
    return Choice(path=path, seconds=taken, speedup=dense / taken, bound=bound)


def issue_rate(device: Device) -> float:
    """Instructions a second of all lanes, at the share that is reached."""
    return ISSUED * LANES * device.multiprocessors * device.clock


@lru_cache(maxsize=256)
def most_rows(form: Format, device: Device) -> int:
    """Rows of x up to which the kernel is expected to be no slower than decoding first."""
    weights = 1 << 24
    rows = [m for m in (1, 8, 16, 32, 64, 128, 256, 512) if predict(form, m, weights, device).path == KERNEL]
    return max(rows, default=0)


def tuned(kind: str, rows: int, out: int, inputs: int, device: torch.device) -> tuning.Choice | None:
    """What `compress tune` chose for a kind of packed form on this GPU, or None: also for more rows than it measured.

    A profile is read once: one written later holds for the next process. Raises tuning.TuningError for a damaged one.
    """
    return _tuned(kind, 1 << max(rows - 1, 0).bit_length(), out, inputs, device) if device.type == "cuda" else None


def decodes(kind: str, rows: int, out: int, inputs: int, device: torch.device, above: int) -> bool:
    """Whether to decode a weight and multiply it as dense: as tuned, else for more than `above` rows of x."""
    choice = tuned(kind, rows, out, inputs, device)
    return rows > above if choice is None else choice["path"] == DENSE


@lru_cache(maxsize=4096)
def _tuned(kind: str, bucket: int, out: int, inputs: int, device: torch.device) -> tuning.Choice | None:
    profile = tuning.known(str(device))
    found = {} if profile is None else profile.choices(OP, kind, out, inputs)
    return found[tuning.bucket(bucket, found)] if found and bucket <= max(found) else None


def here(device: torch.device) -> Device:
    """The rates of the GPU that a tensor is on."""
    return known(torch.cuda.get_device_name(device)) if device.type == "cuda" else DEVICES[0]
