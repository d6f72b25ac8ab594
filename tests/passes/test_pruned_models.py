"""Every way to prune, on whole models: grouped queries, mixtures of experts, too few tokens, inputs that never fire."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import (
    ALPS,
    GPTQ,
    OWL,
    RIA,
    RTN,
    Calibration,
    DSnoT,
    Global,
    Limits,
    Magnitude,
    Masked,
    Pass,
    PassManager,
    Recipe,
    Reconstruct,
    Sensitivity,
    SparseGPT,
    Swaps,
    Wanda,
    Weight,
)
from compress.artifact import Artifact, verify

METHODS: dict[str, tuple[Pass, ...]] = {
    "magnitude": (Magnitude(sparsity="2:4"),),
    "wanda": (Wanda(sparsity="2:4"),),
    "ria": (RIA(sparsity="2:4"),),
    "ria-permuted": (RIA(sparsity="2:4", permute=True),),
    "sparsegpt": (SparseGPT(sparsity="2:4"),),
    "sparsegpt-int4": (SparseGPT(sparsity="2:4", bits=4, group=8),),
    "alps": (ALPS(sparsity="2:4"),),
    "dsnot": (Wanda(sparsity="2:4"), DSnoT()),
    "swaps": (Wanda(sparsity="2:4"), Swaps()),
    "reconstruct": (Wanda(sparsity="2:4"), Reconstruct()),
    "owl": (OWL(), Wanda(sparsity=0.5)),
    "global": (Global(), Magnitude(sparsity=0.5)),
    "sensitivity": (Sensitivity(), SparseGPT(sparsity=0.5)),
}
PRUNERS = ("magnitude", "wanda", "ria", "sparsegpt", "alps", "dsnot", "swaps", "reconstruct")
COMPENSATED = ("sparsegpt", "alps", "reconstruct")
every = pytest.mark.parametrize("name", METHODS)
SHORT = Calibration(samples=6, length=32)


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Path:
    """A tiny Mixtral, four experts in each of two blocks, with grouped queries and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.for_model(
        "mixtral", vocab_size=211, hidden_size=48, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("mixtral")
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(folder)
    return folder


@pytest.mark.slow
@every
def test_a_model_with_grouped_queries_is_pruned_saved_and_verified(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    report = compress.run(tiny_llama, Recipe(passes=METHODS[name], calibration=SHORT), tmp_path / "out")
    verify(report.out)
    sites = Artifact(report.out).provenance["sites"]
    sizes = {s: r["mask"]["kept"] for s, r in sites.items()}
    shapes = {s: Artifact(report.out).expression(s).shape for s in sites}
    total = sum(h * w for h, w in shapes.values())
    assert sum(sizes[s] * h * w for s, (h, w) in shapes.items()) / total == pytest.approx(0.5, abs=5e-3)
    assert report.fallbacks == 0


@pytest.mark.slow
@every
def test_experts_that_few_tokens_reach_are_named_and_not_destroyed(name: str, mixture: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=METHODS[name], calibration=SHORT, limits=Limits(max_starved=1.0))
    report = compress.run(mixture, recipe, tmp_path / "out")
    sites = Artifact(report.out).provenance["sites"]
    starved = {site: row for site, row in sites.items() if row["starved"]}
    needy = [step for step in METHODS[name] if isinstance(step, compress.WeightPass) and step.requires]
    assert bool(starved) == bool(needy)
    assert all(".experts." in site for site in starved)
    assert all(0.2 < row["mask"]["kept"] < 0.9 for row in sites.values())


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPENSATED)
def test_a_gram_of_too_few_tokens_is_damped_and_recorded(name: str, tiny_llama: Path, tmp_path: Path) -> None:
    few = Calibration(samples=1, length=8)  # 8 tokens for inputs of 48 and 72
    report = compress.run(tiny_llama, Recipe(passes=METHODS[name], calibration=few), tmp_path / "out")
    sites = Artifact(report.out).provenance["sites"]
    assert {row["damping"] for row in sites.values()} == {0.01}
    assert report.kl < 10


@pytest.mark.parametrize("name", ["wanda", "sparsegpt"])
def test_an_input_that_never_fires_is_cut_first(name: str, tiny_llama: Path, hugging_face: Any, ids: Tensor) -> None:
    model = hugging_face(tiny_llama)
    with torch.no_grad():
        model.model.layers[0].input_layernorm.weight[5] = 0
    found = PassManager(METHODS[name]).apply(model, ids)
    query = found["model.layers.0.self_attn.q_proj"]
    assert isinstance(query, Masked)
    assert int(query.mask_OI[:, 5].sum()) == 0
    assert query.mask_OI.view(query.shape[0], -1, 4).sum(2).unique().tolist() == [2]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "later"),
    [
        *((name, GPTQ(group=8, target="original")) for name in PRUNERS),
        ("wanda", GPTQ(group=8)),
        ("wanda", RTN(group=8)),
    ],
    ids=str,
)
def test_a_later_quantizer_keeps_the_mask(
    name: str, later: Pass, tiny_llama: Path, hugging_face: Any, ids: Tensor
) -> None:
    def first(steps: tuple[Pass, ...]) -> Weight:
        return PassManager(steps).apply(hugging_face(tiny_llama), ids)["model.layers.0.self_attn.q_proj"]

    pruned, rounded = first(METHODS[name]), first((*METHODS[name], later))
    assert isinstance(pruned, Masked)
    assert isinstance(rounded, Masked)
    assert torch.equal(pruned.mask_OI, rounded.mask_OI)
    assert int(rounded.dense()[~pruned.mask_OI].count_nonzero()) == 0


@pytest.mark.slow
def test_permuted_inputs_are_quantized_in_their_order(tiny_llama: Path, hugging_face: Any, ids: Tensor) -> None:
    """Rounding that feeds errors back knows the Gram, so the wrong order would show in the output error."""

    def first(*steps: Pass) -> Weight:
        return PassManager(steps).apply(hugging_face(tiny_llama), ids)["model.layers.0.self_attn.q_proj"]

    step = RIA(sparsity="2:4", permute=True)
    pruned, rounded, fed = first(step), first(step, RTN(bits=3, group=8)), first(step, GPTQ(bits=3, group=8))
    assert rounded.describe() == "2:4·int3g8@perm"
    assert int(fed.dense()[pruned.dense() == 0].count_nonzero()) == 0
    model = hugging_face(tiny_llama).requires_grad_(False).model
    x_TI = model.layers[0].input_layernorm(model.embed_tokens(ids)).flatten(0, 1)
    losses = [float((x_TI @ (w.dense() - pruned.dense()).T).norm()) for w in (fed, rounded)]
    assert losses[0] < losses[1]


@pytest.mark.parametrize("options", [{"sparsity": "2:4"}, {"sparsity": "1:4"}, {"sparsity": 0.5}], ids=str)
def test_reconstruction_keeps_the_mask(
    options: dict[str, Any], tiny_llama: Path, hugging_face: Any, ids: Tensor
) -> None:
    def first(*steps: Pass) -> Weight:
        return PassManager(steps).apply(hugging_face(tiny_llama), ids)["model.layers.0.self_attn.q_proj"]

    before, after = first(Wanda(**options)), first(Wanda(**options), Reconstruct())
    assert isinstance(before, Masked)
    assert isinstance(after, Masked)
    assert torch.equal(before.mask_OI, after.mask_OI)
    assert not torch.equal(before.dense(), after.dense())


@pytest.mark.slow
def test_damage_is_ordered_as_the_theory_says(tiny_llama: Path, tmp_path: Path) -> None:
    """Random weights know no outliers, but compensation and least squares still lower the divergence."""
    many = Calibration(samples=32, length=64)
    kl = [
        compress.run(tiny_llama, Recipe(passes=METHODS[n], calibration=many), tmp_path / n).kl
        for n in ("reconstruct", "wanda", "magnitude")
    ]
    assert kl == sorted(kl)
