"""What a launch needs beside tensors: tile sizes and splits for a shape, workspaces, whether we are interpreted."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from functools import lru_cache
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from compress_kernels import dispatch, formats

BUSY = 2  # programs of four warps for each multiprocessor that splitting the inputs aims at; specs: 2 to 4
MULTIPROCESSORS = 132  # of an H100 or H200; taken where there is no GPU
SHARED = 232_448  # bytes of shared memory of a program, as above
COUNTERS = 1 << 14  # tiles of one launch that may split the inputs
STREAMS = 32
CAPTURED = 1 << 20  # counters of captured launches, for the life of the process
SIZES = ("rows", "outputs", "splits", "warps", "stages")  # of a configuration in a profile


@dataclass(frozen=True, kw_only=True)
class Config:
    """Tile of rows of x and of outputs, programs that share one tile, warps, stages of the pipeline.

    Without `assembly` decoding is plain Triton: slower, for comparison. `dense` decodes the weight first. `subnormal`
    reads codes as subnormal float16 numbers, with the fewest instructions; it is off: an H200 takes such numbers as
    they are, but whether it is faster was not measured.
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
        """Whether to decode in inline assembly, which the interpreter does not know."""
        return self.assembly and not interpreted()


def heuristic(m: int, n: int, device: torch.device) -> Config:
    """A fair tile for x of `m` rows and `n` outputs, not measured; a kernel fits it to its registers, then `split`."""
    rows = next((tile for tile in (8, 16, 32, 64) if m <= tile), 64)
    outputs = 64 if n % 128 or n * -(-m // rows) < 128 * multiprocessors(device) else 128
    return Config(rows=rows, outputs=outputs)


def split(config: Config, m: int, n: int, blocks: int, device: torch.device) -> Config:
    """The configuration with enough programs to keep the GPU busy, that share so many blocks of inputs."""
    tiles = -(-n // config.outputs) * -(-m // config.rows)
    return replace(config, splits=splits_for(tiles, blocks, device, config.warps))


def tuned(kind: str, m: int, n: int, k: int, blocks: int, device: torch.device) -> Config | None:
    """The configuration that `compress tune` found fastest on this GPU for a kind of packed form, if it was asked.

    It was measured at the nearest size: a tile that this size does not have is not taken, nor splits that it has not.
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
    """Programs of so many warps that share the inputs of each of so many tiles, a power of two."""
    splits, most = 1, BUSY * multiprocessors(device)
    while splits < 16 and tiles * splits * 2 * warps <= 4 * most and splits * 2 <= blocks:
        splits *= 2
    return splits if tiles <= COUNTERS else 1


def run(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    """Launch a kernel on the device of its first argument, a tensor; Triton would take the current device."""
    with torch.cuda.device_of(arguments[0]):
        kernel[grid](*arguments, **constants)


@lru_cache(maxsize=16)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; the H200's where there is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else MULTIPROCESSORS


@lru_cache(maxsize=16)
def shared(device: torch.device) -> int:
    """Bytes of shared memory that a program may have; the H200's where there is no GPU."""
    if device.type != "cuda":
        return SHARED
    properties = torch.cuda.get_device_properties(device)
    return int(properties.shared_memory_per_block_optin)  # type: ignore[attr-defined]  # torch's stub lacks it


def interpreted() -> bool:
    """Whether kernels run in Triton's interpreter, which knows no inline assembly."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def workspace(config: Config, m: int, n: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Memory for the partial sums of one launch, and counters that are zero before and after every launch.

    Partial sums come from torch's allocator, which CUDA graphs know. Raises RuntimeError if the first launch on a
    device is being captured.
    """
    parts = config.splits * m * n if config.splits > 1 else 1
    tiles = -(-n // config.outputs) * -(-m // config.rows) if config.splits > 1 else 1
    return torch.empty(parts, dtype=torch.float32, device=device), room(device).counters(tiles)


class Room:
    """The counters of one device: launches that may run at once never share them.

    Those of a stream run one after another; a captured launch has its own for good, since graphs are replayed on any
    stream. What finds no room gets fresh zeros, which cost a launch of their own.
    """

    def __init__(self, device: torch.device) -> None:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():  # they would be zeroed at replay only
            raise RuntimeError("the first launch on a device cannot be captured in a CUDA graph: run the model once")
        with torch.inference_mode(False):
            self.streams = torch.zeros(STREAMS, COUNTERS, dtype=torch.int32, device=device)
            self.captured = torch.zeros(CAPTURED, dtype=torch.int32, device=device)
        self.device, self.slots, self.taken, self.lock = device, dict[int, int](), 0, Lock()

    def counters(self, tiles: int) -> Tensor:
        """Zeros for a launch on the current stream."""
        with self.lock:
            if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
                at, self.taken = self.taken, self.taken + tiles
                return self.captured[at : at + tiles] if at + tiles <= CAPTURED else self.fresh(tiles)
            stream = torch.cuda.current_stream(self.device).cuda_stream if self.device.type == "cuda" else 0
            slot = self.slots.setdefault(stream, len(self.slots))
        return self.streams[slot] if slot < STREAMS else self.fresh(tiles)

    def fresh(self, tiles: int) -> Tensor:
        """Zeros of this launch alone."""
        return torch.zeros(tiles, dtype=torch.int32, device=self.device)


@lru_cache(maxsize=16)
def room(device: torch.device) -> Room:
    """The counters of a device, made once."""
    return Room(device)
