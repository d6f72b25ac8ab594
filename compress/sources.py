"""Opening a model folder, however its weights are stored: plain, float8 with scales, or compressed by a method.

Float8 is treated as a storage format and decoded silently. A model that was quantized by a method has already lost
something: compressing it again is refused, naming the method, unless the user asks for its weights to be decoded.
"""

from __future__ import annotations

import re
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from compress.artifact import METHOD, Artifact
from compress.errors import ArtifactError
from compress.foreign import CompressedTensors
from compress.model.source import NAMES, Checkpoint, Held, dtype_of

FLOAT8 = ("F8_E4M3", "F8_E5M2")
SCALES = ("_scale_inv", "_scale")  # weights are multiplied by either; DeepSeek's `inv` is of the quantizer's scale
BESIDE = re.compile(r"(weight_scale(_inv)?|input_scale|activation_scale|k_scale|v_scale)$")
USUAL = 128  # side of a block in every published float8 checkpoint with blocks
DECODED = (METHOD, "compressed-tensors")


def open_source(path: Path, dequantize: bool = False) -> Checkpoint:
    """Open a model folder as a checkpoint of plain tensors.

    Raises ArtifactError for a delta, and for a model that a method has quantized, unless `dequantize` is set and the
    method can be decoded.
    """
    plain = Checkpoint(path)
    quantization = plain.config.get("quantization_config") or {}
    if (
        isinstance(quantization, dict)
        and (pin := quantization.get("base"))
        and quantization.get("quant_method") == METHOD
    ):
        name = pin.get("name") if isinstance(pin, dict) else pin
        raise ArtifactError(f"{path}: is a delta of {name}; make a model of it with `compress delta apply`")
    method = quantization.get("quant_method", "an unnamed method") if isinstance(quantization, dict) else "?"
    float8 = sorted(name for name, held in plain.headers.items() if held.dtype in FLOAT8)
    if quantization and method not in DECODED and not (float8 and only_float8(plain)):
        raise ArtifactError(f"{path}: already quantized by {method}; start from the dense model")
    if quantization and method in DECODED and not dequantize:
        raise ArtifactError(
            f"{path}: already quantized by {method}; start from the dense model, or decode it: `compress run` with "
            "--dequantize, `compress export --to dense`"
        )
    if method == METHOD:
        return Artifact(path)
    if method == "compressed-tensors":
        return CompressedTensors(path)
    if not float8:
        return plain
    opened = Float8(path)
    bare = [name for name in float8 if name not in opened.scales and name not in opened.scales.values()]
    if quantization and bare:  # a scale under an unknown name would otherwise be ignored silently
        raise ArtifactError(f"{path}: quantized by {method}, but {bare[0]} has no scale")
    return opened


def only_float8(source: Checkpoint) -> bool:
    """Whether every stored tensor is floating point, so that decoding needs nothing but scales."""
    return all(held.dtype.startswith(("F8", "F16", "F32", "F64", "BF16")) for held in source.headers.values())


class Float8(Checkpoint):
    """A checkpoint with float8 weights, read as plain weights in the dtype of the config."""

    decoded_from = "float8"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        told = self.config.get("quantization_config")
        self.block = block_size(told.get("weight_block_size"), path) if isinstance(told, dict) else None
        self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}
        self.dtype = dtype_of(self.config)

    @cached_property
    def scales(self) -> dict[str, str]:
        """The tensor that holds the scale of each float8 tensor that has one, by name."""
        stored = self.stored_headers
        found: dict[str, str] = {}
        for name, held in stored.items():
            if held.dtype in FLOAT8:
                beside = next((f"{name}{suffix}" for suffix in SCALES if f"{name}{suffix}" in stored), None)
                if beside:
                    found[name] = beside
        return found

    @cached_property
    def headers(self) -> dict[str, Held]:
        """The dtype and shape of each decoded tensor; scales are left out."""
        stored = self.stored_headers
        gone = {n for n in stored if BESIDE.search(n) and BESIDE.sub("weight", n) in stored} | set(self.scales.values())
        wide = NAMES[self.dtype]
        return {n: h._replace(dtype=wide if h.dtype in FLOAT8 else h.dtype) for n, h in stored.items() if n not in gone}

    def names(self) -> list[str]:
        """The names of the decoded tensors, sorted."""
        return sorted(self.headers)

    def tensor(self, name: str) -> Tensor:
        """One tensor, decoded if it is float8; raises ArtifactError if its scale does not fit it."""
        found = self.stored_tensor(name)
        if found.dtype not in (torch.float8_e4m3fn, torch.float8_e5m2):
            return found
        if name not in self.scales:
            return found.to(self.dtype)
        scale = self.stored_tensor(self.scales[name]).float()
        whole = spread(scale, tuple(found.shape), self.block)
        if whole is None:
            raise ArtifactError(
                f"{name}: its scale of {tuple(scale.shape)} does not fit a weight of {tuple(found.shape)}"
            )
        return found.float().mul_(whole).to(self.dtype)


def spread(scale: Tensor, shape: tuple[int, ...], block: list[int] | None = None) -> Tensor | None:
    """A scale per tensor, row or block [rows, columns], made broadcastable to the weight's shape; None if it misfits.

    The last block along an axis may be smaller.
    """
    if scale.numel() == 1:
        return scale.reshape(())
    if len(shape) < 2:
        return None
    if scale.ndim == 1 and scale.shape[0] == shape[-2]:
        scale = scale[:, None]
    if scale.ndim != len(shape):
        return None
    for axis in (-2, -1):
        if scale.shape[axis] not in (1, shape[axis]):
            width = block[axis] if block else block_width(shape[axis], scale.shape[axis])
            if -(-shape[axis] // width) != scale.shape[axis]:
                return None
            scale = scale.repeat_interleave(width, axis).narrow(axis, 0, shape[axis])
    return scale


def block_width(size: int, count: int) -> int:
    """The width of a block if the config does not say: an even share if `count` divides `size`, else 128."""
    return size // count if size % count == 0 else USUAL


def block_size(told: Any, path: Path) -> list[int] | None:
    """The `weight_block_size` of a config, or None; raises ArtifactError if it is not a pair of positive integers."""
    if told is None:
        return None
    if not isinstance(told, (list, tuple)) or len(told) != 2 or not all(isinstance(n, int) and n > 0 for n in told):
        raise ArtifactError(f"{path}: weight_block_size {told!r} is not a pair of positive numbers")
    return [int(n) for n in told]
