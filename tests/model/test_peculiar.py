"""Peculiarities of families that a rule for the common case would get silently wrong."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import RTN, ArtifactError, PassManager, UnsupportedWeight, Wanda
from compress.artifact import Artifact
from compress.events import StatisticsCollected
from compress.model.anatomy import Anatomy, coverage
from compress.model.architecture import auto_class, skeleton, without_code
from compress.model.divergence import mean_kl

SMALL: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    "head_dim": 12,
}  # fmt: skip
LAYERED: dict[str, Any] = {
    **SMALL, "num_hidden_layers": 3, "vocab_size_per_layer_input": 211, "hidden_size_per_layer_input": 16,
    "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "full_attention"],
    "num_kv_shared_layers": 1,
}  # fmt: skip
GEMMA_3N = {**LAYERED, "laurel_rank": 8, "activation_sparsity_pattern": [0.0] * 3, "intermediate_size": [72] * 3}


def built(name: str, **options: Any) -> Any:
    from transformers import AutoConfig

    config = AutoConfig.for_model(name, **options)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            parameter.data.normal_(0, 0.15)
    return model


def saved(model: Any, folder: Path, tokenizer: Path) -> Path:
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(tokenizer / name, folder / name)
    return folder


# -- statistics ------------------------------------------------------------------------------------


@pytest.mark.parametrize("chunk", [0, 8])
def test_a_module_that_a_block_calls_several_times_is_measured_on_every_call(chunk: int) -> None:
    equal = {key: value for key, value in SMALL.items() if key not in ("num_key_value_heads", "head_dim")}
    model = built("bert", **equal, architectures=["BertForMaskedLM"], chunk_size_feed_forward=chunk)
    told: list[Any] = []
    ids = torch.randint(4, 200, (4, 32), generator=torch.Generator().manual_seed(1))
    PassManager([Wanda()], emit=told.append).apply(model, ids)
    assert {event.tokens for event in told if isinstance(event, StatisticsCollected)} == {128}


@pytest.mark.slow
def test_keys_and_values_that_a_later_block_reads_do_not_mix_with_the_dense_models(
    tmp_path: Path, tiny_llama: Path
) -> None:
    model = built("gemma3n_text", **GEMMA_3N)
    report = compress.run(saved(model, tmp_path / "m", tiny_llama), [RTN(bits=3, group=0)], tmp_path / "o")
    loaded = compress.load(tmp_path / "o")
    ids = probe_of(tmp_path / "m")
    with torch.no_grad():
        kl = mean_kl(model(input_ids=ids, use_cache=False).logits, loaded(input_ids=ids, use_cache=False).logits)
    assert report.kl == pytest.approx(kl, rel=1e-4)


def probe_of(folder: Path) -> Tensor:
    """The tokens on which a data-free run measures its KL."""
    from compress.calibration import draw
    from compress.plan import tokenizer_of

    calibration = compress.Calibration(data="text", length=128)
    return draw(calibration, tokenizer_of(folder), 128, samples=0).probe_NT


# -- which matrix is what --------------------------------------------------------------------------


def test_a_gate_that_is_no_router_is_a_site() -> None:
    options = {**LAYERED, "num_kv_shared_layers": 0, "global_head_dim": 12, "enable_moe_block": True, "num_experts": 4,
               "top_k_experts": 2, "moe_intermediate_size": 24, "expert_intermediate_size": 24}  # fmt: skip
    anatomy = Anatomy(built("gemma4_text", **options), None)
    routers = {name for name, (_, reason) in coverage(anatomy, ["*"]).untouched.items() if reason == "a router"}
    assert {name.split(".", 3)[3] for name in routers} == {"router.proj.weight"}
    assert "model.layers.0.per_layer_input_gate" in anatomy.places


@pytest.mark.slow
def test_a_stack_that_the_file_holds_the_other_way_round(
    tmp_path: Path, tiny_llama: Path, ids: Tensor, assert_close: Any
) -> None:
    text = {**SMALL, "model_type": "qwen3_vl_moe_text", "num_experts": 4, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32, "decoder_sparse_step": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}}  # fmt: skip
    vision = {"depth": 2, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 4, "patch_size": 8,
              "intermediate_size": 40, "deepstack_visual_indexes": [0]}  # fmt: skip
    model = built("qwen3_vl_moe", text_config=text, vision_config=vision, image_token_id=205, video_token_id=206,
                  vision_start_token_id=207, vision_end_token_id=208,
                  architectures=["Qwen3VLMoeForConditionalGeneration"])  # fmt: skip
    straight, turned = saved(model, tmp_path / "straight", tiny_llama), tmp_path / "turned"
    shutil.copytree(straight, turned)
    tensors = load_file(turned / "model.safetensors")
    tensors |= {name: t.mT.contiguous() for name, t in tensors.items() if ".experts." in name}
    save_file(tensors, turned / "model.safetensors", metadata={"format": "pt"})
    for folder in (straight, turned):
        compress.run(folder, [RTN(group=8)], tmp_path / f"{folder.name}-out")
    with torch.no_grad():
        logits = [compress.load(tmp_path / f"{n}-out")(input_ids=ids).logits for n in ("straight", "turned")]
    assert_close("logits", logits[1], logits[0], 1e-6)
    artifact, name = Artifact(tmp_path / "turned-out"), "model.language_model.layers.0.mlp.experts.gate_up_proj"
    assert artifact.shapes()[name] == tuple(tensors[name].shape) == (4, 48, 64)


def test_blocks_that_share_their_weights_are_refused(tiny_llama: Path, walk_of: Any, tmp_path: Path) -> None:
    model = built("llama", **SMALL, tie_word_embeddings=False)
    model.model.layers[1].mlp.up_proj.weight = model.model.layers[0].mlp.up_proj.weight
    with pytest.raises(UnsupportedWeight, match=r"layers\.0\.mlp\.up_proj\.weight and .* are one parameter"):
        PassManager([RTN(group=8)]).apply(model, torch.ones(1, 8, dtype=torch.long))


def test_infinity_in_a_config_is_read(tmp_path: Path) -> None:
    options = {"hidden_size": 48, "num_hidden_layers": 2, "vocab_size": 211, "num_heads": 4, "head_dim": 24,
               "state_size": 8, "expand": 2, "n_groups": 1}  # fmt: skip
    built("mamba2", **options).save_pretrained(tmp_path / "m")
    config = json.loads((tmp_path / "m" / "config.json").read_text())
    assert config["time_step_limit"][1] == {"__float__": "Infinity"}
    assert skeleton(config, torch.float32).config.time_step_limit[1] == float("inf")
    compress.run(tmp_path / "m", [RTN(group=8)], tmp_path / "o")
    assert json.loads((tmp_path / "o" / "config.json").read_text())["time_step_limit"] == config["time_step_limit"]


def test_memory_that_runs_out_while_a_model_is_built_is_not_the_fault_of_its_config(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes")

    monkeypatch.setattr(torch.nn.Linear, "__init__", fail)
    with pytest.raises(MemoryError, match="allocate memory"):
        skeleton({"model_type": "llama", **SMALL}, torch.float32)


def test_a_family_whose_code_fails_alone_is_one_line(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise IndexError("of the family's own\nmaking")

    monkeypatch.setattr("compress.job.TESTED", ())
    monkeypatch.setattr("compress.model.walk.Walk.prove", fail)
    message = r"LlamaForCausalLM cannot be run block by block: IndexError: of the family's own making$"
    with pytest.raises(UnsupportedWeight, match=message):
        compress.run(tiny_llama, [RTN(group=8)], tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


def test_a_block_that_plain_text_does_not_visit_is_refused(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(tiny_llama)
    forward: Callable[..., Any] = walk.model.model.forward

    def skips(*args: Any, **kwargs: Any) -> Any:
        walk.model.model.config.num_hidden_layers = 1
        return forward(*args, **kwargs)

    walk.model.model.forward = skips
    with torch.no_grad(), pytest.raises(UnsupportedWeight, match=r"model\.layers\.1 is not called for plain text"):
        walk.enter(ids)


def test_modules_that_compute_something_else_after_loading_are_found(
    tiny_llama: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from compress.runtime.linear import CompressedLinear

    right = CompressedLinear.forward
    monkeypatch.setattr(CompressedLinear, "forward", lambda self, x: right(self, x) * (1.2 if x.ndim == 3 else 1))
    with pytest.raises(compress.VerificationError, match="the reloaded model's logits differ"):
        compress.run(tiny_llama, [RTN(group=8)], tmp_path / "o")
    assert list(tmp_path.iterdir()) == []


# -- configs ---------------------------------------------------------------------------------------

CODE = ("attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation")


@pytest.mark.parametrize("key", [*CODE, "auto_map"])
def test_what_can_name_code_is_not_read_and_not_written(key: str, tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, key: "someone/kernels", "text": {key: "x/y"}}))
    compress.run(folder, [RTN(group=8)], tmp_path / "o")
    assert key not in (tmp_path / "o" / "config.json").read_text()
    assert without_code({key: 1, "a": [{key: 2, "b": 3}]}) == {"a": [{"b": 3}]}


def test_an_artifact_that_names_attention_code_is_not_loaded(own_artifact: Path) -> None:
    config = json.loads((own_artifact / "config.json").read_text())
    (own_artifact / "config.json").write_text(json.dumps({**config, "_attn_implementation": "someone/kernels"}))
    with pytest.raises(ArtifactError, match="names an attention or experts implementation; remove it"):
        compress.load(own_artifact)


@pytest.mark.parametrize("value", ["x", [], 3])
def test_an_odd_quantization_config_is_no_artifact(value: object, tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": value}))
    assert not compress.artifact.is_artifact(folder)


@pytest.mark.parametrize(
    "tree", [{}, {"kind": "dense"}, {"kind": "dense", "shape": "ab"}, {"kind": 3, "shape": [1, 2]}]
)
def test_a_damaged_specification_is_one_line(tree: Any, own_artifact: Path, tmp_path: Path) -> None:
    config = json.loads((own_artifact / "config.json").read_text())
    site = next(iter(config["quantization_config"]["weights"].values()))
    site["tree"] = tree
    (own_artifact / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"quantization_config\.weights: "):
        compress.run(own_artifact, [RTN(group=8)], tmp_path / "o", dequantize=True)


LONG = "a" * 300


@pytest.mark.parametrize("model", [LONG, "~nosuchuser/x", "a\0b"])
def test_a_model_that_is_no_path_is_one_line(model: str, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no model folder at"):
        compress.run(model, [RTN()], tmp_path / "o")


@pytest.mark.parametrize("out", [LONG, "~nosuchuser/x", "a\0b"])
def test_a_place_that_is_no_path_is_one_line(out: str, tiny_llama: Path) -> None:
    with pytest.raises(compress.RecipeError, match="--out: "):
        compress.run(tiny_llama, [RTN(group=8)], out)


@pytest.mark.parametrize("data", [LONG, "a\0b"])
def test_calibration_that_is_no_path_is_one_line(data: str, tiny_llama: Path, tmp_path: Path) -> None:
    calibration = compress.Calibration(data=data, length=32)
    with pytest.raises(compress.CalibrationError, match=r"calibration\.data: "):
        compress.run(tiny_llama, [Wanda()], tmp_path / "o", calibration=calibration)


@pytest.mark.parametrize("size", [[0, 0], "xy", [16], [16, -1]])
def test_a_block_size_that_is_none_is_one_line(size: Any, tiny_llama: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_llama, tmp_path / "m"))
    config = json.loads((folder / "config.json").read_text())
    told = {"quant_method": "fp8", "weight_block_size": size}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": told}))
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    tensors |= {name: tensors[name].to(torch.float8_e4m3fn)}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ArtifactError, match="is not a pair of positive numbers"):
        compress.run(folder, [RTN(group=8)], tmp_path / "o")
