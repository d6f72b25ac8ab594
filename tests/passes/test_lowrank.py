"""Low rank: identities of the truncated decomposition, rank budgets, and factors that several sites share."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given as drawn
from hypothesis import settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

import compress
from compress import Calibration, Dense, Product, Recipe, RecipeError
from compress.artifact import Artifact, keys, verify
from compress.model.site import Site
from compress.passes import ASVD, GPTQ, RTN, SVD, SVDLLM, Factorizer, FineTune, Ranks, Realign, Sensitivity, WeLore
from compress.passes.factorizer import joined
from compress.passes.ranks import Part, above, budget_of, cheapest, given, parameters
from compress.passes.whitened import principal, rank_within
from compress.stats import Gram

SiteMaker = Callable[..., Site]
FEW = Calibration(samples=6, length=32)
METHODS = (SVD(removed=0.4), ASVD(removed=0.4), SVDLLM(removed=0.4))
every_method = pytest.mark.parametrize("step", METHODS, ids=lambda step: step.name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int, width: int) -> Tensor:
    """Correlated tokens with features of different loudness."""
    x = normal(count, width, seed=1) @ (torch.eye(width) + normal(width, width, seed=2) / width**0.5)
    return x * (0.7 * normal(width, seed=3)).exp()


def gram_of(x_TI: Tensor) -> Tensor:
    return x_TI.T @ x_TI / len(x_TI)


# -- one matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rows", "columns"), [(64, 128), (128, 64)])
def test_a_huge_activation_does_not_drown_the_other_directions(rows: int, columns: int) -> None:
    """Two tokens 5,000 times as loud as the others, as first ones may be; in float32 up to a quarter more was lost."""
    x, w = tokens(1024, columns), normal(rows, columns)
    x[::512] = 5e3 * normal(1, columns, seed=9)
    basis = principal(w, gram_of(x))[1].double()
    root = x.double().T / len(x) ** 0.5
    energies = torch.linalg.svdvals(w.double() @ root).square()
    for rank in (8, 16, 32):
        left = basis[:, :rank]
        lost = float(((w.double() - left @ (left.T @ w.double())) @ root).square().sum())
        assert lost == pytest.approx(float(energies[rank:].sum()), rel=1e-2)  # the Gram itself is float32


@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (64, 40), (48, 48)])
def test_what_is_lost_is_the_energy_left_out(rows: int, columns: int, site_of: SiteMaker, naive: ModuleType) -> None:
    x = tokens(300, columns)
    site = site_of(normal(rows, columns), x)
    lost = naive.energy(SVDLLM(removed=0.4).rewrite(site).dense() - site.original.data, gram_of(x))
    root = torch.linalg.cholesky(gram_of(x).double())
    energies = torch.linalg.svdvals(site.original.data.double() @ root).square()
    rank = site.ledger["rank"]
    assert lost == pytest.approx(float(energies[rank:].sum()), rel=1e-3)
    assert site.ledger["energy_lost"] == pytest.approx(float(energies[rank:].sum() / energies.sum()), rel=1e-3)


@pytest.mark.parametrize(("rows", "columns"), [(40, 64), (64, 40)])
def test_any_root_of_the_gram_gives_the_same_matrix(
    rows: int, columns: int, site_of: SiteMaker, naive: ModuleType
) -> None:
    x = tokens(300, columns)
    site = site_of(normal(rows, columns), x)
    got = SVDLLM(removed=0.4).rewrite(site).dense().double()
    values, vectors = torch.linalg.eigh(gram_of(x).double())
    for root in (torch.linalg.cholesky(gram_of(x).double()), vectors * values.sqrt()):
        want = naive.svd_llm(site.original.data.double(), root, site.ledger["rank"])
        assert naive.relative_mse(want, got) < 1e-6


@pytest.mark.parametrize(("rows", "columns"), [(200, 256), (300, 256)])
def test_inputs_with_a_common_mean_need_not_be_many(
    rows: int, columns: int, site_of: SiteMaker, naive: ModuleType
) -> None:
    mean = 3 * normal(columns, seed=4)
    x = tokens(columns // 2, columns) + mean  # a Gram that is singular, and in float32 indefinite
    site = site_of(normal(rows, columns), x)
    lost = naive.energy(SVDLLM(removed=0.6).rewrite(site).dense() - site.original.data, gram_of(x))
    energies = torch.linalg.svdvals(site.original.data.double() @ x.double().T / len(x) ** 0.5).square()
    assert lost == pytest.approx(float(energies[site.ledger["rank"] :].sum()), rel=1e-3)


def test_the_golden_losses_of_a_falling_spectrum(naive: ModuleType) -> None:
    """lowrank_quant_delta.md section 0.1: plain .2396, asvd .0646 (alpha .5) and .0580 (1), svd-llm .01020."""
    w, x = naive.golden_spectrum()
    gram = 2 * x.T @ x / len(x)
    loud = x.abs().mean(0)
    losses = []
    for metric in (None, loud, loud.square(), gram):
        basis = principal(w, metric)[1][:, :64]
        losses.append(naive.proxy_loss(w, basis @ (basis.T @ w), gram))
    assert losses == pytest.approx([0.2396, 0.0646, 0.0580, 0.01020], rel=2e-3)


def test_svd_is_the_nearest_matrix_of_its_rank(site_of: SiteMaker) -> None:
    site = site_of(normal(40, 64))
    got = SVD(removed=0.4).rewrite(site).dense()
    values = torch.linalg.svdvals(site.original.data)
    assert float((got - site.original.data).square().sum()) == pytest.approx(
        float(values[site.ledger["rank"] :].square().sum()), rel=1e-3
    )


def test_better_metrics_lose_less_output(site_of: SiteMaker, naive: ModuleType) -> None:
    x = tokens(400, 64)
    site = site_of(normal(48, 64), x)
    svd, asvd, whitened = (naive.proxy_loss(site.original.data, s.rewrite(site).dense(), gram_of(x)) for s in METHODS)
    assert whitened < asvd < svd


@every_method
@drawn(removed=st.floats(0.01, 0.9), rows=st.integers(24, 60), columns=st.integers(24, 60))
@settings(max_examples=25, deadline=None)
def test_factors_stay_within_the_budget(step: Factorizer, removed: float, rows: int, columns: int) -> None:
    rank = rank_within(1 - removed, (rows, columns))
    assert rank * (rows + columns) <= (1 - removed) * rows * columns + 1e-6
    assert (rank + 1) * (rows + columns) > (1 - removed) * rows * columns
    if rank:
        replace(step, removed=removed).check("proj", (rows, columns))


@every_method
def test_the_left_factor_is_orthonormal(step: Factorizer, site_of: SiteMaker) -> None:
    product = step.rewrite(site_of(normal(40, 64), tokens(300, 64)))
    assert isinstance(product, Product)
    left = product.left.dense()
    torch.testing.assert_close(left.T @ left, torch.eye(left.shape[1]), rtol=0, atol=1e-4)


def test_nothing_removed_leaves_the_matrix(site_of: SiteMaker) -> None:
    site = site_of(normal(40, 64), tokens(300, 64))
    assert torch.equal(SVDLLM(removed=0).rewrite(site).dense(), site.original.data)
    assert site.ledger["rank"] == "dense"


def test_a_share_that_buys_no_rank_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"svd: proj: 0\.05 of 8x8 leaves no room for rank 1; lower removed"):
        SVD(removed=0.95).check("proj", (8, 8))


@pytest.mark.parametrize("removed", [1.0, -0.1])
def test_shares_out_of_range_are_refused(removed: float) -> None:
    with pytest.raises(RecipeError, match=r"svd-llm\.removed"):
        SVDLLM(removed=removed)


def test_an_input_that_never_fires_is_no_trouble(site_of: SiteMaker) -> None:
    x = tokens(300, 40)
    x[:, 3] = 0
    for step in METHODS:
        assert step.rewrite(site_of(normal(64, 40), x)).dense().isfinite().all()


# -- factors that are rounded ----------------------------------------------------------------------


def test_error_feedback_in_both_factors_beats_rounding_them(site_of: SiteMaker, naive: ModuleType) -> None:
    x = tokens(600, 64)
    losses = []
    for step in (RTN(bits=3, group=0, factors=True), GPTQ(bits=3, group=0, factors=True)):
        site = site_of(normal(48, 64), x)
        site.weight = SVDLLM(removed=0.3).rewrite(site)
        rounded = step.rewrite(site)
        losses.append(naive.proxy_loss(site.weight.dense(), rounded.dense(), gram_of(x)))
    assert losses[1] < 0.8 * losses[0]


def test_the_left_factor_answers_the_rounded_right_one(site_of: SiteMaker, naive: ModuleType) -> None:
    x = tokens(600, 64)
    site = site_of(normal(48, 64), x)
    made = SVDLLM(removed=0.3).rewrite(site)
    site.weight = made
    rounded = GPTQ(bits=2, group=0, factors=True).rewrite(site)
    assert isinstance(made, Product) and isinstance(rounded, Product)
    right = rounded.right.dense()
    gram = gram_of(x)
    unfitted = Product(GPTQ(bits=2, group=0).rewrite(site.factors(made.left.dense(), right)[0]), rounded.right)
    lost = [naive.proxy_loss(made.dense(), each.dense(), gram) for each in (rounded, unfitted)]
    assert lost[0] < 0.9 * lost[1]


def test_matrices_in_one_product_need_one_rank_together() -> None:
    shared, alone = SVD(removed=0.96, shared=True), SVD(removed=0.96)
    shared.check("k_proj", (16, 64))
    with pytest.raises(RecipeError, match=r"k_proj: 0\.04 of 16x64 leaves no room for rank 1"):
        alone.check("k_proj", (16, 64))
    assert shared.room("q_proj", (96, 64)) == 1
    with pytest.raises(RecipeError, match="leaves no room"):
        SVD(removed=0.99, shared=True).room("q_proj", (96, 64))


def test_the_input_of_the_left_factor_is_what_the_right_one_puts_out(site_of: SiteMaker) -> None:
    x = tokens(300, 64)
    site = site_of(normal(48, 64), x)
    left, right = normal(48, 5), normal(5, 64)
    outer, inner = site.factors(left, right)
    torch.testing.assert_close(outer.stats[Gram], gram_of(x @ right.T), rtol=1e-4, atol=1e-3)
    assert inner.stats is site.stats
    assert (outer.shape, inner.shape) == ((48, 5), (5, 64))


def test_factors_are_refused_unless_told(tiny_llama: Path, tmp_path: Path) -> None:
    steps = (SVDLLM(removed=0.4), RTN(group=8))
    with pytest.raises(
        RecipeError, match=r"passes\[1\]\.rtn: takes a .* weight; .* is factored by then; set factors: true"
    ):
        compress.run(tiny_llama, Recipe(passes=steps, calibration=FEW), tmp_path / "out")


# -- one right factor for several sites ------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact in which q, k, v and gate, up share right factors."""
    out = tmp_path_factory.mktemp("shared") / "out"
    recipe = Recipe(passes=(SVDLLM(removed=0.4, shared=True),), calibration=FEW)
    return compress.run(tiny_llama, recipe, out).out


def test_peers_share_one_right_factor(site_of: SiteMaker, naive: ModuleType) -> None:
    x = tokens(400, 48)
    sites = [site_of(scale * normal(rows, 48, seed=rows), x) for rows, scale in ((32, 1.0), (16, 50.0))]
    for i, site in enumerate(sites):
        site.name = f"proj{i}"
        site.stats = sites[0].stats
    made = SVDLLM(removed=0.4, shared=True).rewrite_peers(sites)
    assert made["proj0"].right is made["proj1"].right  # type: ignore[attr-defined]
    rank = made["proj0"].right.shape[0]  # type: ignore[attr-defined]
    assert rank * (48 + 48) <= 0.6 * 48 * 48
    units = [naive.energy(site.original.data, gram_of(x)) ** 0.5 for site in sites]
    stacked = torch.cat([site.original.data / unit for site, unit in zip(sites, units, strict=True)]).double()
    want = naive.svd_llm(stacked, torch.linalg.cholesky(gram_of(x).double()), rank)
    got = torch.cat([made[site.name].dense() / unit for site, unit in zip(sites, units, strict=True)])
    assert naive.relative_mse(want, got) < 1e-6


def test_loud_inputs_do_not_make_a_shared_factor_vanish_in_float16(site_of: SiteMaker, naive: ModuleType) -> None:
    x = 1e4 * tokens(300, 64)
    sites = [site_of(normal(64, 64, seed=i).half(), x) for i in range(2)]
    for i, site in enumerate(sites):
        site.name = f"proj{i}"
    made = joined(sites, [Dense(site.original.data) for site in sites], sites[0].stats[Gram], 64)
    for site in sites:  # of full rank: only the rounding of the factors is lost, a part in 2000 of each
        assert naive.relative_mse(site.original.data.double(), made[site.name].dense().double()) < 2000**-2


def test_a_shared_factor_is_stored_once(shared: Path) -> None:
    artifact = Artifact(shared)
    first = "model.layers.0.self_attn."
    names = {site: keys(site, artifact.specs[site])["right.data"] for site in artifact.specs if first in site}
    assert len({names[f"{first}{leaf}_proj"] for leaf in "qkv"}) == 1
    assert names[f"{first}o_proj"] != names[f"{first}q_proj"]
    held = [name for file in set(artifact.files.values()) for name in list(safe_open(file, framework="pt").keys())]
    assert sum(name.startswith(first) and name.endswith("right_data") for name in held) == 2
    verify(shared)


def test_the_bytes_of_a_shared_factor_count_once(shared: Path) -> None:
    artifact = Artifact(shared)
    stored = {key for site, spec in artifact.specs.items() for key in keys(site, spec).values()}
    total = sum(site["bytes"] for site in artifact.provenance["sites"].values())
    assert total == sum(artifact.stored_tensor(key).nbytes for key in stored)


def test_a_shared_factor_is_one_tensor_in_memory_and_saved_once(shared: Path, ids: Tensor, tmp_path: Path) -> None:
    model = compress.load(shared)
    layer = model.model.layers[0].self_attn
    pointers = {getattr(layer, f"{leaf}_proj").stored_right_data.data_ptr() for leaf in "qkv"}
    assert len(pointers) == 1
    model.save_pretrained(tmp_path / "again")
    again = compress.load(tmp_path / "again")
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_rounded_shared_factors_are_still_stored_once(tiny_llama: Path, tmp_path: Path) -> None:
    steps = (SVDLLM(removed=0.2, shared=True), GPTQ(group=0, factors=True))
    report = compress.run(tiny_llama, Recipe(passes=steps, calibration=FEW), tmp_path / "out")
    specs = Artifact(report.out).specs
    assert specs["model.layers.0.self_attn.k_proj"]["shared"].keys() == {"right.codes"}  # a scale this small is not


def test_a_key_that_another_site_lacks_is_refused(shared: Path, tmp_path: Path) -> None:
    config = json.loads((shared / "config.json").read_text())
    spec = config["quantization_config"]["weights"]["model.layers.0.self_attn.v_proj"]
    spec["shared"] = {"right.data": "model.layers.0.nothing"}
    for file in shared.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(compress.CompressError, match="nothing"):
        compress.load(tmp_path)


# -- budgets of ranks ------------------------------------------------------------------------------


def part(index: int, shape: tuple[int, int], falling: Any) -> Part:
    return Part(sites=(f"site{index}",), shape=shape, falling=torch.tensor(sorted(falling, reverse=True)).double())


energies = st.lists(st.floats(0.01, 10), min_size=6, max_size=6)


@drawn(found=st.lists(energies, min_size=2, max_size=3), share=st.floats(0.35, 0.95))
@settings(max_examples=40, deadline=None)
def test_greedy_ranks_are_the_best_but_for_the_last_direction(
    found: list[list[float]], share: float, naive: ModuleType
) -> None:
    """Never better than the best of all choices, and no worse than the best of a budget one direction smaller."""
    shapes = [(6, 18), (12, 6), (6, 9)][: len(found)]
    parts = [part(i, shape, energy) for i, (shape, energy) in enumerate(zip(shapes, found, strict=True))]
    budget = int(share * sum(p.size for p in parts))
    ranks = cheapest(parts, budget)
    lost = sum(float(p.falling[rank:].sum()) for p, rank in zip(parts, ranks, strict=True) if rank is not None)
    falling = [p.falling.tolist() for p in parts]
    assert parameters(parts, ranks) <= max(budget, sum(p.step for p in parts))
    if parameters(parts, ranks) <= budget:
        assert lost >= naive.best_ranks(falling, shapes, budget) - 1e-9
    if None not in ranks and budget - max(p.step for p in parts) >= sum(p.step for p in parts):
        smaller = budget - max(p.step for p in parts)
        assert lost <= best_factored(falling, shapes, smaller) + 1e-9


def best_factored(falling: list[list[float]], shapes: list[tuple[int, int]], budget: int) -> float:
    """The least energy lost by ranks alone, by dynamic programming over parameters."""
    best = {0: 0.0}
    for energy, (m, n) in zip(falling, shapes, strict=True):
        now: dict[int, float] = {}
        for used, lost in best.items():
            for rank in range(1, len(energy) + 1):
                size = used + rank * (m + n)
                if size <= budget:
                    now[size] = min(now.get(size, float("inf")), lost + sum(energy[rank:]))
        best = now
    return min(best.values())


def test_a_matrix_that_saves_nothing_stays_whole() -> None:
    parts = [part(0, (8, 8), [9.0] * 8), part(1, (8, 8), [5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1])]
    ranks = cheapest(parts, 64 + 16)
    assert ranks == [None, 1]
    assert given(parts, ranks) == {"site0": 0.0, "site1": 0.75}


def test_every_matrix_keeps_a_direction() -> None:
    parts = [part(0, (8, 8), [1e-9] * 8), part(1, (8, 8), [5.0] * 8)]
    assert cheapest(parts, 48) == [1, 2]


@drawn(found=st.lists(energies, min_size=2, max_size=4), levels=st.tuples(st.floats(0, 10), st.floats(0, 10)))
def test_a_higher_threshold_keeps_no_more(found: list[list[float]], levels: tuple[float, float]) -> None:
    parts = [part(i, (12, 18), energy) for i, energy in enumerate(found)]
    low, high = sorted(levels)
    assert parameters(parts, above(parts, high)) <= parameters(parts, above(parts, low))


def test_uniform_ranks_are_the_budget() -> None:
    parts = [part(0, (12, 18), [1.0] * 6), part(1, (6, 18), [1.0] * 6)]
    assert budget_of(parts, 0.5) == 3 * 30 + 2 * 24
    assert budget_of(parts, 0.0) == 12 * 18 + 6 * 18


@pytest.mark.slow
@pytest.mark.parametrize("budget", [Ranks(), Ranks(measure="energy"), WeLore(), Sensitivity()], ids=lambda b: str(b))
@pytest.mark.parametrize("share", [False, True], ids=["each", "shared"])
def test_a_budget_meets_the_parameters_asked_for(budget: Any, share: bool, tiny_llama: Path, tmp_path: Path) -> None:
    step = SVDLLM(removed=0.4, shared=share)
    report = compress.run(tiny_llama, Recipe(passes=(budget, step), calibration=FEW), tmp_path / "out")
    alone = compress.run(tiny_llama, Recipe(passes=(step,), calibration=FEW), tmp_path / "alone")
    assert report.bits_per_weight == pytest.approx(alone.bits_per_weight, rel=0.08)
    records = Artifact(report.out).provenance["sites"].values()
    assert len({site["rank"] for site in records}) > 3
    assert all(site["output_error"] is not None for site in records)


def test_welore_tells_what_stays_dense(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(WeLore(), SVD(removed=0.1)), calibration=FEW)
    artifact = Artifact(compress.run(tiny_llama, recipe, tmp_path / "out").out)
    low_rank = {name for name, spec in artifact.specs.items() if spec["name"].startswith("r")}
    records = artifact.provenance["sites"]
    dense = {name for name, site in records.items() if site["rank"] == "dense"}
    assert low_rank | dense == records.keys()
    assert low_rank
    assert dense
    assert not low_rank & dense


def test_a_budget_of_ranks_needs_a_low_rank_pass() -> None:
    with pytest.raises(RecipeError, match=r"passes\[0\]\.ranks: no pass follows whose removed it could set"):
        Recipe(passes=(Ranks(), RTN(group=8)))


# -- in a model ------------------------------------------------------------------------------------


def test_an_aim_at_the_dense_output_lowers_the_divergence(tiny_llama: Path, tmp_path: Path) -> None:
    few = Calibration(samples=32, length=32)
    plain = compress.run(tiny_llama, Recipe(passes=(SVDLLM(removed=0.5),), calibration=few), tmp_path / "plain")
    steps = (Realign(), SVDLLM(removed=0.5))
    aimed = compress.run(tiny_llama, Recipe(passes=steps, calibration=few), tmp_path / "aimed")
    assert aimed.kl < plain.kl


def test_factors_compute_as_two_small_products(shared: Path, ids: Tensor) -> None:
    model = compress.load(shared)
    module = model.model.layers[0].mlp.down_proj
    first, second = module.lowered
    assert first.matrix.shape[0] == second.matrix.shape[1] < min(module.weight.shape)
    assert model(ids).logits.isfinite().all()


def test_a_dense_left_factor_is_of_the_models_dtype(site_of: SiteMaker) -> None:
    product = SVD().rewrite(site_of(normal(40, 64).bfloat16()))
    assert isinstance(product, Product)
    assert isinstance(product.left, Dense)
    assert product.left.data.dtype == product.right.data.dtype == torch.bfloat16  # type: ignore[attr-defined]


# -- fine-tuned factors ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("share", [False, True], ids=["each", "shared"])
def test_fine_tuning_brings_factors_nearer_and_keeps_what_they_share(
    share: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    few = Calibration(samples=24, length=32)
    step = SVDLLM(removed=0.5, shared=share)
    tune = FineTune(steps=40, held_out=4, batch=4)
    plain = compress.run(tiny_llama, Recipe(passes=(step,), calibration=few), tmp_path / "plain")
    tuned = compress.run(tiny_llama, Recipe(passes=(step, tune), calibration=few), tmp_path / "tuned")
    assert tuned.kl < plain.kl
    assert tuned.artifact_bytes == plain.artifact_bytes
    learned = [site["learned"] for site in Artifact(tuned.out).provenance["sites"].values()]
    assert any(one["after"] < 0.9 * one["before"] for one in learned)
