"""GGUF: llama.cpp's Python package and stock transformers read the file, and its content matches the artifact.

llama.cpp itself was run once on files of the built-in model (see docs/export.md); these tests use its Python reader.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import RTN, Magnitude, RecipeError, UnsupportedWeight
from compress.artifact import Artifact
from compress.export import export
from compress.export.gguf_metadata import frequency_factors
from compress.model.source import locate
from compress.passes import HQQ, NF4, Int8

gguf = pytest.importorskip("gguf")
CASES = {
    "Q8_0": [RTN(bits=8, group=32, symmetric=True)],
    "Q4_0": [RTN(bits=4, group=64, symmetric=True)],
    "Q4_1": [RTN(bits=4, group=32)],
    "Q4_1 of real zeros": [HQQ(bits=4, group=64)],
}
PRUNED = [Magnitude(sparsity="2:4"), RTN(bits=4, group=32, symmetric=True)]
OFFSET = 2.0**-8  # of a matrix: an offset is off by at most 2**-11 of itself, 15 / 2**11 of a step


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_stock_transformers_loads_it(
    kind: str, dtype: str, small: Any, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    """Rows of queries and keys are in another order in the file, so this fails if they are not put back."""
    artifact = artifact_of(CASES[kind], small(dtype=dtype))
    done = export(artifact, "gguf", tmp_path / "out")
    found = logits(stock(done.out, torch.float32, gguf_file="model.gguf"))
    ratio = 4 * OFFSET if "Q4_1" in kind else 1e-6
    assert_close("logits", found, logits(compress.load(artifact, dtype=torch.float32)), ratio)
    assert (done.rounding == 0.0) == ("Q4_1" not in kind) and done.rounding < OFFSET


@pytest.mark.slow
def test_biases_are_in_the_order_of_their_rows(
    small: Any, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    """transformers does not look for them in a file, so it is told that they are there; llama.cpp looks."""
    from transformers import AutoConfig

    artifact = artifact_of(CASES["Q8_0"], small(attention_bias=True))
    config = AutoConfig.from_pretrained(small(attention_bias=True))
    out = export(artifact, "gguf", tmp_path / "out").out
    found = stock(out, torch.float32, gguf_file="model.gguf", config=config)
    assert_close("logits", logits(found), logits(compress.load(artifact)), 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("kind", CASES)
def test_blocks_hold_the_artifacts_codes(kind: str, artifact_of: Any, tmp_path: Path, assert_close: Any) -> None:
    artifact = artifact_of(CASES[kind])
    reader = gguf.GGUFReader(export(artifact, "gguf", tmp_path / "out").out / "model.gguf")
    tensor = next(t for t in reader.tensors if t.name == "blk.1.ffn_down.weight")
    assert tensor.tensor_type.name == kind[:4]
    meant = Artifact(artifact).expression("model.layers.1.mlp.down_proj").dense()
    got = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
    assert_close(kind, got, meant, OFFSET if "Q4_1" in kind else 0.0)


def test_pruned_weights_are_zeros_and_it_is_said(artifact_of: Any, tmp_path: Path) -> None:
    artifact = artifact_of(PRUNED)
    done = export(artifact, "gguf", tmp_path / "out")
    tensor = next(t for t in gguf.GGUFReader(done.out / "model.gguf").tensors if t.name == "blk.0.ffn_up.weight")
    mask = Artifact(artifact).expression("model.layers.0.mlp.up_proj").mask_OI  # type: ignore[attr-defined]
    assert bool((torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())[~mask] == 0).all())
    assert "the mask is lost" in done.note


def test_frequencies_of_old_files_are_left_out_and_it_is_said(
    small: Any, artifact_of: Any, stock: Any, logits: Any, tmp_path: Path, assert_close: Any
) -> None:
    old = shutil.copytree(small(), tmp_path / "old")
    held = load_file(old / "model.safetensors")
    held["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
    save_file(held, old / "model.safetensors", metadata={"format": "pt"})
    artifact = artifact_of(CASES["Q8_0"], old)
    done = export(artifact, "gguf", tmp_path / "out")
    assert len(gguf.GGUFReader(done.out / "model.gguf").tensors) == len(held) - 1
    assert "the stored rotary_emb.inv_freq is left out" in done.note
    found = logits(stock(done.out, torch.float32, gguf_file="model.gguf"))
    assert_close("logits", found, logits(compress.load(artifact)), 1e-6)


def test_plain_tensors_keep_their_dtype_and_vectors_are_float32(small: Any, artifact_of: Any, tmp_path: Path) -> None:
    artifact = artifact_of(CASES["Q8_0"], small(dtype="bfloat16"))
    reader = gguf.GGUFReader(export(artifact, "gguf", tmp_path / "out").out / "model.gguf")
    types = {tensor.name: tensor.tensor_type.name for tensor in reader.tensors}
    assert types["token_embd.weight"] == types["output.weight"] == "BF16"
    assert types["output_norm.weight"] == types["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.slow
def test_the_built_in_model_is_written_with_its_tokenizer(artifact_of: Any, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    artifact = artifact_of([RTN(bits=4, group=64, symmetric=True)], Path("builtin"))
    done = export(artifact, "gguf", tmp_path / "out")
    text = "In 1987 Café No. 12 didn't open;\n\nthe capital of Peru is Lima."
    tokenizers = [
        AutoTokenizer.from_pretrained(done.out, gguf_file="model.gguf"),
        AutoTokenizer.from_pretrained(artifact),
    ]
    assert tokenizers[0](text)["input_ids"] == tokenizers[1](text)["input_ids"]
    assert "llama.cpp's starcoder" in done.note
    keys = gguf.GGUFReader(done.out / "model.gguf").fields
    assert keys["tokenizer.ggml.pre"].contents() == "starcoder"
    assert keys["llama.attention.head_count_kv"].contents() == 2
    assert keys["llama.rope.freq_base"].contents() == 10000.0


def test_a_tokenizer_llama_cpp_has_no_name_for_stays_beside_the_file(artifact_of: Any, tmp_path: Path) -> None:
    done = export(artifact_of(CASES["Q8_0"]), "gguf", tmp_path / "out")
    assert "beside the file and not in it" in done.note
    assert (done.out / "tokenizer.json").is_file()
    assert not any(key.startswith("tokenizer.") for key in gguf.GGUFReader(done.out / "model.gguf").fields)


def test_the_frequencies_of_llama_3_are_those_of_transformers(assert_close: Any) -> None:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(hidden_size=1024, num_attention_heads=8, rope_parameters=rope, max_position_embeddings=131072)
    found, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1 / 500000.0 ** (torch.arange(0, 128, 2, dtype=torch.float64) / 128)
    factors = frequency_factors(config.to_dict())
    assert_close("factors", factors, plain / found.double(), 1e-6)


@pytest.mark.slow
def test_stretched_positions_are_said(small: Any, artifact_of: Any, tmp_path: Path) -> None:
    model = small(rope_parameters={"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0})
    keys = gguf.GGUFReader(
        export(artifact_of(CASES["Q8_0"], model), "gguf", tmp_path / "out").out / "model.gguf"
    ).fields
    told = {key: keys[f"llama.rope.{key}"].contents() for key in ("freq_base", "scaling.type", "scaling.factor")}
    assert told == {"freq_base": 500.0, "scaling.type": "linear", "scaling.factor": 4.0}


def rewritten(folder: Path, out: Path, name: str, change: Any) -> Path:
    """A copy of a model folder with one of its JSON files changed."""
    shutil.copytree(folder, out)
    told = json.loads((out / name).read_text())
    (out / name).write_text(json.dumps(change(told)))
    return out


def old_config(told: dict[str, Any], kind: str) -> dict[str, Any]:
    """A config as it was written before 2024, which leaves out what is usual."""
    new = ("rope_parameters", "rms_norm_eps", "max_position_embeddings", "head_dim")
    kept = {key: value for key, value in told.items() if key not in new}
    return {**kept, "rope_theta": 500.0, "rope_scaling": {"type": kind, "factor": 4.0}}


def test_an_old_config_is_read_as_transformers_reads_it(small: Any, artifact_of: Any, tmp_path: Path) -> None:
    model = rewritten(small(), tmp_path / "old", "config.json", lambda told: old_config(told, "linear"))
    keys = gguf.GGUFReader(
        export(artifact_of(CASES["Q8_0"], model), "gguf", tmp_path / "out").out / "model.gguf"
    ).fields
    names = ("rope.freq_base", "rope.scaling.type", "rope.scaling.factor", "context_length")
    assert [keys[f"llama.{name}"].contents() for name in names] == [500.0, "linear", 4.0, 2048]
    assert keys["llama.attention.layer_norm_rms_epsilon"].contents() == pytest.approx(1e-6)


def test_an_old_config_of_another_rotation_is_refused(small: Any, artifact_of: Any, tmp_path: Path) -> None:
    model = rewritten(small(), tmp_path / "old", "config.json", lambda told: old_config(told, "dynamic"))
    with pytest.raises(RecipeError, match="not dynamic"):
        export(artifact_of(CASES["Q8_0"], model), "gguf", tmp_path / "out")


@pytest.mark.slow
def test_tokens_without_a_row_are_left_out(artifact_of: Any, tmp_path: Path) -> None:
    """As of models whose token for padding was added later, without a row for it."""

    def with_padding(told: dict[str, Any]) -> dict[str, Any]:
        return {
            **told,
            "added_tokens": [*told["added_tokens"], {**told["added_tokens"][0], "id": 4096, "content": "+"}],
        }

    model = rewritten(locate("builtin"), tmp_path / "padded", "tokenizer.json", with_padding)
    done = export(artifact_of(CASES["Q8_0"], model), "gguf", tmp_path / "out")
    fields = gguf.GGUFReader(done.out / "model.gguf").fields
    assert len(fields["tokenizer.ggml.tokens"].data) == len(fields["tokenizer.ggml.token_type"].data) == 4096
    assert "without the tokens from 4096 on" in done.note


def test_the_factors_of_frequencies_are_in_the_file(small: Any, artifact_of: Any, tmp_path: Path) -> None:
    rope = {
        "rope_type": "llama3", "rope_theta": 10000.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    }  # fmt: skip
    artifact = artifact_of(CASES["Q8_0"], small(rope_parameters=rope))
    reader = gguf.GGUFReader(export(artifact, "gguf", tmp_path / "out").out / "model.gguf")
    found = next(tensor for tensor in reader.tensors if tensor.name == "rope_freqs.weight")
    assert torch.equal(torch.from_numpy(found.data.copy()), frequency_factors(Artifact(artifact).config))


REFUSED: dict[str, tuple[Any, str]] = {
    "2 bits": (RTN(bits=2, group=32), "use bits: 4 or 8"),
    "8 bits with zeros": (RTN(bits=8, group=32), "use symmetric: true"),
    "groups of 16": (RTN(bits=4, group=16), "groups of 16 are no multiple"),
    "scales of float32": (Int8(), "its scales are float16"),
    "rounded inputs": (RTN(bits=8, group=0, symmetric=True, inputs="int8"), "cannot round inputs"),
    "nf4": (NF4(), "only for integers on a grid"),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", REFUSED)
def test_what_it_cannot_say_is_refused_by_name(case: str, artifact_of: Any, tmp_path: Path) -> None:
    step, match = REFUSED[case]
    artifact = artifact_of([step])
    with pytest.raises(UnsupportedWeight, match=match):
        export(artifact, "gguf", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_other_architectures_are_refused(small: Any, artifact_of: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="writes only the architecture llama, and this is qwen2"):
        export(artifact_of(CASES["Q8_0"], small("qwen2")), "gguf", tmp_path / "out")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 500.0, "factor": 4.0}}, "not dynamic"),
        ({"mlp_bias": True}, "no biases, in its feed-forward layers"),
    ],
)
def test_what_its_llama_has_not_is_refused(
    changes: dict[str, Any], match: str, small: Any, artifact_of: Any, tmp_path: Path
) -> None:
    with pytest.raises(RecipeError, match=match):
        export(artifact_of(CASES["Q8_0"], small(**changes)), "gguf", tmp_path / "out")


@pytest.mark.slow
def test_nothing_quantized_is_nothing_to_say(artifact_of: Any, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no site is quantized"):
        export(artifact_of([Magnitude()]), "gguf", tmp_path / "out")
