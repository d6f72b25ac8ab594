"""The modules that replace a matrix: they hold its stored tensors as buffers and compute with a lowered form of them.

The stored tensors are the state dict, so that saving writes back exactly what was read. `weight` gives a model's own
code what it expects under that name: the decoded matrix, in the dtype of the computation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from compress.errors import ArtifactError
from compress.runtime.lower import lower, lower_lean
from compress.runtime.maps import IntegerProduct, Packed, applied, differentiated, share
from compress.weights import Weight, rounded_for, unpack
from compress_kernels import w8a8


def buffers(spec: Mapping[str, Any]) -> dict[str, str]:
    """The name of the buffer for each stored tensor, keyed by the tensor's path in the specification tree."""
    paths = [path for path, _, _ in spec["tensors"]]
    return {path: f"stored_{path.replace('.', '_')}" for path in paths}


TOGETHER = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))  # modules that read one input, as usually named


class StoredWeight(nn.Module):
    """A weight expression in its stored form; raises ArtifactError for a specification with an unknown dtype."""

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__()
        self.spec, self.names = spec, buffers(spec)
        self.out_features, self.in_features = (int(n) for n in spec["tree"]["shape"])
        for path, dtype, shape in spec["tensors"]:
            kind = getattr(torch, str(dtype), None)
            if not isinstance(kind, torch.dtype):
                raise ArtifactError(f"quantization_config: {path} has the unknown dtype {dtype!r}")
            own = path not in spec.get("shared", {})  # else it belongs to another module and is saved with that one
            self.register_buffer(self.names[path], torch.empty(shape, dtype=kind, device="meta"), persistent=own)

    @property
    def expression(self) -> Weight:
        """The weight expression that the buffers hold."""
        return unpack(self.spec["tree"], {path: self.get_buffer(name) for path, name in self.names.items()})

    def fill(self, stored: Mapping[str, Tensor]) -> None:
        """Set the stored tensors, given by their path in the specification tree."""
        for path, tensor in stored.items():
            self._buffers[self.names[path]] = tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> StoredWeight:
        """Move stored tensors with the module, but never cast them: their dtypes are those of the file."""
        stored = {name: self._buffers.pop(name) for name in self.names.values()}
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, tensor in stored.items():
            if tensor is not None:
                device = fn(torch.empty(0, device=tensor.device)).device
                self._buffers[name] = torch.empty_like(tensor, device=device) if tensor.is_meta else tensor.to(device)
        return self

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        inputs = f", inputs {self.spec['inputs']}" if "inputs" in self.spec else ""
        return f"in={self.in_features}, out={self.out_features}, {self.spec['name']}{inputs}"


class CompressedLinear(StoredWeight):
    """`x @ W.T + b`, where W is a stored weight expression.

    W is decoded at every call until `prepare` is called, and with `low_memory` also afterwards if no kernel reads its
    packed form.
    """

    def __init__(self, spec: dict[str, Any], bias: nn.Parameter | None, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(spec)
        self.bias = bias
        self.dtype = dtype
        self.device: torch.device | None = None  # where it computes, once prepared
        self.lowered: nn.Module | None = None
        self.asked: dict[str, bool] = {}  # the options of the last `prepare`

    def prepare(self, dtype: torch.dtype, *, floats: bool = False, lean: bool = False, park: bool = True) -> None:
        """Lower the weight to the fastest module for inputs of `dtype`.

        With `floats`, to the module that computes in floating point, as passes do. The two results differ at most in
        the last bits, but such a difference can move an input of the next layer to another quantization level. `lean`
        saves memory first: a weight that no kernel reads packed is decoded at every call. With `park`, stored tensors
        may move to host memory (see `park`).
        """
        self.dtype, self.asked = dtype, {"floats": floats, "lean": lean}
        self.device = next(self.buffers(recurse=False)).device
        inputs = self.spec.get("inputs", "")
        if lean:
            self.lowered = lower_lean(self.expression, dtype, inputs)
        else:
            self.lowered = lower(self.expression, dtype, inputs, floats=floats)
        if park:
            self.park()

    def park(self) -> None:
        """Move the stored tensors to host memory if a GPU computes with a packed form and does not need them."""
        if self.lowered is not None and any(isinstance(part, Packed) for part in self.lowered.modules()):
            self._put(torch.device("cpu"))

    def _put(self, device: torch.device) -> None:
        for name in self.names.values():
            self._buffers[name] = self.get_buffer(name).to(device)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> CompressedLinear:
        """Move the stored tensors, and lower the weight again if the device or dtype has changed."""
        lowered, self.lowered = self.lowered, None
        before = self.device or next(self.buffers(recurse=False)).device
        if self.device is not None:
            self._put(self.device)
        super()._apply(fn, recurse)
        probe = fn(torch.empty(0, dtype=self.dtype, device=before))
        if self.device is not None and (probe.device, probe.dtype) != (before, self.dtype):
            self.prepare(probe.dtype, **self.asked)
        else:
            self.dtype, self.lowered = probe.dtype, lowered
            self.park()
        return self

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *others: Any) -> None:
        """Load stored tensors, and lower the weight again if it was lowered before."""
        super()._load_from_state_dict(state_dict, prefix, *others)
        if self.device is not None and any(f"{prefix}{name}" in state_dict for name in self.names.values()):
            self._put(self.device)
            self.prepare(self.dtype, **self.asked)

    @property
    def weight(self) -> Tensor:
        """The matrix as the family's module would hold it, decoded at each access; before loading, a meta tensor."""
        if any(buffer.is_meta for buffer in self.buffers(recurse=False)):
            shape = (self.out_features, self.in_features)
            plain = torch.empty(shape, dtype=self.dtype, device="meta")
        else:
            plain = self.expression.dense().to(self.device, self.dtype)
        return plain.T if self.spec["transposed"] else plain

    def forward(self, x: Tensor) -> Tensor:
        """Map x [..., in] to [..., out]; raises TypeError for an integer x, which a plain linear layer rejects too."""
        if not x.is_floating_point():
            raise TypeError(f"a linear layer that computes in {self.dtype} was given {x.dtype}")
        if self.lowered is not None and not (differentiated(x) and rounds_exactly(self.lowered)):
            return applied(self.lowered, x, self.bias)
        y = self.reference(x)
        return y if self.bias is None else y + self.bias

    def reference(self, x: Tensor) -> Tensor:
        """`x @ W.T` with W decoded for this call; differentiable in x."""
        inputs = self.spec.get("inputs", "")
        stored = {path: self.get_buffer(name).to(x.device) for path, name in self.names.items()}  # may be parked
        expression = unpack(self.spec["tree"], stored)
        return expression.linear(rounded_for(expression, x, inputs) if inputs else x)


def rounds_exactly(lowered: nn.Module) -> bool:
    """Whether a lowered module rounds its input for a product of integers or 8-bit floats, which has no gradient."""
    forms = [part.form for part in lowered.modules() if isinstance(part, Packed)]
    return isinstance(lowered, IntegerProduct) or any(isinstance(form, w8a8.Packed) for form in forms)


def share_inputs(model: nn.Module) -> None:
    """Make prepared modules that read the same input transform and round it once (see `shared.py`)."""
    for parent in model.modules():
        for names in TOGETHER:
            found = [getattr(parent, name, None) for name in names]
            share([m.lowered for m in found if isinstance(m, CompressedLinear) and m.lowered is not None])
