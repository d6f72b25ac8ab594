"""`compress delta extract --method lora`: PEFT trains and merges an adapter, and gets it back."""

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
from compress.artifact import Artifact
from compress.model.source import Checkpoint

pytestmark = [  # PEFT takes long to import, and calls what transformers deprecates
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]
Run = Callable[..., tuple[int, str, str]]
Merged = Callable[..., tuple[Path, Path, Any]]


@pytest.fixture
def merged(model_folder: Callable[..., Path], tmp_path: Path) -> Merged:
    """`merged(dtype, family)`: the base, the folder of the merged model, and PEFT's model of the same adapter."""

    def make(dtype: torch.dtype, family: str = "llama") -> tuple[Path, Path, Any]:
        from peft import LoraConfig, PeftModel, get_peft_model
        from transformers import AutoModelForCausalLM

        base = model_folder(family, str(dtype).removeprefix("torch."))
        targets = ["c_attn", "c_fc"] if family == "gpt2" else ["q_proj", "down_proj"]
        options = LoraConfig(
            r=2, lora_alpha=4, target_modules=targets, task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2"
        )
        model = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            adapted = get_peft_model(model, options)
        torch.manual_seed(3)
        with torch.no_grad():
            for name, parameter in adapted.named_parameters():
                if "lora_" in name:
                    parameter.copy_(torch.randn_like(parameter) * 0.05)
        adapted.save_pretrained(tmp_path / "adapter")
        adapted.merge_and_unload().save_pretrained(tmp_path / "tuned")
        shutil.copy(base / "tokenizer.json", tmp_path / "tuned")
        again = PeftModel.from_pretrained(
            AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), str(tmp_path / "adapter")
        )
        return base, tmp_path / "tuned", again.float().eval()

    return make


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids).logits.float()  # type: ignore[no-any-return]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_an_adapter_comes_back_from_its_merge(
    family: str, dtype: torch.dtype, merged: Merged, cli: Run, ids: Tensor, tmp_path: Path
) -> None:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base, tuned, true = merged(dtype, family)
    asked = ("--base", base, "--method", "lora", "--out", tmp_path / "delta", "--json")
    code, _, said = cli("delta", "extract", tuned, *asked)
    assert code == 0, said
    delta = Artifact(tmp_path / "delta", base)
    rows = delta.provenance["sites"]
    assert {row["rank"] for row in rows.values()} == {2}
    assert min(row["reproduced"] for row in rows.values()) > 0.8
    assert delta.changed() == []  # embeddings, norms and biases are the base's, and so are the other matrices
    assert len(rows) == len([name for name in Checkpoint(tuned).names() if not same(name, base, tuned)])
    code, _, said = cli("export", tmp_path / "delta", "--to", "peft", "--out", tmp_path / "again")
    assert code == 0, said
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    got = logits(PeftModel.from_pretrained(plain, str(tmp_path / "again")).float(), ids)
    want = logits(true, ids)
    rounded = logits(AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32), ids)
    assert float((got - want).norm()) < float((rounded - want).norm()) + 1e-6 * float(want.norm())


def same(name: str, base: Path, tuned: Path) -> bool:
    return torch.equal(Checkpoint(base).tensor(name), Checkpoint(tuned).tensor(name))


def test_a_full_fine_tune_is_refused_in_one_line(model_folder: Callable[..., Path], cli: Run, tmp_path: Path) -> None:
    base = model_folder("llama")
    tuned = shutil.copytree(base, tmp_path / "tuned")
    noise = torch.Generator().manual_seed(1)
    tensors = load_file(tuned / "model.safetensors")
    changed = {n: w + 0.001 * torch.randn(w.shape, generator=noise) if "proj" in n else w for n, w in tensors.items()}
    save_file(changed, tuned / "model.safetensors", metadata={"format": "pt"})
    asked = ("delta", "extract", tuned, "--base", base, "--method", "lora", "--out", tmp_path / "delta")
    code, _, said = cli(*asked)
    assert code == 2 and said.count("error: ") == 1
    assert "entries are changed, which no product of rank" in said.splitlines()[-1]  # after the lines of progress
    assert said.endswith("use --method auto or lowrank\n")
    assert {path.name for path in tmp_path.iterdir()} == {"tuned"}


@pytest.mark.parametrize("option", [("--bits", "2"), ("--size", "1MB"), ("--data", "text"), ("--distill", "3")])
def test_options_that_it_has_no_use_for_are_refused(
    option: tuple[str, str], finetuned: tuple[Path, Path], cli: Run, tmp_path: Path
) -> None:
    base, tuned = finetuned
    code, _, said = cli("delta", "extract", tuned, "--base", base, "--method", "lora", *option, "--out", tmp_path / "d")
    assert code == 2 and said.count("\n") == 1 and said.startswith(f"error: {option[0]}: "), said


@pytest.fixture
def finetuned(model_folder: Callable[..., Path], tmp_path: Path) -> tuple[Path, Path]:
    """A base and a copy of it."""
    base = model_folder("llama")
    return base, shutil.copytree(base, tmp_path / "copy")


def test_the_delta_serves_as_the_adapter_does(merged: Merged, ids: Tensor, tmp_path: Path, assert_close: Any) -> None:
    base, tuned, true = merged(torch.float32)
    compress.extract(tuned, base, tmp_path / "delta", method="lora")
    want = logits(true, ids)
    eps = torch.finfo(torch.float32).eps
    assert_close("loaded", logits(compress.load(tmp_path / "delta", base=base), ids), want, 60 * eps)
    tenants = compress.load_tenants(base, {"a": tmp_path / "delta"})
    assert_close("served", tenants(ids, ["a"] * len(ids)).logits.float(), want, 60 * eps)
    told = json.loads((tmp_path / "delta" / "compress.json").read_text())
    assert all(0 < row["steps_left"] < 0.5 for row in told["sites"].values())
