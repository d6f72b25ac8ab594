"""Checkpoints that other tools have quantized, read as the plain weights they decode to.

Decoding is done by the libraries that define the formats; this module only presents the result as a `Checkpoint`, one
tensor at a time.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from compress.errors import ArtifactError, first_line, pass_on_memory
from compress.model.source import NAMES, Checkpoint, Held, dtype_of


class CompressedTensors(Checkpoint):
    """A folder in the format compressed-tensors; raises ArtifactError if the library is missing or refuses it."""

    decoded_from = "compressed-tensors"

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            from compressed_tensors.entrypoints.convert.converters import CompressedTensorsDequantizer
        except ImportError as error:
            raise ArtifactError(f"{path}: decoding it needs `pip install compressed-tensors`") from error
        self.dtype = dtype_of(self.config)
        try:
            self.decoder: Any = CompressedTensorsDequantizer(str(path), dtype=self.dtype)
        except Exception as error:  # the library raises whatever its validation finds
            pass_on_memory(error)
            raise ArtifactError(f"{path}: compressed-tensors cannot decode it: {first_line(error)[:200]}") from error
        self.config = {key: value for key, value in self.config.items() if key != "quantization_config"}

    @cached_property
    def parts(self) -> dict[str, list[str]]:
        """The stored tensors that each decoded tensor is made of, by its name."""
        found: dict[str, list[str]] = {}
        for name in self.stored_headers:
            others = sorted(self.decoder.get_dependencies(name))
            if others:
                missing = [other for other in others if other not in self.files]
                if missing:
                    raise ArtifactError(f"{self.path}: {name} needs {missing[0]!r}, which is missing")
                found[f"{name.rpartition('.')[0]}.weight"] = [name, *others]
        return found

    @cached_property
    def headers(self) -> dict[str, Held]:
        """The dtype and shape of each tensor after decoding."""
        stored = self.stored_headers
        used = {part for parts in self.parts.values() for part in parts}
        plain = {name: held for name, held in stored.items() if name not in used}
        return plain | {name: Held(NAMES[self.dtype], self._shape(name, parts)) for name, parts in self.parts.items()}

    def _shape(self, name: str, parts: list[str]) -> tuple[int, ...]:
        """The shape of a decoded tensor: stored beside it, or that of its stored tensor, or found by decoding it."""
        told = next((part for part in parts if part.endswith("weight_shape")), None)
        if told:
            return tuple(int(n) for n in self.stored_tensor(told))
        return self.stored_headers[parts[0]].shape if name in parts else tuple(self.tensor(name).shape)

    def names(self) -> list[str]:
        """The names of the decoded tensors, sorted."""
        return sorted(self.headers)

    def tensor(self, name: str) -> Tensor:
        """One tensor, decoded if it is quantized."""
        if name not in self.parts:
            return self.stored_tensor(name)
        try:
            made: Tensor = self.decoder.process({part: self.stored_tensor(part) for part in self.parts[name]})[name]
        except Exception as error:  # the library raises many types for tensors that do not fit its configuration
            pass_on_memory(error)
            raise ArtifactError(f"{name}: compressed-tensors cannot decode it: {first_line(error)[:200]}") from error
        return made
