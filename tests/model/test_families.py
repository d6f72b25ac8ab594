"""Families found by structure alone: replay, coverage, and one round trip through every way of loading.

Tiny random models with odd sizes; the hybrids have windows shorter than the text. What a family looks like inside
is stated here by hand, so that a change of transformers shows.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import Calibration, Magnitude, Wanda
from compress.export.dense import export_dense
from compress.model.family import TESTED
from compress.model.source import Checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
OLD: dict[str, Any] = {"vocab_size": 211, "bos_token_id": 1, "eos_token_id": 2}
GPT: dict[str, Any] = {**OLD, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
SEPARATE = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]

FAMILIES: dict[str, tuple[dict[str, Any], list[list[str]]]] = {
    "gemma2": ({**SMALL, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}, SEPARATE),
    "gemma3_text": (
        {**SMALL, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12,
         "layer_types": ["sliding_attention", "full_attention"]},
        SEPARATE,
    ),
    "phi": ({**SMALL, "num_key_value_heads": 4}, [["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]]),
    "phi3": (SMALL, [["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]]),
    "opt": (
        {**OLD, "hidden_size": 48, "ffn_dim": 72, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 3,
         "max_position_embeddings": 128, "word_embed_proj_dim": 48},
        [["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]],
    ),
    "gpt2": (GPT, [["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]]),
    "gptj": ({**GPT, "rotary_dim": 8}, [["q_proj", "k_proj", "v_proj", "fc_in"], ["out_proj"], ["fc_out"]]),
    "falcon": (
        {**OLD, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        [["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
    ),
    "bloom": (
        {**OLD, "hidden_size": 48, "n_layer": 2, "n_head": 4, "pad_token_id": 3},
        [["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
    ),
    "olmo": (SMALL, SEPARATE),
    "olmo2": (SMALL, SEPARATE),
    "olmo3": ({**SMALL, "sliding_window": 8}, SEPARATE),
    "stablelm": ({**SMALL, "partial_rotary_factor": 0.5}, SEPARATE),
    "starcoder2": (
        {**SMALL, "sliding_window": 8}, [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["c_fc"], ["c_proj"]]
    ),
    "cohere": (SMALL, [["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]]),
    "granite": (SMALL, SEPARATE),
    "smollm3": (SMALL, SEPARATE),
}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Path]:
    """`folder(family)`: a float32 model folder with the tokenizer of the other tests."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    made: dict[str, Path] = {}

    def make(family: str) -> Path:
        if family not in made:
            config = AutoConfig.for_model(family, **FAMILIES[family][0])
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            made[family] = tmp_path_factory.mktemp(family)
            model.save_pretrained(made[family])
            tokenizer.save_pretrained(made[family])
        return made[family]

    return make


def test_every_family_called_tested_is_tested() -> None:
    assert set(TESTED) == {"llama", "mistral", "qwen2", "qwen3", "gemma"} | FAMILIES.keys()


@pytest.mark.parametrize("family", FAMILIES)
def test_replay_is_the_model_and_sites_are_grouped_by_input(
    family: str, folder: Callable[[str], Path], walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    walk = walk_of(folder(family))
    groups = []
    with torch.no_grad():
        probe = walk.enter(ids)
        for block in walk.visit([], probe):
            block.advance()
            groups.append([[site.name.rpartition(".")[2] for site in group] for group in block.groups])
        assert_close(
            "logits", walk.leave(probe), hugging_face(folder(family))(input_ids=ids, use_cache=False).logits, 1e-5
        )
    assert groups == [FAMILIES[family][1]] * 2


@pytest.mark.parametrize("family", FAMILIES)
def test_all_ways_of_loading_agree_and_the_mask_lies_along_the_inputs(
    family: str, folder: Callable[[str], Path], hugging_face: Any, tmp_path: Path, ids: Tensor, assert_close: Any
) -> None:
    calibration = Calibration(samples=4, length=32)
    passes = [Wanda(sparsity="2:4", sites="*.0.*"), Magnitude(sparsity="2:4", sites="*.1.*")]
    report = compress.run(folder(family), passes, tmp_path / "o", calibration=calibration)
    export_dense(tmp_path / "o", tmp_path / "dense")
    ours, dense = compress.load(tmp_path / "o"), hugging_face(tmp_path / "dense")
    ours.save_pretrained(tmp_path / "again")
    again = compress.load(tmp_path / "again")
    with torch.no_grad():
        logits = [model(input_ids=ids, use_cache=False).logits for model in (ours, dense, again)]
    assert_close("dense export", logits[1], logits[0], 1e-5)
    assert torch.equal(logits[2], logits[0])
    assert report.coverage.missed == 0
    kept = {int(n) for site in ours.modules() if hasattr(site, "expression") for n in counts(site.expression.dense())}
    assert kept == {2}


def counts(w_OI: Tensor) -> Tensor:
    """Non-zeros of every four consecutive inputs."""
    return (w_OI.reshape(-1, 4) != 0).sum(1).unique()


def test_a_conv1d_is_written_back_transposed(folder: Callable[[str], Path], tmp_path: Path) -> None:
    compress.run(folder("gpt2"), [Magnitude(sparsity=0.0)], tmp_path / "o")
    export_dense(tmp_path / "o", tmp_path / "dense")
    source, dense = Checkpoint(folder("gpt2")), Checkpoint(tmp_path / "dense")
    assert all(torch.equal(source.tensor(name), dense.tensor(name)) for name in source.names())
    assert source.names() == dense.names()
