"""LoRA adapters as deltas and back: PEFT is the oracle, in what it trains, what it saves and what it computes."""

from __future__ import annotations

import json
import shutil
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import compress
from compress import ArtifactError, Delta, Recipe, RecipeError, UnsupportedWeight
from compress.adapters import import_adapter
from compress.adapters.lora import Adapter, matching, scaled
from compress.artifact import Artifact, verify
from compress.export import export
from compress.passes import SVD, DeltaCoMe, Magnitude

pytestmark = [  # PEFT takes long to import, and calls what transformers deprecates
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
Maker = Callable[..., Path]
EPS = torch.finfo(torch.float32).eps
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "down_proj"]}),
    "a scale that rounds": ("llama", {"r": 4, "lora_alpha": 5.3, "target_modules": "all-linear"}),
    "rank-stabilised": ("llama", {"r": 8, "lora_alpha": 3, "use_rslora": True, "target_modules": ["v_proj"]}),
    "ranks by pattern": (
        "llama",
        {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": ["q_proj", "k_proj", "o_proj"],
            "rank_pattern": {"layers.1.self_attn.q_proj": 2, "k_proj": 3},
            "alpha_pattern": {r"layers.\d+.self_attn.q_proj": 6},
        },
    ),
    "a head of its own": ("llama", {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "biases": ("qwen2", {"r": 2, "target_modules": ["q_proj", "v_proj"], "bias": "all"}),
    "transposed": ("gpt2", {"r": 2, "target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
}


@pytest.fixture
def trained(model_folder: Maker, tmp_path: Path) -> Callable[..., tuple[Path, Path, Any]]:
    """`trained(family, dtype=None, **options)`: the base, the folder of an adapter of random factors, PEFT's model."""

    def make(family: str = "llama", dtype: torch.dtype | None = None, **options: Any) -> tuple[Path, Path, Any]:
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM

        base = model_folder(family)
        model = AutoModelForCausalLM.from_pretrained(base)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **options)).eval()
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn_like(parameter) * 0.1)
                if "lora_" in name and dtype:
                    parameter.data = parameter.data.to(dtype)
        adapted.save_pretrained(tmp_path / "adapter")
        return base, tmp_path / "adapter", adapted

    return make


@pytest.fixture
def plain(trained: Callable[..., tuple[Path, Path, Any]]) -> tuple[Path, Path]:
    """A base and an adapter of it."""
    return trained(**CASES["plain"][1])[:2]


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", CASES)
def test_a_delta_computes_what_the_adapter_does(
    case: str, trained: Callable[..., tuple[Path, Path, Any]], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    family, options = CASES[case]
    base, adapter, model = trained(family, **options)
    done = import_adapter(adapter, base, tmp_path / "delta")
    want = logits(model, ids)
    assert_close("loaded", logits(compress.load(done.out, base=base), ids), want, 30 * EPS)
    tenants = compress.load_tenants(base, {"a": done.out})
    assert_close("served", tenants(ids, ["a"] * len(ids)).logits.float(), want, 30 * EPS)
    assert float((logits(compress.load(base), ids) - want).norm() / want.norm()) > 0.01


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_factors_are_stored_bit_for_bit(
    dtype: torch.dtype, trained: Callable[..., tuple[Path, Path, Any]], tmp_path: Path
) -> None:
    base, adapter, _ = trained(dtype=dtype, **CASES["plain"][1])
    kept = load_file(adapter / "adapter_model.safetensors")
    site = "model.layers.1.mlp.down_proj"
    import_adapter(adapter, base, tmp_path / "delta")
    left, right = Artifact(tmp_path / "delta").difference(site).children()
    key = f"base_model.model.{site}.lora_"
    assert torch.equal(right.dense(), kept[f"{key}A.weight"]) and right.dense().dtype == dtype
    assert torch.equal(left.dense(), 2 * kept[f"{key}B.weight"]) and left.dense().dtype == dtype


def test_a_scale_is_rounded_once_and_only_where_it_must_be() -> None:
    b_OR = torch.randn(7, 3, generator=torch.Generator().manual_seed(0)).bfloat16()
    assert torch.equal(scaled(b_OR, 0.25), b_OR * 0.25)
    third = scaled(b_OR, 1 / 3)
    assert third.dtype == torch.float32 and torch.equal(third, (b_OR.double() / 3).float())


def test_an_exported_adapter_is_what_was_imported(
    trained: Callable[..., tuple[Path, Path, Any]], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, adapter, model = trained(**CASES["ranks by pattern"][1])
    import_adapter(adapter, base, tmp_path / "delta")
    out = export(tmp_path / "delta", "peft", tmp_path / "again").out
    again = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))
    assert_close("read by PEFT", logits(again, ids), logits(model, ids), 30 * EPS)
    mine, theirs = Adapter(out), Adapter(adapter)
    assert {m: p.rank for m, p in mine.pairs.items()} == {m: p.rank for m, p in theirs.pairs.items()}
    for module in mine.pairs:
        for got, want in zip(mine.factors(module), theirs.factors(module), strict=True):
            assert torch.equal(got, want)


@pytest.fixture
def finetuned(model_folder: Maker, tmp_path: Path) -> tuple[Path, Path]:
    """A base and a model whose matrices, and nothing else, differ from it."""
    base = model_folder("llama")
    tuned = shutil.copytree(base, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    noise = torch.Generator().manual_seed(1)
    changed = {
        name: w + 0.05 * torch.randn(w.shape, generator=noise) if "proj" in name else w for name, w in tensors.items()
    }
    save_file(changed, tuned / "model.safetensors", metadata={"format": "pt"})
    return base, tuned


@pytest.mark.parametrize("step", [SVD(removed=0.6), DeltaCoMe(bits=1.0)], ids=lambda step: step.name)
def test_a_compressed_delta_of_low_rank_becomes_an_adapter(
    step: Any, finetuned: tuple[Path, Path], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, tuned = finetuned
    recipe = Recipe(passes=(step,), delta=Delta(base=str(base)), calibration=compress.Calibration(samples=4, length=32))
    compress.run(tuned, recipe, tmp_path / "delta")
    out = export(tmp_path / "delta", "peft", tmp_path / "adapter").out
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), str(out))
    want = logits(compress.load(tmp_path / "delta", base=base), ids)
    assert_close("read by PEFT", logits(model, ids), want, 100 * EPS)


def test_what_no_adapter_can_say_is_refused(finetuned: tuple[Path, Path], tmp_path: Path) -> None:
    base, tuned = finetuned
    calibration = compress.Calibration(samples=4, length=32)
    sparse = Recipe(passes=(Magnitude(),), delta=Delta(base=str(base)), calibration=calibration)
    compress.run(tuned, sparse, tmp_path / "sparse")
    with pytest.raises(UnsupportedWeight, match=r"q_proj .*not a low-rank product; use `compress serve`"):
        export(tmp_path / "sparse", "peft", tmp_path / "out")
    few = Recipe(passes=(SVD(removed=0.6, sites="*q_proj"),), delta=Delta(base=str(base)), calibration=calibration)
    compress.run(tuned, few, tmp_path / "few")
    with pytest.raises(RecipeError, match=r"stores model.layers.0.mlp.down_proj.weight whole"):
        export(tmp_path / "few", "peft", tmp_path / "out")
    held = load_file(tuned / "model.safetensors")
    held["model.embed_tokens.weight"] += 0.01
    save_file(held, shutil.copytree(tuned, tmp_path / "moved") / "model.safetensors", metadata={"format": "pt"})
    kept = Delta(base=str(base), embeddings="int8", head="base", others="base")
    compress.run(
        tmp_path / "moved", Recipe(passes=(SVD(removed=0.6),), delta=kept, calibration=calibration), tmp_path / "tables"
    )
    with pytest.raises(RecipeError, match=r"stores model.embed_tokens in 8 bits, which an adapter cannot hold"):
        export(tmp_path / "tables", "peft", tmp_path / "out")
    compress.run(base, [SVD(removed=0.6)], tmp_path / "whole", calibration=calibration)
    with pytest.raises(RecipeError, match="is a whole model, not a delta"):
        export(tmp_path / "whole", "peft", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_an_adapter_is_evaluated_beside_its_base(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    import_adapter(adapter, base, tmp_path / "delta")
    told = Artifact(tmp_path / "delta").provenance
    assert told["adapter"]["name"] == "adapter" and len(told["adapter"]["sha256"]) == 64
    compress.artifact.check_base([tmp_path / "delta"], base)  # raises if they cannot be compared


def test_a_delta_keeps_the_tokenizer_of_its_adapter(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    shutil.copy(base / "tokenizer.json", adapter)
    (adapter / "chat_template.jinja").write_text("{{ messages }}")
    import_adapter(adapter, base, tmp_path / "delta")
    kept = {file.name for file in (tmp_path / "delta").iterdir()}
    assert "chat_template.jinja" in kept
    assert not kept & {"tokenizer.json", "adapter_config.json"}  # the base's own, and what is no companion
    assert "tokenizer.json" in Artifact(tmp_path / "delta").provenance["base_files"]
    assert verify(tmp_path / "delta", base)


def test_a_card_says_that_nothing_was_lost(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    import_adapter(adapter, base, tmp_path / "delta")
    card = (tmp_path / "delta" / "README.md").read_text()
    assert "factors are stored as they were trained" in card and "probe" not in card
    export(tmp_path / "delta", "peft", tmp_path / "again")
    front = (tmp_path / "again" / "README.md").read_text().split("---")[1]
    assert "library_name: peft" in front and f"base_model: {json.dumps(base.name)}" in front


SET = {
    "DoRA": ({"use_dora": True}, "use_dora is set"),
    "changed base": ({"init_lora_weights": "pissa"}, "init_lora_weights 'pissa' changes the base's weights"),
    "another method": ({"peft_type": "IA3"}, "peft_type is 'IA3'; only LORA can be read"),
    "no rank": ({"r": 0}, "r: Input should be greater than or equal to 1"),
    "infinite": ({"lora_alpha": float("inf")}, "lora_alpha: Input should be a finite number"),
    "another rank": ({"r": 5}, r"floats of \[5, in\] and \[out, 5\] are needed"),
    "endless pattern": ({"alpha_pattern": {"(a+)+$": 1}}, "repeats too much"),
    "broken pattern": ({"rank_pattern": {"(": 1}}, "not a regular expression"),
}


@pytest.mark.parametrize("case", SET)
def test_an_unfit_configuration_is_refused(case: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    changed, said = SET[case]
    config = json.loads((adapter / "adapter_config.json").read_text()) | changed
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=said):
        import_adapter(adapter, base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


Q = "base_model.model.model.layers.0.self_attn.q_proj"
EDITS: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "partner lost": (lambda t: t.pop(f"{Q}.lora_A.weight"), "has only lora_B"),
    "unknown module": (
        lambda t: [t.__setitem__(k.replace("q_proj", "x_proj"), t.pop(k)) for k in list(t)],
        "adapts model.layers.0.self_attn.x_proj, which does not exist",
    ),
    "outside the blocks": (
        lambda t: t.update({f"base_model.model.lm_head.lora_{x}.weight": torch.ones(4, 4) for x in "AB"}),
        "adapts lm_head, which is not a linear layer inside a block",
    ),
    "another shape": (
        lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 7)}), r"q_proj is \[\d+, 7\], in the base",
    ),
    "not a number": (lambda t: t[f"{Q}.lora_B.weight"].fill_(float("nan")), "holds NaN or infinite values"),
    "integers": (lambda t: t.update({f"{Q}.lora_A.weight": torch.ones(4, 32).int()}), "lora_A is I32"),
    "an embedding": (
        lambda t: t.update({"base_model.model.model.embed_tokens.lora_embedding_A": torch.ones(4, 9)}),
        "is not a matrix of a linear layer",
    ),
    "another prefix": (lambda t: t.update({"q_proj.lora_A.weight": torch.ones(4, 9)}), "is not a matrix of a linear"),
    "unknown whole tensor": (
        lambda t: t.update({"base_model.model.score.weight": torch.ones(4, 9)}), "holds score.weight",
    ),
    "nothing": (lambda t: t.clear(), "contains no tensor"),
}  # fmt: skip


@pytest.mark.parametrize("case", EDITS)
def test_unfit_weights_are_refused(case: str, plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    edit, said = EDITS[case]
    tensors = load_file(adapter / "adapter_model.safetensors")
    edit(tensors)
    save_file(tensors, adapter / "adapter_model.safetensors")
    with pytest.raises(ArtifactError, match=said):
        import_adapter(adapter, base, tmp_path / "delta")
    assert not (tmp_path / "delta").exists()


def test_places_and_formats_are_checked_first(plain: tuple[Path, Path], tmp_path: Path) -> None:
    base, adapter = plain
    with pytest.raises(ArtifactError, match="no adapter at"):
        import_adapter(base, base, tmp_path / "delta")
    with pytest.raises(
        ArtifactError, match="is an adapter; give its base here, or make a delta of it with `compress delta import`"
    ):
        compress.load(adapter)
    with pytest.raises(RecipeError, match="must not be, contain or lie in"):
        import_adapter(adapter, base, adapter / "delta")
    import_adapter(adapter, base, tmp_path / "delta")
    with pytest.raises(RecipeError, match="exists; choose another folder, or --force"):
        import_adapter(adapter, base, tmp_path / "delta")
    assert import_adapter(adapter, base, tmp_path / "delta", force=True).matrices == 4
    (adapter / "adapter_model.safetensors").rename(adapter / "adapter_model.bin")
    with pytest.raises(ArtifactError, match=r"missing adapter_model.safetensors \(a pickled"):
        import_adapter(adapter, base, tmp_path / "other")


def test_another_base_is_refused_when_the_delta_is_used(
    plain: tuple[Path, Path], model_folder: Maker, tmp_path: Path
) -> None:
    base, adapter = plain
    import_adapter(adapter, base, tmp_path / "delta")
    with pytest.raises(ArtifactError, match="is not the base of"):
        compress.load(tmp_path / "delta", base=model_folder("llama", dtype="bfloat16"))


def test_the_command_line_imports_serves_and_exports(
    plain: tuple[Path, Path], cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    base, adapter = plain
    code, out, _ = cli("delta", "import", str(adapter), "--base", str(base), "--out", str(tmp_path / "d"), "--json")
    assert code == 0 and json.loads(out)["matrices"] == 4
    code, out, _ = cli("delta", "apply", str(tmp_path / "d"), "--base", str(base), "--out", str(tmp_path / "whole"))
    assert code == 0
    code, out, _ = cli("export", str(tmp_path / "d"), "--to", "peft", "--out", str(tmp_path / "p"), "--json")
    assert code == 0 and json.loads(out)["format"] == "peft"
    code, _, err = cli("delta", "import", str(tmp_path / "whole"), "--base", str(base), "--out", str(tmp_path / "x"))
    assert code == 2 and err.count("\n") == 1 and "no adapter at" in err


def test_a_pattern_matches_the_end_of_a_path() -> None:
    assert matching({"q_proj": 3}, "model.layers.0.q_proj", 8) == 3
    assert matching({r"layers\.\d+\.q_proj": 3}, "model.layers.10.q_proj", 8) == 3
    assert matching({"roj": 3}, "model.layers.0.q_proj", 8) == 8  # the end of a part is not a part
