"""Export to compressed-tensors, which stock transformers and vLLM load; integers and scales are written unchanged.

Scales are written in the artifact's dtype, or in float32 for a float32 model. Loaders cast them to the model's dtype,
so the weights of a bfloat16 model may be off by up to 2**-8, and those of a float32 or float16 model are exact.
transformers decodes all weights at the first forward pass; vLLM keeps them packed. Masks are not represented: pruned
entries, 2:4 or not, are stored as zeros and save no space.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from compress.artifact import Artifact
from compress.errors import RecipeError, UnsupportedWeight, VerificationError
from compress.export.folder import EXPERTS, Exported, Form, write_folder
from compress.export.leaf import Leaf
from compress.export.words import to_nibbles, to_words
from compress.weights import Codebook, Dense, Quantized, Scaled

NAME = "compressed-tensors"
WIDTHS = (2, 4, 8)  # the layout of other widths changed between versions 0.17 and 0.19 of the library
TOKEN = {"symmetric": True, "dynamic": True, "strategy": "token", "num_bits": 8}
INPUTS = {"": None, "int8": {"type": "int", **TOKEN}, "fp8": {"type": "float", **TOKEN}}
FP4 = {"nvfp4": ("tensor_group", 16, "float8_e4m3fn"), "mxfp4": ("group", 32, "uint8")}
BIAS = 127  # of the exponent in e8m0


def export_compressed_tensors(path: Path, out: Path) -> Exported:
    """Write the artifact at `path` for compressed-tensors.

    Raises the errors of `write_folder`, and RecipeError if the library is not installed.

    Source: the library's compressors (github.com/vllm-project/compressed-tensors, 0.20), one for each format.
    """
    try:
        import compressed_tensors
    except ImportError as error:
        raise RecipeError(f"--to {NAME} needs compressed-tensors: pip install compressed-tensors") from error
    del compressed_tensors
    return write_folder(path, out, CompressedTensors)


class CompressedTensors(Form):
    """The compressed-tensors format: integers by group or row, e4m3 by row, tensor or 128x128, nvfp4 and mxfp4.

    Each site has its own scheme, except that all experts of a model must have the same.
    """

    name = NAME
    experts = True

    def __init__(self, artifact: Artifact) -> None:
        super().__init__(artifact)
        held = [site for site in artifact.specs if EXPERTS in site]
        if len({self.schemes[site].model_dump_json() if site in self.schemes else "" for site in held}) > 1:
            raise UnsupportedWeight(f"{held[0]}: {NAME} has one scheme for all experts of a model; use --to dense")

    def scheme(self, site: Leaf) -> Any:
        """The library's scheme for a site, without targets."""
        from compressed_tensors.quantization import QuantizationScheme

        match site.weight:
            case Dense():
                return None
            case Quantized():
                kind, weights = self.integers(site, site.weight)
            case Scaled():
                kind, weights = self.floats(site, site.weight)
            case Codebook(name="nvfp4" | "mxfp4"):
                kind, weights = self.fp4(site, site.weight)
            case _:
                raise site.refused(
                    NAME, "it has formats only for integers on a grid, e4m3, nvfp4 and mxfp4", "use --to dense"
                )
        return QuantizationScheme.model_validate(
            {"targets": [], "weights": weights, "input_activations": INPUTS[site.inputs], "format": kind}
        )

    def integers(self, site: Leaf, weight: Quantized) -> tuple[str, dict[str, Any]]:
        """The format and arguments for integers: packed in words, or plain int8 if inputs are rounded too."""
        if weight.bits not in WIDTHS:
            reason = f"its versions differ in how they lay out {weight.bits}-bit integers"
            raise site.refused(NAME, reason, "use bits: 2, 4 or 8, or --to dense")
        if weight.zero is not None:
            reason = "stock transformers fails on a stored zero point (size mismatch of weight_zero_point)"
            raise site.refused(NAME, reason, "use symmetric: true, --to gptq, or --to dense")
        if site.inputs == "fp8":
            raise site.refused(
                NAME, "with integer weights, inputs can be rounded only to int8", "use inputs: int8, or --to dense"
            )
        grouped = weight.scale.shape[1] > 1
        if site.inputs and (weight.bits < 8 or grouped):
            raise site.refused(NAME, "int8 inputs need 8 bits and one scale per row", "use bits: 8, group: 0")
        args = {"num_bits": weight.bits, "type": "int", "strategy": "group" if grouped else "channel"}
        group = {"group_size": weight.group} if grouped else {}
        return "int-quantized" if site.inputs else "pack-quantized", {**args, **group}

    def floats(self, site: Leaf, weight: Scaled) -> tuple[str, dict[str, Any]]:
        """The format and arguments for e4m3, which takes one byte per weight."""
        args: dict[str, Any] = {"num_bits": 8, "type": "float"}
        if weight.data.dtype != torch.float8_e4m3fn:
            raise site.refused(NAME, "its only 8-bit float format is e4m3", "use e4m3, or --to dense")
        if site.inputs == "int8":
            raise site.refused(
                NAME, "with float weights, inputs can be rounded only to fp8", "use inputs: fp8, or --to dense"
            )
        if weight.scale.numel() == 1:
            return "float-quantized", {**args, "strategy": "tensor"}
        if weight.scale.shape == (weight.shape[0], 1):
            return "float-quantized", {**args, "strategy": "channel"}
        if weight.rows > 1 and not weight.shape[1] % weight.columns:
            return "float-quantized", {**args, "strategy": "block", "block_structure": [weight.rows, weight.columns]}
        reason = (
            f"no strategy has tiles of {weight.rows}x{weight.columns} in a {weight.shape[0]}x{weight.shape[1]} matrix"
        )
        raise site.refused(NAME, reason, "use one scale per row, per matrix or per 128x128 tile, or --to dense")

    def fp4(self, site: Leaf, weight: Codebook) -> tuple[str, dict[str, Any]]:
        """The format and arguments for 4-bit floats, of which two are stored per byte."""
        strategy, group, dtype = FP4[weight.name]
        if weight.scale.shape != (weight.shape[0], weight.shape[1] // group):
            raise site.refused(NAME, f"{weight.name} has one scale for every {group} inputs", "use --to dense")
        if self.artifact.dtype != torch.bfloat16:
            reason = f"transformers decodes {weight.name} in bfloat16 and cannot run it in a model of another dtype"
            raise site.refused(NAME, reason, "use --to dense")
        if site.inputs:
            raise site.refused(NAME, f"with {weight.name}, inputs cannot be rounded", "use inputs: full, or --to dense")
        if weight.name == "nvfp4" and not is_nested(weight):
            raise site.refused(NAME, "nvfp4 has e4m3 scales and one further scale per matrix", "use --to dense")
        dtypes = {"scale_dtype": f"torch.{dtype}", "zp_dtype": f"torch.{dtype}"}
        args = {"num_bits": 4, "type": "float", "strategy": strategy, "group_size": group, **dtypes}
        return f"{weight.name}-pack-quantized", args

    def pack(self, site: Leaf, scheme: Any) -> dict[str, Tensor]:
        """The tensors that the library would write, made from the artifact's codes."""
        match site.weight:
            case Quantized(codes, scale, _, bits):
                scale = self.kept(scale.expand(codes.shape[0], -1))  # a scale for the whole matrix repeats in every row
                if scheme.format == "int-quantized":
                    return {"weight": (codes.short() - 2 ** (bits - 1)).to(torch.int8), "weight_scale": scale}
                shape = torch.tensor(codes.shape)
                return {"weight_packed": to_words(codes, bits), "weight_scale": scale, "weight_shape": shape}
            case Scaled(data, scale):
                scale = self.kept(scale)
                return {"weight": data, "weight_scale": scale.reshape(-1) if scale.numel() == 1 else scale}
            case Codebook(codes, _, Scaled(data, scale), "nvfp4"):
                packed = to_nibbles(codes, first_low=True)
                return {
                    "weight_packed": packed,
                    "weight_scale": data,
                    "weight_global_scale": 1 / scale.reshape(1).float(),
                }
            case Codebook(codes, _, scale, _):
                exponents = scale.dense().float().log2().round().add(BIAS).to(torch.uint8)
                return {"weight_packed": to_nibbles(codes, first_low=True), "weight_scale": exponents}
            case _:
                raise site.refused(NAME, "it has no layout for it", "use --to dense")

    def kept(self, scale: Tensor) -> Tensor:
        """The scale in the dtype in which it is written; float32 for a float32 model.

        If the library decodes while loading, it does so in the dtype of the file.
        """
        return scale.to(torch.float32 if self.artifact.dtype == torch.float32 else scale.dtype)

    def unpack(self, stored: Mapping[str, Tensor], scheme: Any, dtype: torch.dtype) -> Tensor:
        """The matrix as the library's own compressor decodes it."""
        from compressed_tensors.compressors import BaseCompressor

        cast = dict(stored)
        if stored["weight_scale"].dtype in (torch.float16, torch.bfloat16, torch.float32):
            cast["weight_scale"] = stored["weight_scale"].to(dtype)
        read = BaseCompressor.get_value_from_registry(str(scheme.format)).decompress(cast, scheme)
        return torch.as_tensor(read["weight"]).to(dtype)

    def slack(self, scheme: Any) -> float:
        """2**-8 for FP4, which the library decodes in bfloat16 whatever the model's dtype; 0 otherwise."""
        return 2.0**-8 if scheme.format.startswith(("nvfp4", "mxfp4")) else 0.0

    def config(self) -> dict[str, Any]:
        """The library's config: one group per scheme, which targets its sites by the names of the model's modules."""
        import compressed_tensors
        from compressed_tensors.quantization import QuantizationConfig

        groups: dict[str, list[str]] = {}
        schemes = {site: scheme.model_dump_json() for site, scheme in self.schemes.items()}
        for site, told in schemes.items():
            groups.setdefault(told, []).append(site)
        described = {
            f"group_{i}": {**json.loads(told), "targets": self.targets(sites)}
            for i, (told, sites) in enumerate(groups.items())
        }
        formats = {group["format"] for group in described.values()}
        config = QuantizationConfig.model_validate(
            {
                "config_groups": described,
                "format": formats.pop() if len(formats) == 1 else "mixed-precision",
                "ignore": self.plain(),
                "quantization_status": "compressed",
            }
        )
        told = json.loads(config.model_dump_json())
        return {**told, "version": compressed_tensors.__version__, "sparsity_config": {}, "transform_config": {}}

    def targets(self, sites: list[str]) -> list[str]:
        """The modules of sites; experts share one pattern, because loaders hold them in one tensor."""
        named = [self.module_of(self.key_of(site)) for site in sites if EXPERTS not in site]
        return named + ([f"re:.*{re.escape(EXPERTS)}.*"] if len(named) < len(sites) else [])

    def check_config(self, told: Mapping[str, Any]) -> None:
        """Raise VerificationError unless the library finds the module of every site, with its scheme, and no others.

        A loader leaves the weight of a module that it does not find at random values. Experts of a stack are no
        modules: their names in the file must match.
        """
        from compressed_tensors.quantization import QuantizationConfig
        from compressed_tensors.utils import match_named_modules, match_targets

        config = QuantizationConfig.model_validate({k: told[k] for k in QuantizationConfig.model_fields if k in told})
        groups = {target: group for group in config.config_groups.values() for target in group.targets}
        modules = dict(self.anatomy.model.named_modules())
        found = dict(match_named_modules(self.anatomy.model, groups, config.ignore))
        taken = {name for name, module in found.items() if isinstance(module, nn.Linear | nn.Embedding)}
        names = {site: self.module_of(self.key_of(site)) for site in self.schemes}
        for site, name in names.items():
            stacked = EXPERTS in site and name not in modules
            by = match_targets(name, modules.get(name, nn.Module()), groups) if stacked or name in taken else []
            read = groups[by[0]].model_copy(update={"targets": []}).model_dump_json() if by else ""
            if read != self.schemes[site].model_dump_json():
                raise VerificationError(f"{site}: no target in config.json gives the module {name} its scheme")
        if dense := sorted(taken - set(names.values())):
            raise VerificationError(f"{dense[0]}: is stored dense, but a target in config.json names it")

    def note(self, rounding: float) -> str:
        """One line on the cost of the cast to the model's dtype, and on FP4."""
        cast = (
            f"loading rounds to the model's dtype, which changes a matrix by up to {rounding:.1e}"
            if rounding
            else "exact"
        )
        fp4 = "; run it in bfloat16" if any(self.slack(scheme) for scheme in self.schemes.values()) else ""
        return f"{cast}; stock transformers loads it{fp4}"


def is_nested(weight: Codebook) -> bool:
    """Whether the scales are e4m3 numbers that share one scale for the matrix."""
    match weight.scale:
        case Scaled(data, scale):
            return data.dtype == torch.float8_e4m3fn and scale.numel() == 1
        case _:
            return False
