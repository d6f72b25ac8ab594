"""What transformers needs to load and save an artifact: the quantization config and the quantizer."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers.core_model_loading import WeightRenaming
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from compress.artifact import METHOD, VERSION, keys, plain_shapes
from compress.errors import ArtifactError, RecipeError
from compress.kv import read_kept, written
from compress.model.anatomy import Anatomy, Place
from compress.runtime.experts import CompressedExperts, compress_experts
from compress.runtime.kv import attach
from compress.runtime.linear import CompressedLinear, buffers, share_inputs
from compress.runtime.names import StoredNames


@register_quantization_config(METHOD)
class CompressConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """The specifications of all compressed sites and of the key-value cache.

    `low_memory` is chosen at load time and not saved. Raises ArtifactError for another format version, for a delta and
    for an invalid cache specification.
    """

    def __init__(
        self,
        weights: dict[str, Any] | None = None,
        version: int = VERSION,
        low_memory: bool = False,
        kv: dict[str, Any] | str | None = None,
        base: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        self.quant_method = METHOD
        self.version, self.weights, self.low_memory = version, weights or {}, low_memory
        if version != VERSION:
            raise ArtifactError(f"quantization_config: format version {version}, this program reads {VERSION}")
        if base is not None:
            instead = "load it with compress.load and give its base"
            raise ArtifactError(f"quantization_config: this is a delta of {base.get('name')}; {instead}")
        try:
            self.kv = None if kv is None else read_kept(kv)
        except RecipeError as error:
            raise ArtifactError(f"quantization_config: {error}") from error

    def to_dict(self) -> dict[str, Any]:
        """The `quantization_config` that config.json holds."""
        kv = {"kv": written(self.kv)} if self.kv else {}
        return {"quant_method": METHOD, "version": self.version, "weights": self.weights, **kv}

    def get_loading_attributes(self) -> dict[str, Any]:
        """What a config passed to `from_pretrained` may override: how to compute, not what is stored."""
        return {"low_memory": self.low_memory}


@register_quantizer(METHOD)
class CompressQuantizer(HfQuantizer):  # type: ignore[misc]
    """Replaces the sites' modules by compressed ones before the weights are loaded, and lowers them afterwards."""

    requires_calibration = True

    def _process_model_before_weight_loading(self, model: nn.Module, **_: Any) -> None:
        specs = self.quantization_config.weights
        places = Anatomy(model, plain_shapes(specs)).places
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        self.table: dict[str, str] = {}
        self.shared: dict[str, str] = {}
        stacked: dict[str, list[tuple[Place, dict[str, Any]]]] = {}
        for site in specs:
            spec, place = specs[site], places.get(site)
            if place is None:
                raise ArtifactError(f"quantization_config: the model has no site {site!r}")
            if place.expert is not None:
                stacked.setdefault(place.module, []).append((place, spec))
                continue
            old = model.get_submodule(place.module)
            parent, leaf = place.module.rpartition(".")[::2]
            setattr(model.get_submodule(parent), leaf, CompressedLinear(spec, getattr(old, "bias", None), dtype))
            self._enter(site, spec, place.module)
        for within, stored in stacked.items():
            compress_experts(model.get_submodule(within), stored, dtype)
            for i, (place, part) in enumerate(stored):
                self._enter(place.site, part, f"{within}.stored.{i}")

    def _enter(self, site: str, spec: dict[str, Any], module: str) -> None:
        """Record which buffers of `module` the stored tensors of a site are loaded into."""
        held = buffers(spec)
        named = {path: (key, f"{module}.{held[path]}") for path, key in keys(site, spec).items()}
        others = spec.get("shared", {})
        self.table |= dict(pair for path, pair in named.items() if path not in others)
        self.shared |= {buffer: key for path, (key, buffer) in named.items() if path in others}

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        """The family's rules, where the keys that this package stored are looked up in a table before any renaming."""
        renamings = [rule for rule in weight_conversions if isinstance(rule, WeightRenaming)]
        others = [rule for rule in weight_conversions if not isinstance(rule, WeightRenaming)]
        return [StoredNames(self.table, renamings), *others]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> None:
        for buffer, key in self.shared.items():
            place, name = buffer.rsplit(".", 1)
            model.get_submodule(place).register_buffer(name, model.get_buffer(self.table[key]), persistent=False)
        dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        lean = self.quantization_config.low_memory
        with torch.inference_mode(False), torch.no_grad():
            for module in model.modules():
                if isinstance(module, CompressedLinear):
                    module.prepare(dtype, lean=lean)
                elif isinstance(module, CompressedExperts) and not lean:
                    module.prepare(dtype)
        share_inputs(model)
        if self.quantization_config.kv:
            attach(model, self.quantization_config.kv)

    def is_serializable(self, *_: Any, **__: Any) -> bool:
        """True: saving writes the stored tensors as they were read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """True: gradients pass through the frozen weights, so adapters beside them can be trained."""
        return True
