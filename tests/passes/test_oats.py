"""Sparse plus low rank: the alternation equals the explicit one, the budget is kept, and both pure forms are beaten."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import (
    GPTQ,
    OWL,
    RTN,
    Calibration,
    Global,
    Magnitude,
    Masked,
    PassManager,
    Product,
    Quantized,
    Recipe,
    RecipeError,
    Sensitivity,
    Sum,
    Wanda,
)
from compress.artifact import Artifact
from compress.model.site import Site
from compress.passes import OATS, SVD, Budget, subspace
from compress.passes.hybrid.oats import by_turns, loudness
from compress.passes.subspace import Subspace
from compress.passes.whitened import rank_within
from compress.runtime.lower import lower, rule_of
from compress.weights import Weight, pack, pattern, specify, unpack

SiteMaker = Callable[..., Site]
Close = Callable[[str, Tensor, Tensor, float], None]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def falling(rows: int, columns: int) -> Tensor:
    """A matrix with singular values i^-0.5, as in lowrank_quant_delta.md, under loud and quiet columns."""
    short = min(rows, columns)
    left, right = torch.linalg.qr(normal(rows, short)).Q, torch.linalg.qr(normal(columns, short, seed=1)).Q
    return left * torch.arange(1, short + 1).float().pow(-0.5) @ right.T * normal(columns, seed=2).exp()


def tokens(width: int) -> Tensor:
    return normal(4 * width, width, seed=3) @ (torch.eye(width) + 0.5 * normal(width, width, seed=4) / width**0.5)


def terms(weight: Weight) -> tuple[Masked, Product]:
    assert isinstance(weight, Sum)
    sparse, factors = weight.terms
    assert isinstance(sparse, Masked)
    assert isinstance(factors, Product)
    return sparse, factors


def parameters(weight: Weight) -> int:
    if isinstance(weight, Masked):
        return int(weight.mask_OI.sum())
    sparse, factors = terms(weight)
    return int(sparse.mask_OI.sum()) + factors.left.shape[1] * sum(factors.shape)


def residual(a: Tensor, rank: int, sparsity: float | str, turns: int) -> float:
    left, right, mask = by_turns(a, rank, pattern(sparsity), turns)
    return float(((a - left @ right) * ~mask).norm() / a.norm())


# -- the subspace ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(24, 40), (40, 24), (32, 32)], ids=str)
def test_the_first_step_is_the_exact_decomposition(shape: tuple[int, int], assert_close: Close) -> None:
    w = falling(*shape).double()
    left, right = Subspace(w, 5).follow(w)
    u, s, v = torch.linalg.svd(w, full_matrices=False)
    assert_close("rank 5", left @ right, u[:, :5] * s[:5] @ v[:5], 1e-8)
    assert_close("basis", left.T @ left, torch.eye(5).double(), 1e-8)


def test_it_follows_a_matrix_that_moves(assert_close: Close) -> None:
    w = falling(40, 64).double()
    moving = Subspace(w, 5)
    goal = w + 0.3 * falling(64, 40).T.double()
    for _ in range(60):
        left, right = moving.follow(goal)
    u, s, v = torch.linalg.svd(goal, full_matrices=False)
    assert_close("rank 5", left @ right, u[:, :5] * s[:5] @ v[:5], 1e-6)


def test_a_rank_near_the_whole_is_no_special_case(assert_close: Close) -> None:
    w = falling(12, 20)
    left, right = Subspace(w, 10).follow(w)
    assert float((w - left @ right).norm()) == pytest.approx(float(torch.linalg.svdvals(w)[10:].norm()), rel=1e-4)


# -- the alternation -------------------------------------------------------------------------------


def test_the_golden_fixture_is_met(naive: ModuleType, site_of: SiteMaker) -> None:
    """pruning.md section 16."""
    w, x = naive.golden_weight(), naive.golden_tokens()
    a = w * x.square().sum(0).sqrt()
    assert OATS(rank_share=0.7).rank((4, 16)) == 1
    assert residual(a, 1, 13 / 16, 1) == pytest.approx(0.366882, abs=1e-6)
    assert residual(a, 1, 13 / 16, 80) == pytest.approx(0.257329, abs=1e-6)
    result = OATS(rank_share=0.7).rewrite(site_of(w.float(), x.float()))
    assert naive.mask_hex(terms(result)[0].mask_OI) == ["8041", "2804", "2804", "8041"]
    assert naive.energy(result.dense() - w, x.T @ x) == pytest.approx(217.282114, rel=1e-4)


@pytest.mark.slow
def test_80_warm_steps_end_where_80_decompositions_do(naive: ModuleType) -> None:
    a = falling(128, 96)
    low, sparse = naive.oats(a, 8, 36, 80)
    want = float((a - low - sparse).norm() / a.norm())
    assert residual(a, 8, 0.625, 80) == pytest.approx(want, rel=0.01)


def test_a_random_start_ends_worse(monkeypatch: pytest.MonkeyPatch) -> None:
    a = falling(128, 128)
    exact = residual(a, 8, 0.625, 80)
    monkeypatch.setattr(subspace, "right_vectors", lambda w, count: torch.linalg.qr(normal(128, count, seed=9)).Q)
    assert residual(a, 8, 0.625, 80) > 1.02 * exact


def test_the_objective_never_grows() -> None:
    a = falling(96, 128)
    errors = [residual(a, 8, 0.625, turns) for turns in range(1, 30)]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.85 * errors[0]


# -- the pass --------------------------------------------------------------------------------------


@pytest.mark.parametrize("scope", ["row", "matrix"])
@pytest.mark.parametrize("sparsity", [0.29, 0.5, "2:4", "3:8"])
def test_without_factors_it_is_wanda(sparsity: float | str, scope: str, site_of: SiteMaker) -> None:
    w, x = normal(33, 64), tokens(64)
    got = OATS(sparsity=sparsity, scope=scope, rank_share=0.0).rewrite(site_of(w, x))
    want = Wanda(sparsity=sparsity, scope=scope).rewrite(site_of(w, x))
    assert isinstance(got, Masked)
    assert isinstance(want, Masked)
    assert torch.equal(got.mask_OI, want.mask_OI)
    assert got.describe() == want.describe()
    assert pack(got).keys() == pack(want).keys()
    assert all(torch.equal(pack(got)[key], pack(want)[key]) for key in pack(got))


@pytest.mark.parametrize("scope", ["row", "matrix", "4x4"])
@pytest.mark.parametrize("rank_share", [0.1, 0.25, 0.7])
@pytest.mark.parametrize("sparsity", [0.3, 0.5, 0.7])
def test_the_budget_is_spent_to_half_a_weight_a_row(
    sparsity: float, rank_share: float, scope: str, site_of: SiteMaker
) -> None:
    w, x = falling(64, 96), tokens(96)
    result = OATS(sparsity=sparsity, rank_share=rank_share, scope=scope, iterations=2).rewrite(site_of(w, x))
    assert parameters(result) == pytest.approx((1 - sparsity) * w.numel(), abs=64 / 2)
    rank = terms(result)[1].left.shape[1]
    assert rank == rank_within(rank_share * (1 - sparsity), (64, 96)) > 0


@pytest.mark.parametrize(
    ("sparsity", "rank_share", "share"), [("2:8", 0.5, 0.5), ("2:4", 0.25, 2 / 3), ("1:4", 0.2, 0.3125)]
)
def test_n_of_m_is_the_pattern_of_the_sparse_term(
    sparsity: str, rank_share: float, share: float, site_of: SiteMaker
) -> None:
    w, x = falling(64, 96), tokens(96)
    step = OATS(sparsity=sparsity, rank_share=rank_share, iterations=2)
    sparse, factors = terms(step.rewrite(site_of(w, x)))
    n, m = map(int, sparsity.split(":"))
    assert bool((sparse.mask_OI.view(64, -1, m).sum(2) == n).all())
    assert step.kept == pytest.approx(share)
    assert factors.left.shape[1] == rank_within(rank_share * share, (64, 96))
    assert sparse.describe() == sparsity


def test_kept_weights_are_exact_to_their_rounding(site_of: SiteMaker) -> None:
    w, x = falling(64, 96).bfloat16(), tokens(96).bfloat16()
    sparse, factors = terms(OATS().rewrite(site_of(w, x)))
    whole = sparse.dense().float() + factors.left.dense().float() @ factors.right.dense().float()
    limit = 2**-8 * sparse.dense().float().abs() + 1e-6
    assert bool(((whole - w.float()).abs() <= limit)[sparse.mask_OI].all())


def test_both_terms_together_beat_either_alone(site_of: SiteMaker, naive: ModuleType) -> None:
    w, x = falling(96, 128), tokens(128)
    gram = x.T @ x
    both = naive.proxy_loss(w, OATS().rewrite(site_of(w, x)).dense(), gram)
    assert both < 0.9 * naive.proxy_loss(w, Wanda().rewrite(site_of(w, x)).dense(), gram)
    assert both < 0.9 * naive.proxy_loss(w, SVD(removed=0.5).rewrite(site_of(w, x)).dense(), gram)


@pytest.mark.parametrize("sparsity", [0.5, "2:8"])
def test_a_refit_lowers_the_error_of_the_output(sparsity: float | str, site_of: SiteMaker, naive: ModuleType) -> None:
    w, x = falling(96, 128), tokens(128)
    plain, refit = (
        naive.proxy_loss(w, OATS(sparsity=sparsity, refit=refit).rewrite(site_of(w, x)).dense(), x.T @ x)
        for refit in (False, True)
    )
    assert refit < 0.9 * plain


def test_inputs_that_never_came_do_no_harm(site_of: SiteMaker) -> None:
    w, x = falling(64, 96), tokens(96)
    x[:, [0, 17]] = 0
    for refit in (False, True):
        result = OATS(refit=refit).rewrite(site_of(w, x)).dense()
        assert bool(result.isfinite().all())
        assert float((result - w)[:, [0, 17]].abs().max()) < 2 * float(w.abs().max())
    silent = OATS().rewrite(site_of(w, torch.zeros(50, 96))).dense()
    assert torch.equal(silent, OATS().rewrite_unfed(site_of(w)).dense())


def test_faint_inputs_are_raised_to_a_share_of_the_median() -> None:
    norm = torch.tensor([0.0, 1e-9, 1.0, 2.0, 3.0])
    assert loudness(norm).tolist() == pytest.approx([1e-4, 1e-4, 1.0, 2.0, 3.0])
    assert loudness(torch.zeros(3)).tolist() == [1, 1, 1]


def test_channel_scaling_changes_nothing(site_of: SiteMaker, assert_close: Close) -> None:
    """W_j / t, x_j t is the same map, and the same decomposition of it."""
    w, x, t = falling(64, 96), tokens(96), normal(96, seed=8).exp()
    scaled = OATS(iterations=5).rewrite(site_of(w / t, x * t)).dense() * t
    assert_close("weights", scaled, OATS(iterations=5).rewrite(site_of(w, x)).dense(), 1e-2)


def test_an_expert_without_tokens_is_split_by_its_weights(site_of: SiteMaker) -> None:
    w = falling(64, 96)
    left, right, mask = by_turns(w, OATS().rank((64, 96)), OATS().remainder((64, 96)), 80)
    sparse, factors = terms(OATS(refit=True).rewrite_unfed(site_of(w)))
    assert torch.equal(sparse.mask_OI, mask)
    assert torch.equal(factors.dense(), left @ right)
    few = OATS(rank_share=0.0).rewrite_unfed(site_of(w))
    assert torch.equal(few.dense(), Magnitude(scope="row").rewrite(site_of(w)).dense())


# -- edges -----------------------------------------------------------------------------------------


def test_a_matrix_too_small_for_a_rank_is_only_pruned(site_of: SiteMaker) -> None:
    w, x = normal(6, 8), normal(40, 8, seed=1)
    result = OATS().rewrite(site_of(w, x))
    assert torch.equal(result.dense(), Wanda().rewrite(site_of(w, x)).dense())
    assert isinstance(result, Masked)


@pytest.mark.parametrize("sparsity", [0.0, 1.0])
def test_nothing_and_everything_can_be_removed(sparsity: float, site_of: SiteMaker) -> None:
    w, x = normal(32, 64), tokens(64)
    OATS(sparsity=sparsity).check("a.b", (32, 64))
    assert torch.equal(OATS(sparsity=sparsity).rewrite(site_of(w, x)).dense(), w * (1 - sparsity))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "3:4"}, "oats: a.b: 3:4 with a rank_share of 0.25 keeps 100% of the parameters"),
        ({"sparsity": "2:4", "rank_share": 0.6}, "keeps 125% of the parameters; keep fewer, or lower rank_share"),
        ({"sparsity": 0.96, "rank_share": 0.99}, "leaves less than one weight per row of 64 for the sparse term"),
        ({"sparsity": "2:6"}, "oats: a.b: 2:6 needs a width divisible by 6, got 64"),
    ],
    ids=str,
)  # fmt: skip
def test_a_budget_that_makes_no_sense_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        OATS(**options).check("a.b", (64, 64))


# -- what follows ----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [RTN(group=32), GPTQ(group=32)], ids=lambda s: s.name)
def test_a_quantizer_rounds_the_sparse_term_alone(step: Any, site_of: SiteMaker) -> None:
    w, x = falling(64, 96), tokens(96)
    site = site_of(w, x)
    site.weight = OATS().rewrite(site)
    before, factors = terms(site.weight)
    rounded = step.rewrite(site)
    sparse, same = terms(rounded)
    assert isinstance(sparse.values, Quantized)
    assert torch.equal(sparse.mask_OI, before.mask_OI)
    assert same is factors
    error = float((rounded.dense() - site.weight.dense()).norm() / before.dense().norm())
    assert 0 < error < 0.25


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", ["row", "1x96"])
def test_it_is_stored_and_computed_as_its_terms(
    scope: str, dtype: torch.dtype, site_of: SiteMaker, assert_close: Close
) -> None:
    """Blocks of 1x96 are whole neurons, the form of LoSparse."""
    w, x = falling(64, 96).to(dtype), tokens(96).to(dtype)
    weight = OATS(scope=scope).rewrite(site_of(w, x))
    again = unpack(specify(weight), pack(weight))
    assert torch.equal(again.dense(), weight.dense())
    assert rule_of(weight, dtype) == "decoded"  # with the whole matrix, the factors cost nothing
    assert_close("lowered", lower(weight, dtype)(x[:5]), weight.linear(x[:5]), 4 * torch.finfo(dtype).eps)
    assert weight.nbytes() == dtype.itemsize * parameters(weight) + w.numel() // 8
    rows = terms(weight)[0].mask_OI.float().mean(1)
    assert set(rows.tolist()) == {0.0, 1.0} if scope == "1x96" else len(set(rows.tolist())) == 1


@pytest.mark.parametrize("budget", [OWL(spread=0.2), Sensitivity(), Global()], ids=lambda b: b.name)
def test_a_budget_sets_its_sparsity_site_by_site(
    budget: Budget, tiny_llama: Path, hugging_face: Callable[[Path], Any], ids: Tensor
) -> None:
    found = PassManager([budget, OATS(sparsity=0.5, iterations=3)]).apply(hugging_face(tiny_llama), ids)
    assert len({weight.describe() for weight in found.values()}) > 1
    size = sum(weight.shape[0] * weight.shape[1] for weight in found.values())
    assert sum(map(parameters, found.values())) == pytest.approx(0.5 * size, rel=0.01)


@pytest.mark.slow
def test_a_model_of_both_terms_computes_what_was_measured(
    tiny_llama: Path, hugging_face: Callable[[Path], Any], ids: Tensor, tmp_path: Path, assert_close: Close
) -> None:
    recipe = Recipe(passes=(OATS(iterations=3),), calibration=Calibration(samples=6, length=32))
    compress.run(tiny_llama, recipe, tmp_path / "out")
    weights = {site: Artifact(tmp_path / "out").expression(site) for site in Artifact(tmp_path / "out").specs}
    assert any(isinstance(weight, Sum) for weight in weights.values())
    plain = hugging_face(tiny_llama)
    for site, weight in weights.items():
        plain.get_submodule(site).weight.data = weight.dense()
    got = compress.load(tmp_path / "out")(ids).logits
    assert_close("logits", got, plain(ids).logits, 1e-3)
