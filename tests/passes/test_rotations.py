"""Rotations: the model's output is unchanged, outliers are spread, and error feedback uses the rotated input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import (
    GPTQ,
    RTN,
    Calibration,
    Dense,
    Diagonal,
    Hadamard,
    Product,
    QuaRot,
    Rotate,
    UnsupportedWeight,
    Wanda,
)
from compress.model.source import Checkpoint
from compress.model.transform import statistics_behind, undone
from compress.passes.quantization.rotate import random_hadamard
from compress.stats import ColumnNorm, Cross, Gram, Statistics
from compress.weights import Permutation, Weight

FEW = Calibration(samples=6, length=32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


TRANSFORMS: dict[str, Weight] = {
    "rotation": Hadamard(normal(24) > 0),
    "permutation": Permutation(normal(24).argsort()),
    "scaling": Diagonal(normal(24).exp()),
}
transforms = pytest.mark.parametrize("transform", TRANSFORMS.values(), ids=TRANSFORMS.keys())


@transforms
def test_a_weight_behind_a_transform_gives_what_it_gave(transform: Weight) -> None:
    w, x = normal(5, 24), normal(7, 24, seed=1)
    torch.testing.assert_close(transform.linear(x) @ undone(w, transform).T, x @ w.T, rtol=1e-4, atol=1e-4)


@transforms
def test_square_statistics_are_those_of_the_transformed_input(transform: Weight) -> None:
    x, dense = normal(90, 24), normal(90, 24, seed=1)
    stats = Statistics({Gram: x.T @ x / 90, Cross: dense.T @ x / 90}, 90)
    y, other = transform.linear(x), transform.linear(dense)
    got = statistics_behind(stats, transform)
    torch.testing.assert_close(got[Gram], y.T @ y / 90, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(got[Cross], other.T @ y / 90, rtol=1e-3, atol=1e-4)


def test_norms_are_kept_where_features_stay_apart() -> None:
    x = normal(90, 24)
    stats = Statistics({ColumnNorm: x.norm(dim=0)}, 90)
    for name in ("permutation", "scaling"):
        got = statistics_behind(stats, TRANSFORMS[name])
        torch.testing.assert_close(got[ColumnNorm], TRANSFORMS[name].linear(x).norm(dim=0))
    assert ColumnNorm not in statistics_behind(stats, TRANSFORMS["rotation"])


def test_a_transform_that_cannot_be_undone_is_refused() -> None:
    with pytest.raises(UnsupportedWeight, match="is not known"):
        undone(normal(5, 24), Dense(normal(24, 24)))


def test_a_rotated_weight_is_the_weight(site_of: Callable[..., Any], assert_close: Any) -> None:
    site = site_of(normal(5, 48))
    weight = Rotate().rewrite(site)
    assert isinstance(weight, Product)
    assert_close("rotated", weight.dense(), normal(5, 48), 1e-5)
    assert torch.equal(weight.right.positive, random_hadamard(48, 0).positive)  # type: ignore[attr-defined]


def test_gptq_behind_a_rotation_is_gptq_of_the_rotated_problem(site_of: Callable[..., Any]) -> None:
    w, x, turn = normal(9, 64), normal(400, 64, seed=1) * normal(64, seed=2).exp(), random_hadamard(64, 0)
    site = site_of(w, x)
    site.weight = Rotate().rewrite(site)
    got = GPTQ(bits=3, group=16).rewrite(site)
    turned = site_of(turn.linear(w), turn.linear(x))
    want = GPTQ(bits=3, group=16).rewrite(turned)
    agree = (got.left.codes == want.codes).float().mean()  # type: ignore[attr-defined]
    assert float(agree) > 0.99  # both Grams are rounded


def test_a_rotation_spreads_an_outlier(site_of: Callable[..., Any]) -> None:
    w = normal(64, 256)
    w[:, 3] *= 40
    plain, turned = RTN(bits=3, group=0).rewrite(site_of(w)), site_of(w)
    turned.weight = Rotate().rewrite(turned)
    turned.weight = RTN(bits=3, group=0).rewrite(turned)
    assert float((turned.weight.dense() - w).norm()) < 0.5 * float((plain.dense() - w).norm())


def test_a_pruner_does_not_take_a_rotated_weight(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(compress.RecipeError, match=r"passes\[1\]\.wanda: takes a dense weight; .* is rotated by then"):
        compress.run(tiny_llama, [Rotate(), Wanda()], tmp_path / "out", calibration=FEW)


@pytest.mark.slow
def test_rotate_and_gptq_run_load_and_agree(tiny_llama: Path, tmp_path: Path, ids: Tensor) -> None:
    report = compress.run(tiny_llama, [Rotate(), GPTQ(bits=4, group=8)], tmp_path / "out", calibration=FEW)
    model = compress.load(report.out)
    low = compress.load(report.out, low_memory=True)
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, low(ids).logits, rtol=1e-3, atol=1e-3)
    assert report.bits_per_weight < 7.2  # 4 + 16/8 + 4/8, and a bit an input of few outputs


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "llama_tied", "mistral", "qwen2", "qwen3"])
def test_a_rotated_model_computes_the_same_in_stock_transformers(
    kind: str, model_folder: Any, tmp_path: Path, hugging_face: Any, ids: Tensor
) -> None:
    folder = model_folder(kind)
    report = compress.run(folder, [QuaRot()], tmp_path / "out", calibration=FEW)
    with torch.no_grad():
        want, got = hugging_face(folder)(ids).logits, hugging_face(report.out)(ids).logits
    torch.testing.assert_close(got, want, rtol=1e-3, atol=1e-3)
    one, other = Checkpoint(folder), Checkpoint(report.out)
    for name in ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj"):
        key = f"model.layers.0.{name}.weight"
        assert not torch.allclose(one.tensor(key), other.tensor(key), atol=1e-2)


def test_families_with_other_norms_are_refused(model_folder: Any, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedWeight, match="quarot: gemma is not supported; allowed: llama"):
        compress.run(model_folder("gemma"), [QuaRot(), RTN(group=8)], tmp_path / "out", calibration=FEW)
