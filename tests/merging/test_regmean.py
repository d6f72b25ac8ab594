"""RegMean: least squares on every model's own inputs, which are measured with stock transformers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import Calibration, RecipeError
from compress.calibration import draw
from compress.merging import merge
from compress.merging.regmean import regression
from compress.model.source import Checkpoint
from compress.plan import tokenizer_of

CALIBRATIONS = {
    "left": Calibration(data="text", samples=6, length=32),
    "right": Calibration(data="mixed", samples=8, length=32, seed=3),
}


def tokens(seed: int, width: int = 12, count: int = 200) -> Tensor:
    draws = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=draws) @ torch.randn(width, width, generator=draws)


def problem() -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Changes [7, 12], tokens, and their Grams, of three models."""
    draws = torch.Generator().manual_seed(9)
    changes = [torch.randn(7, 12, generator=draws).double() for _ in range(3)]
    inputs = [tokens(seed) for seed in range(3)]
    return changes, inputs, [x.T @ x / len(x) for x in inputs]


def test_without_shrinking_it_is_least_squares_on_the_stacked_inputs(assert_close: Any) -> None:
    changes, inputs, grams = problem()
    weights = [1.0, 0.5, 2.0]
    rows = [(w / len(x)) ** 0.5 for w, x in zip(weights, inputs, strict=True)]
    x = torch.cat([r * x.double() for r, x in zip(rows, inputs, strict=True)])
    y = torch.cat([r * x.double() @ d.T for r, x, d in zip(rows, inputs, changes, strict=True)])
    got = regression(changes, grams, weights, 0.0)
    assert got is not None
    assert_close("change", got, torch.linalg.lstsq(x, y).solution.T, 1e-4)  # damped by 1e-6 of the mean square


@pytest.mark.parametrize("shrink", [0.1, 0.7])
def test_it_is_the_formula(shrink: float, assert_close: Any) -> None:
    changes, _, grams = problem()
    shrunk = [(1 - shrink) * g.double() + shrink * torch.diag(g.diagonal().double()) for g in grams]
    want = sum(d @ g for d, g in zip(changes, shrunk, strict=True)) @ torch.linalg.inv(sum(shrunk))
    got = regression(changes, grams, [1.0] * 3, shrink)
    assert got is not None
    assert_close("change", got, want, 1e-4)


def test_all_off_the_diagonal_gone_each_input_is_a_mean_by_its_own_energy(assert_close: Any) -> None:
    changes, _, grams = problem()
    energy = [g.diagonal().double() for g in grams]
    want = sum(d * e for d, e in zip(changes, energy, strict=True)) / sum(energy)
    got = regression(changes, grams, [1.0] * 3, 1.0)
    assert got is not None
    assert_close("change", got, want, 1e-4)


def test_inputs_that_never_occur_are_averaged(assert_close: Any) -> None:
    changes, _, grams = problem()
    for gram in grams:
        gram[3], gram[:, 3] = 0, 0
        gram *= 12 / gram.trace()  # equal damping
    got = regression(changes, grams, [1.0] * 3, 0.1)
    assert got is not None
    assert_close("column", got[:, 3], sum(d[:, 3] for d in changes) / 3, 1e-6)


def test_grams_that_have_no_inverse_are_told() -> None:
    broken = -torch.eye(3)
    assert regression([torch.ones(2, 3).double()] * 2, [broken] * 2, [1.0, 1.0], 0.0) is None


# -- whole models ----------------------------------------------------------------------------------


def grams_of(folder: Path, calibration: Calibration, hugging_face: Callable[[Path], Any]) -> dict[str, Tensor]:
    """The mean x xᵀ of each linear map's inputs, by hooks on the stock model."""
    model = hugging_face(folder)
    found: dict[str, list[Tensor]] = {}
    for name, module in model.named_modules():
        if type(module).__name__ in ("Linear", "Conv1D"):
            module.register_forward_pre_hook(
                lambda _, args, n=name: found.setdefault(n, []).append(args[0].detach().flatten(0, -2))
            )
    with torch.inference_mode():
        for ids in draw(calibration, tokenizer_of(folder), 128).windows:
            model(input_ids=ids)
    return {n: torch.cat(x).double().T @ torch.cat(x).double() / len(torch.cat(x)) for n, x in found.items()}


def test_a_model_is_merged_on_each_ones_own_inputs(
    tiny_llama: Path, tuned_llamas: dict[str, Path], hugging_face: Callable[[Path], Any], tmp_path: Path,
    assert_close: Any,
) -> None:  # fmt: skip
    weights = {"left": 1, "right": 0.5}
    merge(
        tiny_llama, tuned_llamas, tmp_path / "o", method="regmean", shrink=0.2, weights=weights,
        calibration=CALIBRATIONS,
    )  # fmt: skip
    grams = {n: grams_of(folder, CALIBRATIONS[n], hugging_face) for n, folder in tuned_llamas.items()}
    opened = {n: Checkpoint(folder) for n, folder in tuned_llamas.items()}
    made = Checkpoint(tmp_path / "o")
    for name in made.names():
        site = name.removesuffix(".weight")
        both = {n: opened[n].tensor(name).double() for n in opened}
        if ".layers." in name and site in grams["left"]:
            shrunk = {n: weights[n] * (0.8 * g[site] + 0.2 * torch.diag(g[site].diagonal())) for n, g in grams.items()}
            want = sum(both[n] @ shrunk[n] for n in both) @ torch.linalg.inv(sum(shrunk.values()))
        else:
            want = sum(weights[n] * both[n] for n in both) / 1.5
        assert_close(name, made.tensor(name), want, 1e-4)


def test_order_and_shards_do_not_change_a_bit(
    tiny_llama: Path, tuned_llamas: dict[str, Path], read: Any, same: Any, tmp_path: Path
) -> None:
    turned = dict(reversed(tuned_llamas.items()))
    merge(tiny_llama, tuned_llamas, tmp_path / "x", method="regmean", calibration=CALIBRATIONS)
    merge(tiny_llama, turned, tmp_path / "y", method="regmean", calibration=CALIBRATIONS, shard_size=20_000)
    assert same(read(tmp_path / "x"), read(tmp_path / "y"))


@pytest.mark.parametrize("kind", ["gpt2", "mixtral"])
def test_other_families_are_merged(
    kind: str, tiny_llama: Path, tmp_path: Path, hugging_face: Any, assert_close: Any
) -> None:
    """GPT-2's matrices lie turned in the file; what a router chooses is averaged."""
    import json
    import shutil

    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {
        "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128},
        "mixtral": {
            "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "num_local_experts": 4, "max_position_embeddings": 128,
        },
    }  # fmt: skip
    for seed, name in enumerate(("base", "left", "right")):
        torch.manual_seed(seed)
        config = AutoConfig.for_model(kind, vocab_size=211, bos_token_id=1, eos_token_id=2, **sizes[kind])
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / name)
        for file in tiny_llama.glob("tokenizer*"):
            shutil.copy(file, tmp_path / name)
    both = [tmp_path / "left", tmp_path / "right"]
    merge(tmp_path / "base", both, tmp_path / "o", method="regmean", calibration=CALIBRATIONS["left"])
    regressed = json.loads((tmp_path / "o" / "compress.json").read_text())["merge"]["regressed"]
    assert len(regressed) == 8  # gpt2: four matrices a block; mixtral: those of the attention
    made, left, right = (Checkpoint(folder) for folder in (tmp_path / "o", *both))
    for name in made.names():
        mean = (left.tensor(name) + right.tensor(name)) / 2
        assert torch.allclose(made.tensor(name), mean, atol=1e-6) == (name not in regressed)
    grams = [grams_of(folder, CALIBRATIONS["left"], hugging_face) for folder in both]
    for name in regressed:
        site, turned = name.removesuffix(".weight"), kind == "gpt2"
        owns = [m.tensor(name).double().T if turned else m.tensor(name).double() for m in (left, right)]
        shrunk = [0.9 * g[site] + 0.1 * torch.diag(g[site].diagonal()) for g in grams]
        want = (owns[0] @ shrunk[0] + owns[1] @ shrunk[1]) @ torch.linalg.inv(shrunk[0] + shrunk[1])
        assert_close(name, made.tensor(name), want.T if turned else want, 1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_it_is_the_same(
    tiny_llama: Path, tuned_llamas: dict[str, Path], tmp_path: Path, assert_close: Any
) -> None:
    for device in ("cpu", "cuda"):
        merge(tiny_llama, tuned_llamas, tmp_path / device, method="regmean", calibration=CALIBRATIONS, device=device)
    made = {device: Checkpoint(tmp_path / device) for device in ("cpu", "cuda")}
    for name in made["cpu"].names():
        assert_close(name, made["cuda"].tensor(name), made["cpu"].tensor(name), 1e-3)


def test_only_regmean_reads_tokens(tiny_llama: Path, tuned_llamas: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"calibration: ties uses no calibration data; only regmean does"):
        merge(tiny_llama, tuned_llamas, tmp_path / "o", method="ties", calibration=CALIBRATIONS["left"])
    with pytest.raises(RecipeError, match=r"calibration: no model is called 'lft'; did you mean 'left'"):
        merge(tiny_llama, tuned_llamas, tmp_path / "o", method="regmean", calibration={"lft": CALIBRATIONS["left"]})
