"""Realign: the target becomes what the dense model computes, and every later pass approximates it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import (
    GPTQ,
    Calibration,
    Dense,
    Limits,
    Magnitude,
    PassManager,
    Quantized,
    Realign,
    Recipe,
    Reconstruct,
    Site,
    Wanda,
    WeightPass,
)
from compress.artifact import Artifact, verify
from compress.passes.hessian import inverse_factor
from compress.stats import Cross, Gram, Statistics

SiteMaker = Callable[..., Any]
SHORT = Calibration(samples=6, length=32)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def drifted(width: int = 24) -> tuple[Tensor, Tensor]:
    """The same tokens in the dense model and behind compressed layers: correlated, and moved."""
    x = normal(400, width, seed=1) @ (torch.eye(width) + 0.3 * normal(width, width, seed=2))
    return x, x + 0.4 * normal(400, width, seed=3) @ normal(width, width, seed=4) / width**0.5


# -- one matrix ------------------------------------------------------------------------------------


def test_the_target_is_the_damped_least_squares_solution(site_of: SiteMaker, assert_close: Any) -> None:
    w, (x, now) = normal(7, 24), drifted()
    site = site_of(w, now, dense_TI=x)
    got = Realign(damping=0.05).rewrite(site)
    strength = (0.05 * now.double().square().sum(0).mean()).sqrt() * torch.eye(24).double()
    left = torch.cat((now.double(), strength))
    right = torch.cat((x.double() @ w.double().T, strength @ w.double().T))
    assert_close("target", got.dense(), torch.linalg.lstsq(left, right).solution.T, 1e-4)
    assert site.target is got


def test_the_realigned_output_is_nearer_to_the_dense_one(site_of: SiteMaker) -> None:
    w, (x, now) = normal(7, 24), drifted()
    moved = Realign().rewrite(site_of(w, now, dense_TI=x)).dense()
    assert float((now @ moved.T - x @ w.T).norm()) < 0.9 * float((now @ w.T - x @ w.T).norm())


def test_an_input_that_did_not_drift_moves_nothing(site_of: SiteMaker, assert_close: Any) -> None:
    w, (x, _) = normal(7, 24), drifted()
    site = site_of(w, x, dense_TI=x)
    assert_close("weight", Realign().rewrite(site).dense(), w, 1e-5)
    assert site.ledger["realigned"] < 1e-5


def test_an_input_that_never_fires_keeps_its_weights(site_of: SiteMaker) -> None:
    w, (x, now) = normal(7, 24), drifted()
    x[:, 5], now[:, 5] = 0, 0
    assert torch.equal(Realign().rewrite(site_of(w, now, dense_TI=x)).dense()[:, 5], w[:, 5])


@pytest.mark.parametrize("alpha", [0.25, 1.0])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_realigned_gptq_comes_nearer_to_the_dense_output_than_gptaq(
    bits: int, alpha: float, site_of: SiteMaker, naive: ModuleType
) -> None:
    """GPTAQ corrects for the drift while it rounds; least squares before rounding has the same objective."""
    w, (x, now) = normal(32, 24), drifted()
    gram, shift = now.T @ now / len(now), (x - now).T @ now / len(now)
    step = GPTQ(bits=bits, group=0)
    found = inverse_factor(gram, step.damping)
    assert found is not None
    grid = step.grid.quantize(w)
    assert isinstance(grid, Quantized)
    assert grid.zero is not None
    corrected = naive.gptaq(w, found[0], shift, grid.scale[:, 0], grid.zero[:, 0], bits, alpha)
    site = site_of(w, now, dense_TI=x)
    site.weight = Realign().rewrite(site)
    realigned = step.rewrite(site).dense()

    def missed(matrix: Tensor) -> float:
        return float((now.double() @ matrix.double().T - x.double() @ w.double().T).square().sum())

    plain = GPTQ(bits=bits, group=0).rewrite(site_of(w, now)).dense()
    assert missed(realigned) < 0.95 * missed(corrected)
    assert missed(realigned) < 0.95 * missed(plain)


def test_refinements_aim_at_the_moved_target(site_of: SiteMaker, assert_close: Any) -> None:
    """With every weight kept, least squares towards the target is the target itself."""
    w, (x, now) = normal(7, 24), drifted()
    site = site_of(w, now, dense_TI=x)
    site.weight = Realign().rewrite(site)
    site.weight = Wanda(sparsity=0.0).rewrite(site)
    assert_close("rebuilt", Reconstruct().rewrite(site).dense(), site.target.dense(), 1e-5)
    assert float((site.target.dense() - w).norm()) > 0.1


def test_rounding_of_what_a_mask_cut_aims_at_the_moved_target(site_of: SiteMaker) -> None:
    w, (x, now) = normal(7, 24), drifted()
    losses = []
    for first in (Realign(), Realign(damping=1.0)):
        site = site_of(w, now, dense_TI=x)
        for step in (first, Wanda(sparsity="2:4"), GPTQ(group=8, target="original")):
            site.weight = step.rewrite(site)
        losses.append(float((now @ site.weight.dense().T - x @ w.T).norm()))
    assert losses[0] < losses[1]


def test_a_pruned_weight_is_not_realigned(site_of: SiteMaker) -> None:
    site = site_of(normal(7, 24), drifted()[1])
    site.weight = Magnitude().rewrite(site)
    with pytest.raises(compress.UnsupportedWeight, match=r"realign needs a dense weight; blocks\.0\.proj is already"):
        Realign().rewrite(site)


# -- whole models ----------------------------------------------------------------------------------


class Seen(WeightPass):
    """Asks for both statistics and changes nothing."""

    requires = (Gram, Cross)

    def rewrite(self, site: Site) -> compress.Weight:
        return site.weight


def inputs_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Every linear map's input [tokens, in], by hooks on the whole model."""
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, args[0].flatten(0, 1))

    linear = [(n, m) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    hooks = [m.register_forward_pre_hook(listen(n)) for n, m in linear]
    with torch.no_grad():
        model(input_ids=ids, use_cache=False)
    [hook.remove() for hook in hooks]
    return seen


@pytest.mark.parametrize("ordering", ["site", "block"])
def test_pairs_are_of_the_dense_and_the_compressed_model(
    ordering: str, tiny_llama: Path, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    found: dict[str, Statistics] = {}

    class Recording(PassManager):
        def rewrite(self, index: int, step: WeightPass, sites: Sequence[Site]) -> None:
            found.update((site.name, Statistics(dict(site.stats.values), site.stats.tokens)) for site in sites)
            super().rewrite(index, step, sites)

    model = hugging_face(tiny_llama)
    dense = inputs_of(model, ids)
    Recording([Magnitude(sparsity=0.7, sites="*.layers.0.mlp.*"), Seen()], ordering=ordering).apply(model, ids)
    now = inputs_of(model, ids)
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        want = dense[name].T @ now[name] / ids.numel()
        assert_close(name, found[name][Cross], want, 1e-4)
        assert_close(name, found[name][Gram], now[name].T @ now[name] / ids.numel(), 1e-4)


@pytest.mark.slow
def test_a_realigned_model_drifts_less(tiny_llama: Path, tmp_path: Path) -> None:
    long = Calibration(samples=48, length=64)
    plain, aligned = (
        compress.run(tiny_llama, Recipe(passes=steps, calibration=long), tmp_path / str(len(steps))).kl
        for steps in ((Wanda(sparsity="2:4"),), (Realign(), Wanda(sparsity="2:4")))
    )
    assert aligned < plain


@pytest.mark.slow
def test_the_file_holds_what_was_computed_with(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(Realign(), Wanda(sparsity="2:4"), GPTQ(group=8)), calibration=SHORT)
    verify(compress.run(tiny_llama, recipe, tmp_path / "out").out)
    sites = Artifact(tmp_path / "out").provenance["sites"]
    assert sites["model.layers.0.self_attn.q_proj"]["realigned"] < 1e-5
    assert sites["model.layers.1.mlp.down_proj"]["realigned"] > 1e-3


@pytest.mark.slow
def test_hidden_states_on_disk_change_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(Realign(), Wanda(sparsity="2:4")), calibration=SHORT)
    memory, disk = (compress.run(tiny_llama, recipe, tmp_path / str(o), offload=o).kl for o in (False, True))
    assert memory == disk


@pytest.mark.slow
def test_an_expert_is_left_where_it_was(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.for_model(
        "mixtral", vocab_size=211, hidden_size=48, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_local_experts=2, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    recipe = Recipe(
        passes=(Realign(), Wanda(sparsity="2:4")),
        calibration=Calibration(samples=12, length=32),
        limits=Limits(max_starved=1.0),
    )
    compress.run(tmp_path / "model", recipe, tmp_path / "out")
    sites = Artifact(tmp_path / "out").provenance["sites"]
    assert {".experts." in name for name, row in sites.items() if "realigned" not in row} == {True}
    assert {".experts." in name for name, row in sites.items() if "realigned" in row} == {False}


def test_a_shifted_target_leaves_the_original_alone(site_of: SiteMaker) -> None:
    w, (x, now) = normal(7, 24), drifted()
    site = site_of(w, now, dense_TI=x)
    site.weight = Realign().rewrite(site)
    assert torch.equal(site.original.data, w)
    assert isinstance(site.target, Dense)
