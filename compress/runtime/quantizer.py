"""transformers' view of an artifact: its quantization config and its quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.artifact import METHOD, VERSION
from compress.errors import ArtifactError
from compress.model.family import is_linear
from compress.runtime.linear import CompressedLinear


@register_quantization_config(METHOD)
class CompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The specification of every compressed site; `low_memory` is a choice at load time and not saved."""

    def __init__(
        self,
        weights: dict[str, Any] | None = None,
        version: int = VERSION,
        low_memory: bool = False,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version, self.weights, self.low_memory = version, weights or {}, low_memory
        if version != VERSION:
            raise ArtifactError(f"quantization_config: format version {version}, this program reads {VERSION}")

    def to_dict(self) -> dict[str, Any]:
        """What config.json holds."""
        return {"quant_method": METHOD, "version": self.version, "weights": self.weights}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config given to `from_pretrained` may change: how, not what."""
        return {"low_memory": self.low_memory}


@register_quantizer(METHOD)
class CompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Swaps sites for `CompressedLinear` before loading, and lowers them after."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for name, spec in self.quantization_config.weights.items():
            try:
                old = model.get_submodule(name)
            except AttributeError as error:
                raise ArtifactError(f"quantization_config: the model has no site {name!r}") from error
            if not is_linear(old):
                raise ArtifactError(f"quantization_config: {name!r} is a {type(old).__name__}, not a linear map")
            parent, _, leaf = name.rpartition(".")
            setattr(model.get_submodule(parent), leaf, CompressedLinear(spec, getattr(old, "bias", None)))

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        if not self.quantization_config.low_memory:
            with torch.inference_mode(False), torch.no_grad():
                for module in model.modules():
                    if isinstance(module, CompressedLinear):
                        module.prepare(dtype)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """Artifacts save as they were read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Not yet."""
        return False
