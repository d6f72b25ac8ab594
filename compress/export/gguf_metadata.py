"""The GGUF metadata of models of the architecture `llama`, and the check of which models it can describe."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from compress.artifact import Artifact
from compress.errors import RecipeError
from compress.model.architecture import parsed


def llama_config(artifact: Artifact) -> dict[str, Any]:
    """The config as transformers reads it: with old keys renamed and missing ones set to their defaults.

    Raises RecipeError for a model that the tensor names and metadata of this export do not cover.
    """
    kind = artifact.config.get("model_type")
    if kind != "llama":
        raise RecipeError(
            f"--to gguf writes only the architecture llama, and this is {kind}; use --to compressed-tensors or dense"
        )
    config: dict[str, Any] = parsed(artifact.config).to_dict()
    rope = config["rope_parameters"]["rope_type"]
    if rope not in ("default", "linear", "llama3"):
        raise RecipeError(f"--to gguf supports the rope types default, linear and llama3, not {rope}; use --to dense")
    if config["hidden_act"] != "silu" or config["mlp_bias"]:
        raise RecipeError(
            "--to gguf: llama.cpp's llama requires silu, and no biases, in its feed-forward layers; use --to dense"
        )
    return config


def add_metadata(writer: Any, artifact: Artifact, config: Mapping[str, Any], types: set[str]) -> None:
    """Add the metadata that llama.cpp needs to run the model."""
    from gguf import LlamaFileType, RopeScalingType

    rope, head_dim = config["rope_parameters"], int(config["head_dim"])
    writer.add_name(str(artifact.provenance["source"]["name"]))
    kind = next((kind for kind in ("Q8_0", "Q4_1", "Q4_0") if kind in types), "Q8_0")
    writer.add_file_type(LlamaFileType[f"MOSTLY_{kind}"])
    writer.add_quantization_version(2)
    writer.add_vocab_size(int(config["vocab_size"]))
    writer.add_context_length(int(config["max_position_embeddings"]))
    writer.add_embedding_length(int(config["hidden_size"]))
    writer.add_block_count(int(config["num_hidden_layers"]))
    writer.add_feed_forward_length(int(config["intermediate_size"]))
    writer.add_head_count(int(config["num_attention_heads"]))
    writer.add_head_count_kv(int(config["num_key_value_heads"]))
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))
    if rope["rope_type"] == "linear":
        writer.add_rope_scaling_type(RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(float(rope["factor"]))


def frequency_factors(config: Mapping[str, Any]) -> Tensor | None:
    """The numbers by which Llama 3.1 divides each rotary frequency, float32 [head_dim / 2]; None for other rope types.

    llama.cpp reads them from a tensor of the file.
    Source: transformers, `_compute_llama3_parameters`.
    """
    rope, head_dim = config["rope_parameters"], int(config["head_dim"])
    if rope["rope_type"] != "llama3":
        return None
    half = torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim
    waves = 2 * torch.pi * float(rope["rope_theta"]) ** half
    low, high, factor = (float(rope[k]) for k in ("low_freq_factor", "high_freq_factor", "factor"))
    smooth = ((rope["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    factors: Tensor = (1 / ((1 - smooth) / factor + smooth)).float()
    return factors
