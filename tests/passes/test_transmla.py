"""TransMLA: one latent for keys and values, without loss at full rank, and with the least possible loss below it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import Calibration, RecipeError, UnsupportedWeight
from compress.artifact import Artifact
from compress.model.site import Site
from compress.passes.lowrank.svd_llm import SVDLLM
from compress.passes.lowrank.transmla import TransMLA
from compress.passes.whitened import principal
from compress.stats import Gram, Statistics
from compress.weights import Dense, Product

CALIBRATION = Calibration(samples=6, length=32)
ATTENTION = "model.layers.0.self_attn"
INPUTS = 40


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def pair(site_of: Callable[..., Site]) -> Callable[..., list[Site]]:
    """`pair(loud=1, outputs=12)`: a key site and a value site of one input; keys are so many times louder."""

    def make(loud: float = 1, outputs: int = 12) -> list[Site]:
        root_II = normal(INPUTS, INPUTS, seed=3) * normal(INPUTS, seed=4).exp()
        stats = Statistics({Gram: root_II.T @ root_II / INPUTS}, tokens=1000)
        sites = []
        for i, leaf in enumerate(("k_proj", "v_proj")):
            site = site_of(normal(outputs, INPUTS, seed=i) * (1 if i else loud))
            site.name, site.stats = f"{ATTENTION}.{leaf}", stats
            sites.append(site)
        return sites

    return make


def shares_lost(sites: list[Site], made: Any) -> list[float]:
    """Of each site, tr(E G Eᵀ) / tr(W G Wᵀ) in float64."""
    gram_II = sites[0].stats[Gram].double()
    found = []
    for site in sites:
        w_OI = site.original.data.double()
        e_OI = made[site.name].dense().double() - w_OI
        found.append(float(((e_OI @ gram_II) * e_OI).sum() / ((w_OI @ gram_II) * w_OI).sum()))
    return found


# -- the factors -----------------------------------------------------------------------------------


def test_key_and_value_have_one_right_factor(pair: Any) -> None:
    made = TransMLA(kept=0.5).rewrite_peers(pair())
    key, value = made.values()
    assert isinstance(key, Product) and isinstance(key.right, Dense)
    assert key.right is value.right
    assert key.right.shape == (12, INPUTS)
    assert key.left.shape == value.left.shape == (12, 12)


@pytest.mark.parametrize(("outputs", "rank"), [(12, 24), (30, INPUTS)], ids=["grouped heads", "more than inputs"])
def test_nothing_is_lost_at_full_rank(pair: Any, outputs: int, rank: int) -> None:
    """Where key and value have more numbers than the input, the input's are enough."""
    sites = pair(loud=10, outputs=outputs)
    made = TransMLA(kept=1.0).rewrite_peers(sites)
    assert made[sites[0].name].right.shape[0] == rank
    assert max(shares_lost(sites, made)) < 1e-9  # float32 eigenvectors, squared


@pytest.mark.parametrize("kept", [0.75, 0.5, 0.25])
@pytest.mark.parametrize("loud", [1, 30])
def test_what_is_lost_is_the_tail_of_the_balanced_spectrum(pair: Any, kept: float, loud: float) -> None:
    sites = pair(loud=loud)
    made = TransMLA(kept=kept).rewrite_peers(sites)
    gram_II = sites[0].stats[Gram].double()
    balanced = []
    for site in sites:
        w_OI = site.original.data.double()
        balanced.append(w_OI / ((w_OI @ gram_II) * w_OI).sum().sqrt())
    w_OI = torch.cat(balanced)
    energy_O = torch.linalg.eigvalsh(w_OI @ gram_II @ w_OI.T).flip(0)
    want = float(energy_O[int(kept * 24) :].sum() / energy_O.sum())
    assert sum(shares_lost(sites, made)) / 2 == pytest.approx(want, rel=1e-3)
    assert sites[0].ledger == sites[1].ledger
    assert sites[0].ledger["energy_lost"] == pytest.approx(want, rel=1e-3)


def unbalanced(sites: list[Site], rank: int) -> dict[str, Dense]:
    """Both through the first directions of their outputs as they are."""
    w_OI = torch.cat([site.original.data for site in sites])
    basis_OR = principal(w_OI, sites[0].stats[Gram])[1][:, :rank]
    return {s.name: Dense(part) for s, part in zip(sites, (basis_OR @ basis_OR.T @ w_OI).split(12), strict=True)}


@pytest.mark.parametrize("loud", [2, 30])
def test_one_balanced_latent_beats_two_and_one_unbalanced(pair: Any, loud: float) -> None:
    """In the sum of the shares lost it must: two projections are one of the same rank, and so is an unbalanced one."""
    rank, sites = 8, pair(loud=loud)
    ours = sum(shares_lost(sites, TransMLA(kept=rank / 24).rewrite_peers(sites)))
    apart = SVDLLM(removed=1 - rank // 2 * (12 + INPUTS) / (12 * INPUTS)).rewrite_peers(sites)
    assert apart[sites[0].name].right.shape[0] == rank // 2
    assert ours < 0.95 * sum(shares_lost(sites, apart))
    assert ours < (0.99 if loud == 2 else 0.8) * sum(shares_lost(sites, unbalanced(sites, rank)))


def test_loud_keys_do_not_take_all_directions(pair: Any) -> None:
    """How loud they are does not matter at all; without the balance it does."""
    lost = []
    for loud in (1, 100):
        sites = pair(loud=loud)
        found = TransMLA(kept=0.25).rewrite_peers(sites), unbalanced(sites, 6)
        lost.append([shares_lost(sites, made)[1] for made in found])
    assert lost[1][0] == pytest.approx(lost[0][0], rel=1e-3)
    assert lost[1][1] > 1.3 * lost[0][1]


# -- models ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress.run(
        tiny_llama, [TransMLA(kept=1.0)], tmp_path_factory.mktemp("whole") / "out", calibration=CALIBRATION
    ).out


def test_a_model_at_full_rank_computes_what_it_did(
    whole: Path, tiny_llama: Path, ids: Tensor, hugging_face: Any, assert_close: Any
) -> None:
    with torch.inference_mode():
        assert_close("logits", compress.load(whole)(ids).logits, hugging_face(tiny_llama)(ids).logits, 1e-5)


def test_the_shared_factor_is_stored_once_and_only_keys_and_values_change(whole: Path) -> None:
    specs = Artifact(whole).specs
    assert sorted(site.rpartition(".")[2] for site in specs) == ["k_proj"] * 2 + ["v_proj"] * 2
    assert list(specs[f"{ATTENTION}.v_proj"]["shared"]) == ["right.data"]
    assert "shared" not in specs[f"{ATTENTION}.k_proj"]
    index = json.loads((whole / "model.safetensors.index.json").read_text())["weight_map"]
    assert sum("k_proj" in key or "v_proj" in key for key in index) == 2 * 3


@pytest.mark.slow
def test_fewer_numbers_are_farther_from_the_model(tiny_llama: Path, tmp_path: Path) -> None:
    lost = [
        compress.run(tiny_llama, [TransMLA(kept=k)], tmp_path / str(k), calibration=CALIBRATION).kl
        for k in (1.0, 0.75, 0.5, 0.25)
    ]
    assert abs(lost[0]) < 1e-7 < lost[1] < lost[2] < lost[3]  # float32 logits


# -- refusals ----------------------------------------------------------------------------------------


def test_a_key_without_its_value_is_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedWeight) as error:
        compress.run(tiny_llama, [TransMLA(sites="*k_proj")], tmp_path / "out", calibration=CALIBRATION)
    assert str(error.value) == f"transmla needs k_proj and v_proj with the same input; {ATTENTION} has k_proj"


def test_other_projections_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        UnsupportedWeight, match=r"k_proj and v_proj with the same input; .* has q_proj, k_proj, v_proj"
    ):
        compress.run(tiny_llama, [TransMLA(sites="*attn.[qkv]_proj")], tmp_path / "out", calibration=CALIBRATION)


def test_no_number_at_all_is_refused_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"transmla: .*k_proj: kept: 0\.02 of 48 numbers gives a latent of size 0; raise kept"
    ):
        compress.run(tiny_llama, [TransMLA(kept=0.02)], tmp_path / "out", calibration=CALIBRATION)


def test_fused_projections_are_refused_before_any_work(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoTokenizer, Phi3Config, Phi3ForCausalLM

    config = Phi3Config(
        vocab_size=211, hidden_size=48, intermediate_size=72, num_hidden_layers=1, num_attention_heads=4, pad_token_id=3
    )
    Phi3ForCausalLM(config).save_pretrained(tmp_path / "phi3")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "phi3")
    with pytest.raises(
        RecipeError, match=r"transmla\.sites: '\*\.\[kv\]_proj' selects no site; sites have names such as"
    ):
        compress.run(tmp_path / "phi3", [TransMLA()], tmp_path / "out", calibration=CALIBRATION)
