"""Quantized inputs from the recipe to the loaded model: the walk, the file, the modules and the dense twin agree."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import RTN, Calibration, Realign, RecipeError, Rotate, Wanda
from compress.artifact import Artifact
from compress.weights import rounded_inputs

W8A8 = {"bits": 8, "group": 0, "symmetric": True}


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_loaded_layer_rounds_its_input_then_multiplies(kind: str, tiny_llama: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    compress.run(tiny_llama, [RTN(**W8A8, inputs=kind)], out)
    layer = compress.load(out, dtype=torch.float32).model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), rounded_inputs(x, kind) @ layer.weight.T)
    assert all(spec["inputs"] == kind for spec in Artifact(out).specs.values())


def test_full_inputs_leave_no_trace(tiny_llama: Path, tmp_path: Path) -> None:
    compress.run(tiny_llama, [RTN(**W8A8)], tmp_path / "out")
    assert not any("inputs" in spec for spec in Artifact(tmp_path / "out").specs.values())


def test_the_dense_twin_keeps_its_inputs(tiny_llama: Path, tmp_path: Path) -> None:
    # realign reads the dense model beside the compressed one; were its inputs rounded too, nothing would be realigned
    passes = [Realign(), RTN(bits=8, group=0, symmetric=True, inputs="fp8")]
    compress.run(tiny_llama, passes, tmp_path / "out", calibration=Calibration(samples=4, length=32))
    rows = Artifact(tmp_path / "out").provenance["sites"]
    assert rows["model.layers.1.mlp.down_proj"]["realigned"] > 1e-4


def test_a_model_in_memory_goes_on_rounding(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(tiny_llama, dtype=torch.float32)
    ids = torch.arange(16).reshape(2, 8)
    compress.PassManager([RTN(**W8A8, inputs="int8")]).apply(model, ids)
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(3, layer.in_features, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(layer(x), rounded_inputs(x, "int8") @ layer.weight.T)


def test_masks_and_rounded_inputs_go_together(tiny_llama: Path, tmp_path: Path) -> None:
    passes = [Wanda(sparsity="2:4"), RTN(**W8A8, inputs="int8")]
    report = compress.run(tiny_llama, passes, tmp_path / "out", calibration=Calibration(samples=4, length=32))
    assert report.kl > 0


def test_experts_of_a_stack_are_refused_before_any_work(
    tiny_llama: Path, tmp_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    sizes = {"vocab_size": 211, "hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
    mixture = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **sizes, **heads), dtype=torch.float32)
    folder = tmp_path_factory.mktemp("mixture")
    mixture.save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    with pytest.raises(RecipeError, match=r"passes\[0\]\.rtn\.inputs: .*stack of experts"):
        compress.run(folder, [RTN(**W8A8, inputs="int8")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("low_memory", [False, True])
def test_a_rotated_layer_rounds_the_rotated_input(low_memory: bool, tiny_llama: Path, tmp_path: Path) -> None:
    out = compress.run(tiny_llama, [Rotate(), RTN(**W8A8, inputs="int8")], tmp_path / "out").out
    layer = compress.load(out, dtype=torch.float32, low_memory=low_memory).model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    left, turn = layer.expression.children()
    want = rounded_inputs(turn.linear(x), "int8") @ left.dense().T
    torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pair", [[], [Rotate()]], ids=["plain", "rotated"])
def test_a_gradient_passes_the_rounding_as_if_there_were_none(
    pair: list[Any], tiny_llama: Path, tmp_path: Path
) -> None:
    out = compress.run(tiny_llama, [*pair, RTN(**W8A8, inputs="int8")], tmp_path / "out").out
    layer = compress.load(out, dtype=torch.float32).model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0), requires_grad=True)
    layer(x).sum().backward()
    torch.testing.assert_close(x.grad, layer.weight.sum(0).expand_as(x), rtol=1e-3, atol=1e-4)


def test_a_cast_model_computes_in_its_new_dtype(tiny_llama: Path, tmp_path: Path) -> None:
    out = compress.run(tiny_llama, [RTN(**W8A8, inputs="fp8")], tmp_path / "out").out
    layer = compress.load(out, dtype=torch.bfloat16).model.layers[0].mlp.down_proj.float()
    fresh = compress.load(out, dtype=torch.float32).model.layers[0].mlp.down_proj
    x = torch.randn(5, layer.in_features, generator=torch.Generator().manual_seed(0))
    assert torch.equal(layer(x), fresh(x))  # decoded again, not a rounded matrix made wide
