"""Export to one GGUF file for llama.cpp and compatible programs, for the architecture `llama` only.

Integers keep their codes: symmetric 8-bit as Q8_0 and symmetric 4-bit as Q4_0, both exact; 4-bit with a zero point as
Q4_1, whose offset `-scale * zero` is rounded to float16. The format's blocks have 32 inputs, so any group size that is
a multiple of 32 is represented by repeating its scale: 4.5 bits per weight in Q4_0, 5 in Q4_1, 8.5 in Q8_0. Matrices
that are not quantized keep their dtype. The rows of query and key projections are put in llama.cpp's order. Pruned
entries get the code of zero: the mask is lost, and in Q4_1 they decode to at most 2**-7 of a quantization step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from compress.artifact import Artifact
from compress.errors import ArtifactError, RecipeError, UnsupportedWeight, VerificationError
from compress.export.folder import Exported, difference, mask_note, put_in_place, write_card
from compress.export.gguf_metadata import add_metadata, frequency_factors, llama_config
from compress.export.gguf_vocabulary import add_vocabulary
from compress.export.leaf import Leaf, leaf
from compress.export.words import to_nibbles
from compress.weights import Dense, Quantized
from compress.writer import copy_companions

NAME = "gguf"
BLOCK = 32  # inputs per block
PLAIN = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}
SLACK = 2.0**-8  # for Q4_1: rounding moves an offset by 2**-11 of itself, at most 2**-7 of a step
FREQUENCIES = "rotary_emb.inv_freq"  # a buffer that old versions of transformers stored, and that it now ignores
OUTER = {
    "model.embed_tokens.weight": "token_embd.weight",
    "model.norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}
INNER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip


class Piece(NamedTuple):
    """A tensor of the file: its name, the name of its GGML type, its shape in bytes, and how to make it."""

    name: str
    type: str
    shape: tuple[int, ...]  # the last dimension counts bytes
    make: Callable[[], Tensor]


def export_gguf(path: Path, out: Path) -> Exported:
    """Write the artifact at `path` to `out/model.gguf`, with the tokenizer files beside it.

    Raises the errors of `write_folder`, and RecipeError for an architecture other than llama or if the package gguf is
    not installed.
    Source: the GGUF specification and block types of ggml (github.com/ggml-org/ggml, docs/gguf.md, ggml-common.h).
    """
    try:
        import gguf
    except ImportError as error:
        raise RecipeError("--to gguf needs gguf: pip install gguf") from error
    del gguf
    with put_in_place(path, out) as (artifact, partial):
        config = llama_config(artifact)
        pieces = [piece(artifact, config, name) for name in tensors_of(artifact)] + rope_factors(config)
        if all(p.type in PLAIN.values() for p in pieces):
            raise RecipeError(f"{path}: no site is quantized, so there is nothing to export as gguf; use --to dense")
        vocabulary = write(artifact, config, pieces, partial / "model.gguf")
        copy_companions(path, partial)
        rounding = compare(artifact, config, partial / "model.gguf")
        size = sum(prod(p.shape) for p in pieces)
        types = ", ".join(sorted({p.type for p in pieces}))
        lost = f"rounding changes a matrix by up to {rounding:.1e}" if rounding else "exact"
        note = f"{types}; {lost}; {vocabulary}{frequency_note(artifact)}{mask_note(artifact)}"
        write_card(artifact, partial, NAME, note)
    return Exported(out=out, format=NAME, bytes=size, rounding=rounding, note=note)


# -- tensors ---------------------------------------------------------------------------------------


def tensors_of(artifact: Artifact) -> list[str]:
    """The tensors to write: all but the frequencies of old files, which every reader computes from the config."""
    return [name for name in artifact.names() if not name.endswith(FREQUENCIES)]


def frequency_note(artifact: Artifact) -> str:
    """The note on left-out frequencies if the artifact has any, else an empty string."""
    left = len(tensors_of(artifact)) < len(artifact.names())
    return f"; the stored {FREQUENCIES} is left out, because readers compute it from the config" if left else ""


def renamed(name: str) -> str:
    """The name of a tensor in the file; raises ArtifactError if llama.cpp's llama has no such tensor."""
    if name in OUTER:
        return OUTER[name]
    parts = name.split(".")
    middle, end = ".".join(parts[3:-1]), parts[-1]
    if parts[:2] != ["model", "layers"] or middle not in INNER:
        raise ArtifactError(f"{name}: llama.cpp's llama has no such tensor; use --to dense")
    return f"blk.{parts[2]}.{INNER[middle]}.{end}"


def piece(artifact: Artifact, config: Mapping[str, Any], name: str) -> Piece:
    """A tensor of the dense model as stored in the file.

    Raises UnsupportedWeight for a site and ArtifactError for another tensor that no type of the format can store.
    """
    sites, held = artifact.holders.get(name, []), artifact.headers[name]
    new, order = renamed(name), row_order(config, name)
    if sites:
        site = leaf(artifact, sites[0], NAME)
        if not isinstance(site.weight, Dense):
            kind, per_block = block_type(site)
            shape = (held.shape[0], held.shape[1] // BLOCK * per_block)
            return Piece(new, kind, shape, lambda: blocks(ordered(artifact, site.name, order), kind))
    dtype = torch.float32 if len(held.shape) == 1 else artifact.tensor(name).dtype  # as llama.cpp computes with vectors

    def make() -> Tensor:
        plain = artifact.tensor(name)
        return (plain if order is None else plain[order]).to(dtype).contiguous().view(torch.uint8)

    if dtype not in PLAIN:
        raise ArtifactError(f"{name}: gguf has no type for {dtype}; use --to dense")
    return Piece(new, PLAIN[dtype], (*held.shape[:-1], held.shape[-1] * dtype.itemsize), make)


def ordered(artifact: Artifact, site: str, order: Tensor | None) -> Quantized:
    """The codes and scales of a site with its rows in the order of the file."""
    weight = leaf(artifact, site, NAME).weight
    if not isinstance(weight, Quantized):
        raise UnsupportedWeight(f"{site}: {weight.describe()} cannot be stored in blocks")
    rows = torch.arange(weight.shape[0]) if order is None else order
    scale = weight.scale.expand(weight.shape[0], -1)[rows]
    zero = None if weight.zero is None else weight.zero.expand(weight.shape[0], -1)[rows]
    return Quantized(weight.codes[rows], scale, zero, weight.bits)


def block_type(site: Leaf) -> tuple[str, int]:
    """The type of a site's blocks and the bytes per block; raises UnsupportedWeight if no type fits."""
    weight = site.weight
    if not isinstance(weight, Quantized):
        raise site.refused(
            NAME, "it has block types only for integers on a grid", "use --to compressed-tensors or dense"
        )
    if site.inputs:
        raise site.refused(NAME, "it cannot round inputs as the recipe does", "use --to compressed-tensors or dense")
    if weight.group % BLOCK:
        reason = f"groups of {weight.group} are no multiple of its blocks of {BLOCK} inputs"
        raise site.refused(NAME, reason, f"use a group that is a multiple of {BLOCK}, or --to dense")
    if not torch.equal(weight.scale.to(torch.float16).float(), weight.scale.float()):
        raise site.refused(
            NAME, "its scales are float16, and one of these is not exactly representable", "use --to dense"
        )
    match weight.bits, weight.zero is None:
        case 8, True:
            return "Q8_0", 2 + BLOCK
        case 4, True:
            return "Q4_0", 2 + BLOCK // 2
        case 4, False:
            return "Q4_1", 4 + BLOCK // 2
        case 8, False:
            raise site.refused(NAME, "its 8-bit type has no zero points", "use symmetric: true, or --to dense")
        case _:
            raise site.refused(
                NAME, f"it has no block type for {weight.bits} bits on a grid", "use bits: 4 or 8, or --to dense"
            )


def blocks(weight: Quantized, kind: str) -> Tensor:
    """The blocks as uint8 [out, bytes]: for every 32 inputs the scale, the offset if any, and the codes."""
    rows, columns = weight.shape
    repeats = columns // BLOCK // weight.scale.shape[1]
    d_NB = weight.scale.to(torch.float16).repeat_interleave(repeats, 1).reshape(-1, 1)
    codes_NB = weight.codes.reshape(-1, BLOCK)
    parts = [d_NB.view(torch.uint8)]
    if kind == "Q8_0":
        parts.append((codes_NB.short() - 128).to(torch.int8).view(torch.uint8))
    else:
        if weight.zero is not None:
            offset = -(weight.scale.float() * weight.zero.float()).repeat_interleave(repeats, 1)
            parts.append(offset.to(torch.float16).reshape(-1, 1).view(torch.uint8))
        paired = codes_NB.unflatten(1, (2, -1)).transpose(1, 2).flatten(1)  # a byte holds inputs i and i + 16
        parts.append(to_nibbles(paired, first_low=True))
    return torch.cat(parts, 1).reshape(rows, -1)


def row_order(config: Mapping[str, Any], name: str) -> Tensor | None:
    """The row order of a query or key projection in the file; None for other tensors.

    It differs because llama.cpp rotates neighbouring channels and transformers the two halves of a head.
    """
    heads = {"q_proj": "num_attention_heads", "k_proj": "num_key_value_heads"}.get(name.split(".")[-2])
    if heads is None:
        return None
    count_of = int(config[heads])
    rows = count_of * int(config["head_dim"])
    return torch.arange(rows).view(count_of, 2, -1).transpose(1, 2).reshape(-1)


def rope_factors(config: Mapping[str, Any]) -> list[Piece]:
    """The tensor of divisors of the rotary frequencies, for models that need one, else an empty list."""
    factors = frequency_factors(config)
    if factors is None:
        return []
    return [Piece("rope_freqs.weight", "F32", (4 * len(factors),), lambda: factors.view(torch.uint8))]


# -- the file --------------------------------------------------------------------------------------


def write(artifact: Artifact, config: Mapping[str, Any], pieces: list[Piece], path: Path) -> str:
    """Write the file, one tensor in memory at a time; returns a note on the tokenizer."""
    import numpy
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(path, "llama")
    try:
        add_metadata(writer, artifact, config, {p.type for p in pieces})
        vocabulary = add_vocabulary(writer, artifact, int(config["vocab_size"]))
        for p in pieces:
            kind = GGMLQuantizationType[p.type]
            writer.add_tensor_info(p.name, p.shape, numpy.dtype(numpy.uint8), prod(p.shape), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for p in pieces:
            writer.write_tensor_data(p.make().contiguous().numpy())
    finally:
        writer.close()
    return vocabulary


def compare(artifact: Artifact, config: Mapping[str, Any], path: Path) -> float:
    """Read the file back, and return the largest relative RMS difference of a tensor from the artifact's.

    Raises VerificationError if a Q4_1 tensor differs by more than the rounding of offsets, or any other tensor at all.
    """
    from gguf import GGUFReader, dequantize

    found = {tensor.name: tensor for tensor in GGUFReader(path).tensors}
    worst = 0.0
    for name in tensors_of(artifact):
        tensor = found[renamed(name)]
        got = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type).copy())
        order = row_order(config, name)
        got = got if order is None else got[order.argsort()]
        sites = artifact.holders.get(name, [])
        quantized = sites and tensor.tensor_type.name not in PLAIN.values()
        meant = artifact.expression(sites[0]).dense() if quantized else artifact.tensor(name)
        error = difference(got, meant.float())
        if not error <= (SLACK if tensor.tensor_type.name == "Q4_1" else 0.0):
            raise VerificationError(
                f"{name}: the matrix read back from gguf differs from the artifact's by {error:.2g} (relative RMS)"
            )
        worst = max(worst, error)
    return worst
