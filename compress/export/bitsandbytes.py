"""Export to bitsandbytes: NF4 with plain or nested scales, or int8 with one scale per row, as transformers saves them.

NF4 decodes to the artifact's matrices bit for bit. Int8 decodes to them up to the last bit of a float32, but the
library also rounds a layer's inputs below 6.0 to int8 (LLM.int8), whatever the recipe did, so that its layers compute
slightly different outputs from this package's. All layers must be of one of the two kinds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.errors import RecipeError
from compress.export.folder import Exported, Form, write_folder
from compress.export.leaf import Leaf
from compress.export.words import to_nibbles
from compress.weights import BOOKS, Codebook, Dense, Nested, Quantized, Scaled, Weight
from compress.weights.leaves import DYNAMIC

NAME = "bitsandbytes"
BLOCKS = (32, 64, 128, 256, 512, 1024, 2048, 4096)
STATE = "weight.quant_state.bitsandbytes__nf4"
LEVELS = 127.0
OUTLIER = 6.0  # inputs of at least this magnitude stay in 16 bits


class Kind(NamedTuple):
    """How a site is stored: its bits and, for NF4, the weights per block and whether scales are quantized too."""

    bits: int
    block: int = 0
    nested: bool = False


def export_bitsandbytes(path: Path, out: Path) -> Exported:
    """Write the artifact at `path` for bitsandbytes.

    Raises the errors of `write_folder`, and RecipeError if bitsandbytes is not installed.

    Source: Dettmers et al., QLoRA, NeurIPS 2023; LLM.int8(), NeurIPS 2022; the library's `QuantState.as_dict`.
    """
    try:
        import bitsandbytes
    except ImportError as error:
        raise RecipeError(f"--to {NAME} needs bitsandbytes: pip install bitsandbytes") from error
    del bitsandbytes
    return write_folder(path, out, BitsAndBytes)


class BitsAndBytes(Form):
    """The bitsandbytes format: all sites NF4, or all sites int8 with one scale per row."""

    name = NAME

    def scheme(self, site: Leaf) -> Kind | None:
        """The kind of a site, or None if dense; raises UnsupportedWeight for other formats and for mixed widths."""
        match site.weight:
            case Dense():
                return None
            case Codebook(name="nf4"):
                found = self.nf4(site, site.weight)
            case Quantized(bits=8, zero=None):
                found = self.int8(site, site.weight)
            case _:
                reason = "it has only nf4 by blocks and symmetric 8-bit integers by row"
                raise site.refused(NAME, reason, f"use --to {others(site.weight)}")
        if found.bits != next(iter(self.schemes.values()), found).bits:
            raise site.refused(NAME, "all layers must have 4 bits, or all 8", "use --to compressed-tensors or dense")
        return found

    def nf4(self, site: Leaf, weight: Codebook) -> Kind:
        """The kind of an NF4 site; its blocks must be contiguous in the flattened matrix."""
        block = weight.shape[1] // weight.scale.shape[1]
        if site.inputs:
            raise site.refused(NAME, "its 4-bit layers do not round inputs", "use inputs: full, or --to dense")
        if block not in BLOCKS or weight.scale.shape[0] != weight.shape[0]:
            allowed = ", ".join(map(str, BLOCKS))
            raise site.refused(NAME, f"it has no blocks of {block}", f"use group: {allowed}, or --to dense")
        return Kind(4, block, isinstance(weight.scale, Nested))

    def int8(self, site: Leaf, weight: Quantized) -> Kind:
        """The kind of an int8 site, which must have one scale per row."""
        if weight.scale.shape[1] > 1:
            raise site.refused(NAME, "its 8-bit integers have one scale per row", "use group: 0, or --to dense")
        if site.inputs == "fp8":
            raise site.refused(NAME, "its 8-bit layers round inputs to int8", "use --to dense")
        return Kind(8)

    def pack(self, site: Leaf, scheme: Kind) -> dict[str, Tensor]:
        """The tensors that the library stores for a site."""
        match site.weight:
            case Quantized(codes, scale):
                rows = scale.expand(codes.shape[0], 1)
                integers = (codes.short() - 128).to(torch.int8)
                kept = torch.zeros((), dtype=torch.uint8)  # row-major
                return {"weight": integers, "SCB": rows.float().reshape(-1) * LEVELS, "weight_format": kept}
            case Codebook(codes, _, scale):
                return self.pack_nf4(codes, scale, scheme)
            case _:
                raise site.refused(NAME, "it has no layout for it", "use --to dense")

    def pack_nf4(self, codes_OI: Tensor, scale: Weight, scheme: Kind) -> dict[str, Tensor]:
        """The codes of the flattened matrix, the first of two in the high half of a byte, and the decoding state."""
        scales, about = scales_of(scale)
        state = {
            "quant_type": "nf4", "blocksize": scheme.block, "shape": list(codes_OI.shape),
            "dtype": str(self.artifact.dtype).removeprefix("torch."), **about,
        }  # fmt: skip
        return {
            "weight": to_nibbles(codes_OI.reshape(1, -1), first_low=False).reshape(-1, 1),
            "weight.quant_map": BOOKS["nf4"].reshape(-1).clone(),
            **scales,
            STATE: torch.frombuffer(bytearray(json.dumps(state).encode()), dtype=torch.uint8),
        }

    def unpack(self, stored: Mapping[str, Tensor], scheme: Kind, dtype: torch.dtype) -> Tensor:
        """The matrix as the library itself decodes it."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, int8_vectorwise_dequant

        if scheme.bits == 8:
            return torch.as_tensor(int8_vectorwise_dequant(stored["weight"], stored["SCB"])).to(dtype)
        named = {name.removeprefix("weight."): tensor for name, tensor in stored.items() if name != "weight"}
        state = QuantState.from_dict(named, device=torch.device("cpu"))
        state.dtype = dtype
        return torch.as_tensor(dequantize_4bit(stored["weight"], state))

    def slack(self, scheme: Kind) -> float:
        """2**-22 for int8, whose scale is multiplied by 127 and divided by it again; 0 for NF4."""
        return 2.0**-22 if scheme.bits == 8 else 0.0

    def config(self) -> dict[str, Any]:
        """The config as transformers writes it."""
        first: Kind = next(iter(self.schemes.values()))
        four = first.bits == 4
        dtype = str(self.artifact.dtype).removeprefix("torch.")
        return {
            "quant_method": "bitsandbytes", "load_in_4bit": four, "load_in_8bit": not four,
            "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": first.nested, "bnb_4bit_quant_storage": "uint8",
            "bnb_4bit_compute_dtype": dtype, "llm_int8_threshold": OUTLIER, "llm_int8_skip_modules": self.plain(),
            "llm_int8_enable_fp32_cpu_offload": False, "llm_int8_has_fp16_weight": False,
        }  # fmt: skip

    def note(self, rounding: float) -> str:
        """One line on how the library's results differ."""
        four = next(iter(self.schemes.values())).bits == 4
        if four:
            return "exact nf4; transformers loads it with bitsandbytes"
        off = f"int8 within {rounding:.1e} of a matrix" if rounding else "int8 exact in the model's dtype"
        return f"{off}; bitsandbytes rounds inputs below 6.0 to int8, whatever the recipe says"


def others(weight: Weight) -> str:
    """The formats that have weights of this kind; each of them checks the details itself."""
    match weight:
        case Quantized(zero=None):
            return "compressed-tensors, gptq, gguf or dense"
        case Quantized():
            return "gptq, gguf or dense"
        case Codebook() | Scaled():
            return "compressed-tensors or dense"
        case _:
            return "dense"


def scales_of(scale: Weight) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors that store the scales of blocks and, if the scales are quantized too, the state to decode them."""
    match scale:
        case Nested(codes, absmax, offset):
            tensors = {
                "weight.absmax": codes.reshape(-1), "weight.nested_absmax": absmax,
                "weight.nested_quant_map": DYNAMIC.clone(),
            }  # fmt: skip
            about = {"nested_blocksize": Nested.BLOCK, "nested_dtype": "float32", "nested_offset": float(offset)}
            return tensors, about
        case _:
            return {"weight.absmax": scale.dense().float().reshape(-1)}, {}
