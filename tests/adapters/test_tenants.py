"""Adapters served beside their base, dense or compressed, compute what PEFT computes with each alone."""

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
from compress import GPTQ, RTN, ArtifactError, PlanError, Wanda
from compress.adapters import import_adapter
from compress.adapters.attach import attach
from compress.adapters.training import trainable
from compress.serving.languages import own_languages, tokenizer_of
from compress.tenants import load_tenants

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # by PEFT
EPS = torch.finfo(torch.float32).eps
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
BASES = {
    "2:4 int4": [Wanda(sparsity="2:4"), GPTQ(bits=4, group=24, target="original")],
    "rotated": [compress.passes.Rotate(), RTN(bits=4, group=24)],
    "vectors": [compress.passes.VQ(bits=2)],
    "int8 inputs": [RTN(bits=8, group=0, inputs="int8")],
    "some": [RTN(bits=3, group=24, sites="*mlp*")],
}
ADAPTERS: dict[str, dict[str, Any]] = {
    "few": {"r": 2, "target_modules": ["q_proj", "down_proj"]},
    "all": {"r": 5, "lora_alpha": 7, "target_modules": ALL},
    "norms": {"r": 3, "target_modules": ["v_proj"], "modules_to_save": ["norm"]},
}


@pytest.fixture
def compressed(tiny_llama: Path, tmp_path: Path) -> Callable[[list[Any]], Path]:
    """`compressed(passes)`: an artifact of the tiny Llama."""

    def make(passes: list[Any]) -> Path:
        calibration = compress.Calibration(samples=4, length=32)
        return compress.run(tiny_llama, passes, tmp_path / "small", calibration=calibration).out

    return make


def adapted(base: Path, out: Path, seed: int, **options: Any) -> Any:
    """A model of PEFT with random factors, saved in `out`."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(**{"lora_alpha": 8, "task_type": "CAUSAL_LM", **options})
    model: Any = get_peft_model(compress.load(base, kv=None), trainable(config))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                noise = 0.2 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(noise if ".lora_" in name else parameter + noise)
    model.eval().save_pretrained(out)
    return model


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()  # type: ignore[no-any-return]


@pytest.mark.slow
@pytest.mark.parametrize("case", BASES)
def test_many_adapters_over_one_compressed_model(
    case: str, compressed: Callable[[list[Any]], Path], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    small = compressed(BASES[case])
    alone = {name: adapted(small, tmp_path / name, i, **it) for i, (name, it) in enumerate(ADAPTERS.items())}
    tenants = load_tenants(small, {name: tmp_path / name for name in alone})
    names = ["all", None, "few", "norms", "all", "few"]
    rows = torch.cat([ids, ids])
    found = tenants(rows, names).logits.float()
    plain = compress.load(small)
    for number, name in enumerate(names):
        want = logits(plain if name is None else alone[name], rows[number : number + 1])
        assert_close(f"row of {name}", found[number : number + 1], want, 300 * EPS)
    assert float((found[0] - found[1]).norm() / found[1].norm()) > 0.01
    assert tenants.explain()["all"].keys() == {f"model.layers.{i}.{part}" for i in (0, 1) for part in paths(ALL)}


def paths(names: list[str]) -> list[str]:
    return [f"{'mlp' if name in ALL[4:] else 'self_attn'}.{name}" for name in names]


def test_an_adapter_needs_no_delta(tiny_llama: Path, ids: Tensor, tmp_path: Path, assert_close: Any) -> None:
    want = logits(adapted(tiny_llama, tmp_path / "a", 0, **ADAPTERS["all"]), ids)
    import_adapter(tmp_path / "a", tiny_llama, tmp_path / "delta")
    tenants = load_tenants(tiny_llama, {"adapter": tmp_path / "a", "delta": tmp_path / "delta"})
    for name in tenants.names():
        assert_close(name, tenants(ids, [name] * len(ids)).logits, want, 100 * EPS)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "targets"), [("qwen2", ["q_proj", "v_proj", "down_proj"]), ("gpt2", ["c_attn", "c_proj"])]
)
def test_biases_and_turned_matrices(
    kind: str, targets: list[str], model_folder: Callable[[str], Path], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    small = compress.run(model_folder(kind), [RTN(bits=4, group=24)], tmp_path / "small").out
    want = logits(adapted(small, tmp_path / "a", 1, r=3, target_modules=targets, bias="lora_only"), ids)
    tenants = load_tenants(small, {"a": tmp_path / "a"})
    for rows, tokens in ((3, 21), (1, 21), (2, 1), (1, 1)):
        found = tenants(ids[:rows, :tokens], ["a"] * rows).logits
        assert_close(f"{rows} rows of {tokens}", found, want[:rows, :tokens], 300 * EPS)
    assert any(said.startswith("own bias") for said in tenants.explain()["a"].values())
    assert len(tenants.generate([[5, 6, 7]], ["a"], 4)[0]) == 4


@pytest.mark.slow
def test_served_it_computes_what_it_does_attached(
    compressed: Callable[[list[Any]], Path], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    small = compressed(BASES["2:4 int4"])
    adapted(small, tmp_path / "a", 3, **ADAPTERS["norms"])
    want = logits(compress.load(attach(small, tmp_path / "a", tmp_path / "out").out), ids)
    tenants = load_tenants(small, {"a": tmp_path / "a"})
    assert_close("served", tenants(ids, ["a"] * len(ids)).logits, want, 300 * EPS)
    whole = sum(file.stat().st_size for file in (tmp_path / "a").glob("*.safetensors"))
    assert 0.5 * whole < tenants.delta_bytes() < whole + 100


def test_memory_is_known_before_an_adapter_is_read(tiny_llama: Path, tmp_path: Path) -> None:
    adapted(tiny_llama, tmp_path / "a", 0, r=5, lora_alpha=7, target_modules=["q_proj"])
    tenants = load_tenants(tiny_llama, {"a": tmp_path / "a"})
    asked = tenants.entries["a"].difference.nbytes
    tenants.load(["a"])
    assert tenants.delta_bytes() == asked == 2 * 4 * 5 * (48 + 48)
    with pytest.raises(PlanError, match=f"tenant 'a' takes {asked} bytes, the budget is {asked - 1}"):
        load_tenants(tiny_llama, {"a": tmp_path / "a"}, budget=asked - 1)


@pytest.mark.parametrize(
    ("name", "shapes", "said"),
    [
        ("q_proj", ((48, 2), (2, 47)), r"self_attn.q_proj is \[48, 47\], in the base \[48, 48\]"),
        ("k_proj", ((24, 2), (2, 48)), "lora_A.weight holds NaN or infinite values"),
        ("z_proj", ((48, 2), (2, 48)), "adapts model.layers.0.self_attn.z_proj, which does not exist in the base"),
    ],
)
def test_what_does_not_fit_is_refused_before_it_is_served(
    name: str, shapes: Any, said: str, llama_artifact: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "a"
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": [name]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    module = f"base_model.model.model.layers.0.self_attn.{name}"
    tensors = {f"{module}.lora_B.weight": torch.ones(shapes[0]), f"{module}.lora_A.weight": torch.ones(shapes[1])}
    if name == "k_proj":
        tensors[f"{module}.lora_A.weight"][1, 5] = torch.nan
    save_file(tensors, folder / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=said):
        load_tenants(llama_artifact, {"a": folder})


def test_an_adapter_speaks_as_its_base_but_in_what_it_brings(llama_artifact: Path, tmp_path: Path) -> None:
    """PEFT writes no tokenizer; trainers save one beside the adapter."""
    named = {name: tmp_path / name for name in ("plain", "chat")}
    for folder in named.values():
        adapted(llama_artifact, folder, 0, r=2, target_modules=["o_proj"])
    tokenizer: Any = tokenizer_of(llama_artifact)
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    (tmp_path / "chat" / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    tokenizer.save_pretrained(tmp_path / "chat")
    found = own_languages(llama_artifact, named, tokenizer_of(llama_artifact))
    assert list(found) == ["chat"]
    assert {7, 9} <= found["chat"].ends
    assert found["chat"].tokenizer.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "x"


@pytest.mark.slow
def test_a_latent_cache_would_leave_adapters_out_and_is_not_used(
    tiny_llama: Path, ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    calibration = compress.Calibration(samples=4, length=32)
    recipe = compress.Recipe(passes=(compress.passes.SVDLLM(removed=0.5),), calibration=calibration, kv="latent")
    small = compress.run(tiny_llama, recipe, tmp_path / "small").out
    want = logits(adapted(small, tmp_path / "a", 0, r=3, target_modules=["k_proj", "v_proj"]), ids)
    tenants, names = load_tenants(small, {"a": tmp_path / "a"}), ["a"] * len(ids)
    first = tenants(ids[:, :20], names, use_cache=True)
    last = tenants(ids[:, 20:], names, attention_mask=torch.ones_like(ids), past_key_values=first.past_key_values)
    assert_close("the last token", last.logits[:, -1], want[:, -1], 300 * EPS)


def test_what_was_saved_in_float32_is_served_in_the_bases_dtype(
    model_folder: Callable[..., Path], ids: Tensor, tmp_path: Path
) -> None:
    base = model_folder("llama", "bfloat16")
    adapted(base, tmp_path / "a", 0, r=2, target_modules=["q_proj"], modules_to_save=["norm", "lm_head"])
    found = load_tenants(base, {"a": tmp_path / "a"})(ids, ["a", None, "a"]).logits
    assert found.dtype == torch.bfloat16 and found.isfinite().all() and not found[0].equal(found[1])


@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`:UserWarning")  # by PEFT
def test_a_tied_embedding_saved_whole_is_refused(model_folder: Callable[..., Path], tmp_path: Path) -> None:
    base = model_folder("llama_tied")
    adapted(base, tmp_path / "a", 0, r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"])
    with pytest.raises(ArtifactError, match=r"embed_tokens\.weight, to which the base ties another tensor"):
        load_tenants(base, {"a": tmp_path / "a"})
    with pytest.raises(ArtifactError, match=r"embed_tokens\.weight, to which the base ties another tensor"):
        import_adapter(tmp_path / "a", base, tmp_path / "delta")


def test_a_compressed_matrix_saved_whole_is_refused(llama_artifact: Path, tmp_path: Path) -> None:
    adapted(llama_artifact, tmp_path / "a", 0, r=2, target_modules=["q_proj"])
    file = tmp_path / "a" / "adapter_model.safetensors"
    save_file({**load_file(file), "base_model.model.model.layers.0.self_attn.o_proj.weight": torch.ones(48, 48)}, file)
    for refuse in (lambda: load_tenants(llama_artifact, {"a": tmp_path / "a"}),
                   lambda: attach(llama_artifact, tmp_path / "a", tmp_path / "out")):  # fmt: skip
        with pytest.raises(ArtifactError, match=r"o_proj\.weight whole, which the base holds compressed"):
            refuse()


def test_nothing_is_loaded_for_what_is_refused(
    llama_artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(compress, "load", lambda *_, **__: pytest.fail("the base was loaded"))
    for name in (tmp_path / "none", "x" * 5000, "a\0b"):
        with pytest.raises(ArtifactError, match="no model folder"):
            load_tenants(llama_artifact, {"a": name})


def test_an_adapters_template_is_not_its_bases(tiny_llama: Path, tmp_path: Path) -> None:
    base = Path(shutil.copytree(tiny_llama, tmp_path / "base"))
    (base / "chat_template.jinja").write_text("BASE")
    adapted(base, tmp_path / "a", 0, r=2, target_modules=["o_proj"])
    for file in base.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "a")
    config = tmp_path / "a" / "tokenizer_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "chat_template": "MINE"}))
    found: Any = own_languages(base, {"a": tmp_path / "a"}, tokenizer_of(base))["a"].tokenizer
    assert found.apply_chat_template([{"role": "user", "content": "x"}], tokenize=False) == "MINE"


@pytest.mark.slow
def test_a_file_that_leaves_out_the_models_prefix(
    model_folder: Callable[..., Path], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    base = Path(shutil.copytree(model_folder("gpt2"), tmp_path / "base"))
    file = base / "model.safetensors"
    plain = {name.removeprefix("transformer."): tensor for name, tensor in load_file(file).items()}
    save_file(plain, file, metadata={"format": "pt"})
    want = logits(adapted(base, tmp_path / "a", 0, r=3, target_modules=["c_attn"], fan_in_fan_out=True), ids)
    tenants = load_tenants(base, {"a": tmp_path / "a"})
    assert_close("served", tenants(ids, ["a"] * len(ids)).logits, want, 300 * EPS)
