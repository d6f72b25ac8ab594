"""What a launch needs besides tensors: tile sizes and splits for a shape, workspaces, and whether Triton interprets."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from compress_kernels import dispatch, formats

BUSY = 2  # programs of four warps per multiprocessor that splitting the inputs aims at; specifications suggest 2 to 4
MULTIPROCESSORS = 132  # of an H100 or H200; assumed where there is no GPU
SHARED = 232_448  # most bytes of shared memory per program of an H100 or H200; assumed where there is no GPU
COUNTERS = 1 << 14  # the most tiles of a launch that splits the inputs
STREAMS = 32
CAPTURED = 1 << 20  # counters for all captured launches during the life of the process
SIZES = ("rows", "outputs", "splits", "warps", "stages")  # the fields of a configuration that a profile stores


@dataclass(frozen=True, kw_only=True)
class Config:
    """A launch configuration: the tile (rows of x and outputs), programs per tile, warps, and pipeline stages.

    Without `assembly`, decoding is plain Triton, which is slower and serves for comparison. `dense` decodes the weight
    first. `subnormal` reads codes as subnormal float16 numbers, which takes the fewest instructions. It is off by
    default: an H200 multiplies such numbers correctly, but whether that is faster has not been measured.
    """

    rows: int
    outputs: int
    splits: int = 1
    warps: int = 4
    stages: int = 4
    assembly: bool = True
    dense: bool = False
    subnormal: bool = False

    @property
    def inline(self) -> bool:
        """Whether to decode in inline assembly, which the interpreter does not support."""
        return self.assembly and not interpreted()


def heuristic(m: int, n: int, device: torch.device) -> Config:
    """A reasonable tile for x of `m` rows and `n` outputs, not measured; kernels adapt it and then call `split`."""
    rows = next((tile for tile in (8, 16, 32, 64) if m <= tile), 64)
    outputs = 64 if n % 128 or n * -(-m // rows) < 128 * multiprocessors(device) else 128
    return Config(rows=rows, outputs=outputs)


def split(config: Config, m: int, n: int, blocks: int, device: torch.device) -> Config:
    """The configuration with enough splits of the `blocks` of inputs to keep the GPU busy."""
    tiles = -(-n // config.outputs) * -(-m // config.rows)
    return replace(config, splits=splits_for(tiles, blocks, device, config.warps))


def tuned(kind: str, m: int, n: int, k: int, blocks: int, device: torch.device) -> Config | None:
    """The configuration that `compress tune` found fastest on this GPU for a kind of packed form, None if not tuned.

    It was measured at the nearest size. None too if its tile does not fit this size; splits that do not fit are chosen
    anew.
    """
    choice = dispatch.tuned(kind, m, n, k, device)
    if choice is None or formats.padded(n, formats.ROWS) % int(choice["outputs"]):
        return None
    rows, outputs, splits, warps, stages = (int(choice[name]) for name in SIZES)
    tiles = -(-n // outputs) * -(-m // rows)
    if splits > blocks or tiles > COUNTERS or splits * m * n >= 1 << 31:
        splits = splits_for(tiles, blocks, device, warps)
    dense = choice["path"] == dispatch.DENSE
    return Config(rows=rows, outputs=outputs, splits=splits, warps=warps, stages=stages, dense=dense)


def splits_for(tiles: int, blocks: int, device: torch.device, warps: int = 4) -> int:
    """How many programs share the inputs of each tile: a power of two up to 16, or 1 if there are too many tiles."""
    splits, most = 1, BUSY * multiprocessors(device)
    while splits < 16 and tiles * splits * 2 * warps <= 4 * most and splits * 2 <= blocks:
        splits *= 2
    return splits if tiles <= COUNTERS else 1


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor; Triton alone would use the current device."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """The multiprocessors of a GPU; an H200's number for other devices."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


@lru_cache(maxsize=16)
def shared(device: torch.device) -> int:
    """The most bytes of shared memory that a program may use; an H200's number for other devices."""
    if device.type != "cuda":
        return SHARED
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # torch's stub lacks it


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which supports no inline assembly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def workspace(config: Config, m: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the partial sums of one launch, and counters that are zero before and after every launch.

    The memory comes from torch's allocator, which works with CUDA graphs. Raises RuntimeError if the first launch on a
    device is being captured.
    """
    parts = config.splits * m * n if config.splits > 1 else 1
    tiles = -(-n // config.outputs) * -(-m // config.rows) if config.splits > 1 else 1
    return torch.empty(parts, dtype=torch.float32, device=device), room(device).counters(tiles)


class Room:
    """The counters of one device; launches that may run concurrently never share any.

    The launches of one stream run one after another and share its counters. A captured launch has counters of its own
    for good, because graphs can be replayed on any stream. A launch for which there is no room gets fresh zeros, which
    cost an additional launch.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # they would be zeroed at replay only
            raise RuntimeError("the first launch on a device cannot be captured in a CUDA graph: run the model once")
        with torch.inference_mode(False):
            self.streams = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)
            self.captured = torch.zeros(CAPTURED, dtype=torch.int32, device=device)
        self.device, self.slots, self.taken, self.lock = device, dict[int, int](), 0, Lock()

    def counters(self, tiles: int) -> Tensor:
        """Zeroed counters for a launch on the current stream."""
        with self.lock:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                at, self.taken = self.taken, self.taken + tiles
                return self.captured[at : at + tiles] if at + tiles <= CAPTURED else self.fresh(tiles)
            stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
            slot = self.slots.setdefault(stream, len(self.slots))
        return self.streams[slot] if slot < STREAMS else self.fresh(tiles)

    def fresh(self, tiles: int) -> Tensor:
        """Newly allocated zeros for this launch alone."""
        return torch.zeros(tiles, dtype=torch.int32, device=self.device)


@lru_cache(maxsize=16)
def room(device: torch.device) -> Room:
    """The counters of a device, created once."""
    return Room(device)
