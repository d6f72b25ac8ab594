"""Which way a packed product goes on a GPU: its own kernel, or decoded to scratch memory and multiplied as dense.

Measured choices come from a tuning profile (`tuning.py`, written by `compress tune`). Where nothing was measured, the
roofline predicts: a product takes at least the time to read its bytes, to multiply, and to issue its instructions.
Instructions for each weight are read off compiled code (`gpu/aot.py`), so the prediction needs no GPU, but it is a
prediction and says so.
Source of the issue bound: a lane issues one instruction a cycle at most; low-bit kernels reach `ISSUED` of that.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from compress_kernels import tuning

KERNEL, DENSE = "kernel", "dense"  # the ways
OP = "gpu"  # how a profile calls the products of packed forms
ISSUED = 0.55  # of the issue slots; from published charts of low-bit kernels on A100 and H100, not measured by us
MULTIPLIED = 0.6  # of the tensor cores' rate that a kernel with decoding reaches; an estimate
LANES = 128  # of a multiprocessor


@dataclass(frozen=True, kw_only=True)
class Device:
    """Rates of one kind of GPU: bytes a second, bf16 operations a second, multiprocessors, cycles a second."""

    kind: str
    bandwidth: float
    operations: float
    multiprocessors: int
    clock: float


# of the SXM boards: H200 as others measured it, H100 and A100 by their datasheets, bandwidth x 0.9, operations x 0.8
DEVICES = (
    Device(kind="H200", bandwidth=4.3e12, operations=790e12, multiprocessors=132, clock=1.98e9),
    Device(kind="H100", bandwidth=3.0e12, operations=790e12, multiprocessors=132, clock=1.98e9),
    Device(kind="A100", bandwidth=1.8e12, operations=250e12, multiprocessors=108, clock=1.41e9),
)


@dataclass(frozen=True, kw_only=True)
class Format:
    """What a weight costs: bytes a weight as stored, and instructions a weight with a tile of 8, 16 and 64 rows."""

    name: str
    bytes: float
    instructions: tuple[float, float, float]


# of sm_90 and bfloat16, as `python -m compress_kernels.gpu.aot` counts them, triton 3.6
INSTRUCTIONS: dict[str, tuple[float, float, float]] = {
    "int2": (1.64, 2.22, 3.20), "int3": (2.65, 2.98, 3.63), "int4": (1.95, 2.14, 3.18), "int8": (2.42, 2.56, 3.56),
    "e4m3": (2.91, 3.05, 4.05), "e5m2": (2.91, 3.05, 4.05), "e2m1": (3.44, 3.83, 6.02), "book": (4.07, 5.84, 6.55),
    "1:2 half": (1.81, 1.96, 2.75), "1:4 half": (1.66, 1.82, 2.56), "2:4 half": (2.05, 2.21, 3.00),
    "2:8 half": (2.01, 2.16, 2.94), "4:8 half": (2.51, 2.66, 3.50), "8:16 half": (3.91, 3.92, 4.50),
    "2:4 nibble": (2.47, 2.69, 3.89), "2:4 int8": (3.29, 3.51, 4.52), "2:4 fp8": (3.29, 3.51, 4.52),
    "2:8 int4": (2.87, 3.02, 3.86), "bitmap": (12.9, 13.8, 13.8),
    "int8 x int8": (0.67, 0.73, 0.91), "fp8 x fp8": (1.35, 1.40, 1.52),
}  # fmt: skip


def format_of(form: Any, weights: int) -> Format:
    """What a packed form of so many weights costs; n:m that was not counted is taken for the dearest of its values."""
    kind = str(form.kind)
    alike = [counts for name, counts in INSTRUCTIONS.items() if name.endswith(kind.rpartition(" ")[2])]
    counted = INSTRUCTIONS.get(kind) or max(alike)
    return Format(name=kind, bytes=form.nbytes / weights, instructions=counted)


@dataclass(frozen=True, kw_only=True)
class Choice:
    """`kernel` or `dense`, how many seconds that is expected to take and how often faster than dense it would be."""

    path: str
    seconds: float
    speedup: float
    bound: str  # what limits the kernel: memory, issue or multiplication


def known(name: str) -> Device:
    """The rates of a GPU by its name; an unknown one is taken for the slowest known."""
    return next((device for device in DEVICES if device.kind in name), DEVICES[-1])


def predict(form: Format, m: int, weights: int, device: Device) -> Choice:
    """The faster way for x of `m` rows and a matrix of so many weights."""
    tile = next((i for i, rows in enumerate((8, 16)) if m <= rows), 2)
    times = {
        "memory": weights * form.bytes / device.bandwidth,
        "multiplication": 2 * m * weights / (MULTIPLIED * device.operations),
        "issue": -(-m // (8, 16, 64)[tile]) * weights * form.instructions[tile] / issue_rate(device),
    }
    bound = max(times, key=times.__getitem__)
    dense = max(2 * weights / device.bandwidth, 2 * m * weights / device.operations)
    decoded = dense + weights * (form.bytes + 2) / device.bandwidth
    path = KERNEL if times[bound] <= decoded else DENSE
    taken = min(times[bound], decoded)
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
    """What `compress tune` chose for a kind of packed form on this GPU, or None.

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
    return None if profile is None else profile.choice(OP, kind, out, inputs, bucket)


def here(device: torch.device) -> Device:
    """The rates of the GPU that a tensor is on."""
    return known(torch.cuda.get_device_name(device)) if device.type == "cuda" else DEVICES[0]
