"""An adapter trained with PEFT on a compressed model: what it computes there, the artifact with it computes too."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import GPTQ, RTN, ArtifactError, Magnitude, RecipeError, UnsupportedWeight, Wanda
from compress.adapters.attach import attach
from compress.adapters.training import trainable
from compress.artifact import Artifact, keys, verify

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),  # by PEFT
]
EPS = torch.finfo(torch.float32).eps
PASSES = {
    "2:4 int4": [Wanda(sparsity="2:4"), GPTQ(bits=4, group=24, target="original")],
    "masked": [Magnitude(sparsity=0.5)],
    "int3 of some": [RTN(bits=3, group=24, sites="*mlp*")],
    "rotated": [compress.passes.Rotate(), RTN(bits=4, group=24)],
    "corrected": [RTN(bits=2, group=24), compress.passes.Repair(rank=3)],
}
TARGETS = ["q_proj", "o_proj", "down_proj"]


@pytest.fixture
def compressed(tiny_llama: Path, tmp_path: Path) -> Callable[..., Path]:
    """`compressed(passes)`: an artifact of the tiny Llama."""

    def make(passes: list[Any]) -> Path:
        calibration = compress.Calibration(samples=4, length=32)
        return compress.run(tiny_llama, passes, tmp_path / "small", calibration=calibration).out

    return make


def wrapped(folder: Path, **options: Any) -> Any:
    from peft import LoraConfig, get_peft_model

    options = {"r": 4, "lora_alpha": 8, "target_modules": TARGETS, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(compress.load(folder), trainable(LoraConfig(**options)))


def trained(folder: Path, out: Path, ids: Tensor, **options: Any) -> tuple[Any, list[float]]:
    """A model with an adapter after five steps on these tokens, and its loss at each."""
    torch.manual_seed(0)
    model = wrapped(folder, **options)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    losses = []
    for _ in range(5):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    model.eval().save_pretrained(out)
    return model, losses


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("case", PASSES)
def test_the_artifact_computes_what_was_trained(
    case: str, compressed: Callable[..., Path], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    small = compressed(PASSES[case])
    model, losses = trained(small, tmp_path / "adapter", ids)
    done = attach(small, tmp_path / "adapter", tmp_path / "out")
    assert losses[-1] < 0.9 * losses[0]
    assert done.matrices == 2 * len(TARGETS)
    want = logits(model, ids)
    assert_close("loaded", logits(compress.load(done.out), ids), want, 100 * EPS)
    assert_close("lean", logits(compress.load(done.out, low_memory=True), ids), want, 100 * EPS)
    assert float((logits(compress.load(small), ids) - want).norm() / want.norm()) > 0.01
    assert verify(done.out)


def test_masks_and_codes_stay_as_they_were(compressed: Callable[..., Path], ids: Tensor, tmp_path: Path) -> None:
    small = compressed(PASSES["2:4 int4"])
    trained(small, tmp_path / "adapter", ids)
    attach(small, tmp_path / "adapter", tmp_path / "out")
    before, after = Artifact(small), Artifact(tmp_path / "out")
    assert before.specs.keys() == after.specs.keys()
    for site, spec in before.specs.items():
        adapted = site.rpartition(".")[2] in TARGETS
        kept = keys(site, after.specs[site])
        for path, key in keys(site, spec).items():
            there = kept[f"terms.0.{path}" if adapted else path]
            assert torch.equal(after.stored_tensor(there), before.stored_tensor(key))
    more = after.provenance["sizes"]["bytes"] - before.provenance["sizes"]["bytes"]
    assert more == sum(
        row["bytes"] - before.provenance["sites"][site]["bytes"] for site, row in after.provenance["sites"].items()
    )
    assert after.provenance["probe"]["tokens"] == 0 and after.provenance["adapter"]["name"] == "adapter"


def test_only_factors_are_trained(compressed: Callable[..., Path], ids: Tensor) -> None:
    model = wrapped(compressed(PASSES["2:4 int4"]))
    model(input_ids=ids, labels=ids).loss.backward()
    learned = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert learned and all(".lora_" in name for name in learned)
    assert model.base_model.model.hf_quantizer.is_trainable


def test_a_saved_adapter_is_loaded_again(
    compressed: Callable[..., Path], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    from peft import PeftConfig, PeftModel

    small = compressed(PASSES["2:4 int4"])
    model, _ = trained(small, tmp_path / "adapter", ids)
    config = trainable(PeftConfig.from_pretrained(str(tmp_path / "adapter")))
    again = PeftModel.from_pretrained(compress.load(small), str(tmp_path / "adapter"), config=config)
    assert_close("loaded by PEFT", logits(again, ids), logits(model, ids), 10 * EPS)


def test_tensors_that_were_saved_whole_replace_the_artifacts(
    compressed: Callable[..., Path], ids: Tensor, tmp_path: Path, assert_close: Any
) -> None:
    small = compressed(PASSES["int3 of some"])
    model, _ = trained(small, tmp_path / "adapter", ids, modules_to_save=["lm_head"])
    assert attach(small, tmp_path / "adapter", tmp_path / "out").whole == 1
    assert_close("loaded", logits(compress.load(tmp_path / "out"), ids), logits(model, ids), 100 * EPS)


def test_what_cannot_be_attached_is_refused(compressed: Callable[..., Path], ids: Tensor, tmp_path: Path) -> None:
    from peft import LoraConfig

    small = compressed([RTN(bits=8, group=0, symmetric=True, inputs="int8")])
    model, _ = trained(small, tmp_path / "adapter", ids)
    with pytest.raises(UnsupportedWeight, match="its input is quantized to int8"):
        attach(small, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(UnsupportedWeight, match="use `compress attach`"):
        model.merge_and_unload()
    with pytest.raises(RecipeError, match="'all-linear' does not match compressed layers"):
        trainable(LoraConfig(target_modules="all-linear"))
    with pytest.raises(UnsupportedWeight, match="use_dora"):
        trainable(LoraConfig(target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ArtifactError, match="no adapter at"):
        attach(small, small, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_latents_that_an_adapter_would_end_are_kept(tiny_llama: Path, ids: Tensor, tmp_path: Path) -> None:
    factored = compress.passes.SVD(sites="*.[kv]_proj", removed=0.3, shared=True)
    recipe = compress.Recipe(passes=(factored,), kv="latent")
    small = compress.run(tiny_llama, recipe, tmp_path / "small").out
    trained(small, tmp_path / "v", ids, target_modules=["v_proj"])
    with pytest.raises(RecipeError, match="keys and values are kept as latents: train an adapter of other modules"):
        attach(small, tmp_path / "v", tmp_path / "out")
    assert not (tmp_path / "out").exists()
    trained(small, tmp_path / "o", ids, target_modules=["o_proj"])
    attach(small, tmp_path / "o", tmp_path / "out")
    assert compress.load(tmp_path / "out")(input_ids=ids).logits.isfinite().all()


def test_a_dense_model_or_a_delta_is_refused(
    tiny_llama: Path, compressed: Callable[..., Path], ids: Tensor, tmp_path: Path
) -> None:
    from compress.adapters import import_adapter

    trained(compressed(PASSES["masked"]), tmp_path / "adapter", ids)
    with pytest.raises(ArtifactError, match="not a Compress artifact"):
        attach(tiny_llama, tmp_path / "adapter", tmp_path / "out")
    with pytest.raises(RecipeError, match="is a compressed model; `compress attach` makes the adapter a part of it"):
        import_adapter(tmp_path / "adapter", tmp_path / "small", tmp_path / "delta")
    import_adapter(tmp_path / "adapter", tiny_llama, tmp_path / "delta")
    with pytest.raises(RecipeError, match="is a delta of"):
        attach(tmp_path / "delta", tmp_path / "adapter", tmp_path / "out")


def test_the_command_says_what_was_added(
    compressed: Callable[..., Path], ids: Tensor, cli: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    small = compressed(PASSES["2:4 int4"])
    trained(small, tmp_path / "adapter", ids)
    code, out, _ = cli("attach", str(small), str(tmp_path / "adapter"), "--json")
    told = json.loads(out)
    assert code == 0 and told["matrices"] == 6 and told["out"].endswith("small-attached")
    code, out, _ = cli("inspect", told["out"])
    assert code == 0 and "errors without the adapter" in " ".join(out.split()) and "probe KL" not in out
    assert "The LoRA adapter `adapter` was made part of it" in (Path(told["out"]) / "README.md").read_text()
    code, _, err = cli("attach", str(small), str(tmp_path / "nothing"), "--out", str(tmp_path / "x"))
    assert code == 2 and err.count("\n") == 1
