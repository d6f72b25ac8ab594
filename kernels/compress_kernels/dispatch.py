"""Chooses the path of a packed product on a GPU: its own kernel, or decoding to scratch memory and a dense product.

Measured choices come from a tuning profile (`tuning.py`, written by `compress tune`). Without a measurement, a roofline
model predicts: a product takes at least the time to read its bytes, to multiply, and to issue its instructions. The
number of instructions per weight is read off compiled code (`gpu/aot.py`); how much slower than its roofline each
format is was measured once, on an H200 (`bench/fit.py`). On other GPUs the result is a prediction and is reported as
such. The figures behind the model are in `defaults.json`.
Source of the issue bound: a lane issues at most one instruction per cycle; the low-bit kernels reach `ISSUED` of that.
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

KERNEL, DENSE = "kernel", "dense"  # the two paths
OP = "gpu"  # the op under which tuning profiles list products of packed forms
START = 4.5e-6  # seconds that any product takes within a CUDA graph, however small; on an H200, cuBLAS's too
ISSUED = 0.3  # share of the issue slots that int2, int3 and int4 use on an H200
MULTIPLIED = 0.6  # share of the tensor cores' rate that a decoding kernel reaches; an estimate that never binds so far
LANES = 128  # per multiprocessor
SMALL = 64  # group size below which the scales and sums of groups cost more than the weights
WORDS = ("int2", "int3", "int4", "int8", "e4m3", "e5m2", "e2m1", "book")
LIKE = {"e5m2": "e4m3", "e2m1": "book", "fp8 x fp8": "int8 x int8"}  # forms without a measured slack -> a similar one
# Rows of x above which, unless tuned, another path is taken: a dense copy of the matrix, because decoding then costs
# little beside the product, or (LIBRARY_ABOVE) torch's own 8-bit products; from specifications, not measured. On an
# H200, 4- and 8-bit words take as long at 256 rows as the dense product and the bytes that decoding moves. Other words
# and n:m slots take much longer at that size, and bitmaps already at one row.
DENSE_ABOVE, HALF_DENSE_ABOVE, BITMAP_DENSE_ABOVE, LIBRARY_ABOVE = 256, 128, 0, 64
# Words whose kernel is used up to DENSE_ABOVE rows, unless their groups are SMALL.
FAST = ("int4", "int8", "e4m3", "e5m2")


@dataclass(frozen=True, kw_only=True)
class Device:
    """The rates of one kind of GPU: bytes, bf16 operations and clock cycles per second, and its multiprocessors."""

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
    """The cost of a format: stored bytes per weight, and instructions per weight for tiles of 8, 16 and 64 rows.

    `slack` is how many times longer than the roofline such tiles take.
    """

    name: str
    bytes: float
    instructions: tuple[float, float, float]
    slack: tuple[float, float, float] = (1.0, 1.0, 1.0)


def format_of(form: Any, weights: int) -> Format:
    """The cost of a packed form with this many weights.

    An n:m form whose instructions were not counted takes the most expensive counts of its value format. A form whose
    slack was not measured takes that of a similar one; small groups take that of the smallest ones measured.
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
    """The name under which the slack of a kind, or of a similar one, was measured."""
    if kind in WORDS and 0 < group < SMALL:
        return "int4 g32"
    if kind in SLACK or ":" not in kind:
        return LIKE.get(kind, kind)
    return "4:8 half" if kind.endswith("half") else "2:4 nibble"


def above(kind: str, group: int) -> int | None:
    """Rows of x above which the product of a kind decodes the weight, unless tuned; None if it never does."""
    if kind == "bitmap":
        return BITMAP_DENSE_ABOVE
    if kind in WORDS:
        return DENSE_ABOVE if kind in FAST and not 0 < group < SMALL else HALF_DENSE_ABOVE
    return HALF_DENSE_ABOVE if ":" in kind else None


def way(form: Any, rows: int, device: torch.device) -> str:
    """The path, KERNEL or DENSE, that a packed form takes for x with this many rows."""
    limit = above(str(form.kind), int(getattr(form, "group", 0)))
    out, inputs = form.shape
    decoded = limit is not None and decodes(str(form.kind), rows, out, inputs, device, limit)
    return DENSE if decoded else KERNEL


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A path with its expected time in seconds and its expected speed-up over a dense matrix."""

    path: str
    seconds: float
    speedup: float
    bound: str  # what limits the kernel: memory, issue or multiplication


OLDEST = (3, 6)  # the oldest supported version of Triton; older ones compile different code
CAPABLE = (8, 0)  # the least compute capability, for asynchronous copies and bfloat16 products


@lru_cache(maxsize=16)
def missing(device: torch.device) -> str:
    """The reason why the kernels cannot run on a device; empty if they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        return f"{device.type} is not an NVIDIA GPU"
    if find_spec("triton") is None:
        return "triton is not installed: pip install 'compress-llm[kernels]'"
    if tuple(map(int, version("triton").split(".")[:2])) < OLDEST:
        return f"triton {version('triton')} is older than {'.'.join(map(str, OLDEST))}"
    if torch.cuda.get_device_capability(device) < CAPABLE:
        return f"a GPU of capability {torch.cuda.get_device_capability(device)}; kernels need {CAPABLE}"
    return ""


def known(name: str) -> Device:
    """The rates of a GPU by its name; an unknown GPU gets those of the last in the list, the slowest one."""
    return next((device for device in DEVICES if device.kind in name), DEVICES[-1])


def predict(form: Format, m: int, weights: int, device: Device, path: str = "") -> Choice:
    """Predict a path for x with `m` rows and a matrix of this many weights; without `path`, the faster one."""
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
    """The instructions per second that all lanes together issue, at the share `ISSUED` of the peak."""
    return ISSUED * LANES * device.multiprocessors * device.clock


def tuned(kind: str, rows: int, out: int, inputs: int, device: torch.device) -> tuning.Choice | None:
    """What `compress tune` chose for a kind of packed form on this GPU.

    None if it was not tuned, or not for this many rows. Choices are cached, so a profile that is written later takes
    effect in the next process. Raises tuning.TuningError for a damaged profile.
    """
    return _tuned(kind, 1 << max(rows - 1, 0).bit_length(), out, inputs, device) if device.type == "cuda" else None


def decodes(kind: str, rows: int, out: int, inputs: int, device: torch.device, above: int) -> bool:
    """Whether to decode a weight and multiply it as dense: as tuned, otherwise for more than `above` rows of x."""
    choice = tuned(kind, rows, out, inputs, device)
    return rows > above if choice is None else choice["path"] == DENSE


@lru_cache(maxsize=4096)
def _tuned(kind: str, bucket: int, out: int, inputs: int, device: torch.device) -> tuning.Choice | None:
    profile = tuning.known(str(device))
    found = {} if profile is None else profile.choices(OP, kind, out, inputs)
    return found[tuning.bucket(bucket, found)] if found and bucket <= max(found) else None


def here(device: torch.device) -> Device:
    """The rates of the GPU that `device` is; those of the first known GPU if it is none."""
    return known(torch.cuda.get_device_name(device)) if device.type == "cuda" else DEVICES[0]
