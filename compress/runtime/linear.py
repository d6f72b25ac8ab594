"""The module that stands where a linear map was: stored tensors as buffers, computation lowered from them.

The stored tensors are its state dict, so saving writes back exactly what was read. `weight` is the payload that
keeps the source's key; code that only wants its dtype or device finds those.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifact import keys
from compress.errors import ArtifactError
from compress.runtime.lower import lower
from compress.weights import Weight, unpack


class CompressedLinear(nn.Module):
    """`x @ W.T + b` with W a stored weight expression.

    Until `prepare` is called, and always with `low_memory`, W is decoded at every call and dropped.
    """

    def __init__(self, spec: dict[str, Any], bias: nn.Parameter | None) -> None:
        super().__init__()
        self.spec = spec
        self.out_features, self.in_features = (int(n) for n in spec["tree"]["shape"])
        self.names = {path: key.removeprefix("site.") for path, key in keys("site", spec).items()}
        for path, dtype, shape in spec["tensors"]:
            kind = getattr(torch, str(dtype), None)
            if not isinstance(kind, torch.dtype):
                raise ArtifactError(f"quantization_config: {path} has the unknown dtype {dtype!r}")
            empty = torch.empty(shape, dtype=kind, device="meta")
            self.register_buffer(self.names[path], empty)
        self.bias = bias
        self.lowered: nn.Module | None = None

    @property
    def expression(self) -> Weight:
        """The weight expression that the buffers hold."""
        return unpack(self.spec["tree"], {path: self.get_buffer(name) for path, name in self.names.items()})

    def prepare(self, dtype: torch.dtype) -> None:
        """Decode once into the fastest module for inputs of `dtype`."""
        self.lowered = lower(self.expression, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        y: Tensor = self.expression.linear(x) if self.lowered is None else self.lowered(x)
        return y if self.bias is None else y + self.bias

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        """Move stored tensors with the module, but never cast them: they are the file's, not the computation's."""
        stored = {name: self._buffers.pop(name) for name in self.names.values()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            if tensor is not None:
                device = fn(torch.empty(0, device=tensor.device)).device
                self._buffers[name] = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"in={self.in_features}, out={self.out_features}, {self.spec['name']}, bias={self.bias is not None}"
