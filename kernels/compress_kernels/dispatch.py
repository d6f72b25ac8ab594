"""Which way a packed product goes on a GPU: its own kernel, or decoded to scratch memory and multiplied as dense.

Measured choices come from a tuning profile (`tuning.py`, written by `compress tune`). Where nothing was measured, the
roofline predicts: a product takes at least the time to read its bytes, to multiply, and to issue its instructions.
Instructions for each weight are read off compiled code (`gpu/aot.py`), so the prediction needs no GPU, but it is a
prediction and says so.
Source of the issue bound: a lane issues one instruction a cycle at most; low-bit kernels reach `ISSUED` of that.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

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


# what the makers' datasheets give for the SXM boards, bandwidth times 0.9, operations times 0.8
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
    path = "kernel" if times[bound] <= decoded else "dense"
    taken = min(times[bound], decoded)
    return Choice(path=path, seconds=taken, speedup=dense / taken, bound=bound)


def issue_rate(device: Device) -> float:
    """Instructions a second of all lanes, at the share that is reached."""
    return ISSUED * LANES * device.multiprocessors * device.clock


def most_rows(form: Format, device: Device) -> int:
    """Rows of x up to which the kernel is expected to be no slower than decoding first."""
    weights = 1 << 24
    rows = [m for m in (1, 8, 16, 32, 64, 128, 256, 512) if predict(form, m, weights, device).path == "kernel"]
    return max(rows, default=0)


def here(device: torch.device) -> Device:
    """The rates of the GPU that a tensor is on."""
    return known(torch.cuda.get_device_name(device)) if device.type == "cuda" else DEVICES[0]
