"""Wanda with unequal rows, and RIA with and without a permutation of its inputs."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress import RIA, Dense, Magnitude, Masked, Permutation, Product, Pruner, RecipeError, UnsupportedWeight, Wanda
from compress.model.site import Site
from compress.passes.pruning.ria import deal
from compress.passes.pruning.wanda import keep_by_alpha
from compress.stats import ColumnNorm
from compress.weights import NM

SiteMaker = Callable[..., Site]
Close = Callable[[str, Tensor, Tensor, float], None]
WIDTH = 24


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> Tensor:
    return normal(50, WIDTH, seed=1) * normal(WIDTH, seed=2).exp()


def mask_of(step: Pruner, site: Site) -> Tensor:
    result = step.rewrite(site)
    assert isinstance(result, Masked)
    return result.mask_OI


# -- Wanda, rows of unequal sparsity ---------------------------------------------------------------


def test_the_search_gives_the_specified_masks(site_of: SiteMaker, naive: ModuleType) -> None:
    """pruning.md section 16."""
    site = site_of(naive.golden_weight().float(), naive.golden_tokens().float())
    assert naive.mask_hex(mask_of(Wanda(alpha=True), site)) == ["788e", "714e", "a8d5", "788e"]
    assert site.ledger["alpha"] == pytest.approx(0.2125)


@given(seed=st.integers(0, 10_000), sparsity=st.sampled_from([0.1, 0.29, 0.5, 0.7, 0.95]))
def test_the_search_is_the_written_out_one(naive: ModuleType, seed: int, sparsity: float) -> None:
    score = normal(7, 9, seed=seed).double().exp()
    keep, alpha = keep_by_alpha(score, sparsity)
    want, other = naive.alpha_mask(score, sparsity)
    assert torch.equal(keep, torch.tensor(want))
    assert alpha == other


@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.7])
def test_the_sparsity_is_met_to_a_thousandth(sparsity: float, site_of: SiteMaker) -> None:
    """Where entries are so many that some alpha of the last bracket meets it."""
    mask = mask_of(Wanda(sparsity=sparsity, alpha=True), site_of(normal(500, WIDTH), tokens()))
    assert float((~mask).sum()) / mask.numel() == pytest.approx(sparsity, abs=1e-3)


@pytest.mark.parametrize("sparsity", [0.29, 0.5, 0.7])
def test_no_row_loses_more_than_alpha_of_its_scores(sparsity: float, site_of: SiteMaker) -> None:
    w, site = normal(33, WIDTH), site_of(normal(33, WIDTH), tokens())
    mask = mask_of(Wanda(sparsity=sparsity, alpha=True), site)
    score = (w.abs() * site.stats[ColumnNorm]).double()
    lost = (score * ~mask).sum(1) / score.sum(1)
    following = score.masked_fill(~mask, torch.inf).min(1).values / score.sum(1)
    assert bool((lost <= site.ledger["alpha"]).all())
    assert bool((lost + following > site.ledger["alpha"]).all())  # and none could lose one more


def test_rows_end_up_unequal(site_of: SiteMaker) -> None:
    w = torch.cat((normal(8, WIDTH).sign(), normal(8, WIDTH) ** 3))  # even rows cannot lose much for little
    kept = mask_of(Wanda(alpha=True), site_of(w, tokens())).sum(1)
    assert int(kept[:8].min()) > int(kept[8:].max())


def test_a_row_that_may_lose_nothing_loses_nothing() -> None:
    """Where the released code wraps around and cuts all of it; here the other rows press alpha below a twentieth."""
    even, uneven = torch.ones(1, 20), torch.full((9, 20), 1e-6)
    uneven[:, 0] = 1
    keep, alpha = keep_by_alpha(torch.cat((even, uneven)), 0.5)
    assert alpha < 1 / 20
    assert bool(keep[0].all())


def test_a_sparsity_beyond_the_highest_alpha_is_not_reached(site_of: SiteMaker) -> None:
    site = site_of(normal(33, WIDTH), tokens())
    mask = mask_of(Wanda(sparsity=0.99, alpha=True), site)
    assert float((~mask).sum()) / mask.numel() < 0.98
    assert site.ledger["alpha"] == pytest.approx(0.8, abs=1e-3)


@pytest.mark.parametrize("options", [{"sparsity": "2:4"}, {"scope": "matrix"}, {"scope": "3x4"}], ids=str)
def test_alpha_goes_with_a_fraction_over_rows_only(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"wanda\.alpha: needs a fraction with scope row"):
        Wanda(alpha=True, **options)


def test_alpha_keeps_what_it_keeps_unchanged(site_of: SiteMaker) -> None:
    w = normal(33, WIDTH)
    result = Wanda(alpha=True).rewrite(site_of(w, tokens()))
    assert isinstance(result, Masked)
    assert torch.equal(result.dense(), w * result.mask_OI)


# -- RIA -------------------------------------------------------------------------------------------

# pruning.md section 16, a = 0.5
GOLDEN = [
    (RIA(sparsity=0.5), "7a8a 515e aad5 5a8a", 597.760814),
    (RIA(sparsity="2:4"), "5aaa 5556 aa55 5aaa", 1173.893915),
]


@pytest.mark.parametrize(("step", "masks", "error"), GOLDEN, ids=lambda v: str(v) if isinstance(v, Pruner) else "")
def test_masks_and_errors_are_the_specified_ones(
    step: Pruner, masks: str, error: float, site_of: SiteMaker, naive: ModuleType
) -> None:
    w, x = naive.golden_weight(), naive.golden_tokens()
    kept = mask_of(step, site_of(w.float(), x.float()))
    assert naive.mask_hex(kept) == masks.split()
    assert naive.energy(-w * ~kept, x.T @ x) == pytest.approx(error, abs=5e-7)


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0, 2.0])
def test_the_score_is_the_written_out_one(
    power: float, site_of: SiteMaker, naive: ModuleType, assert_close: Close
) -> None:
    w, x = normal(9, WIDTH), tokens()
    want = naive.ria_score(w, x.norm(dim=0), power)
    assert_close("score", RIA(power=power).score(site_of(w, x)), want, 1e-6)  # a few float32 roundings


@pytest.mark.parametrize("options", [{}, {"sparsity": "2:4"}, {"sparsity": "2:4", "permute": True}], ids=str)
def test_power_zero_ignores_the_data(options: dict[str, Any], site_of: SiteMaker) -> None:
    w = normal(33, WIDTH)
    results = [RIA(power=0.0, **options).rewrite(site_of(w, x)).dense() for x in (tokens(), tokens().flip(1))]
    assert torch.equal(*results)
    assert not torch.equal(*(RIA(**options).rewrite(site_of(w, x)).dense() for x in (tokens(), tokens().flip(1))))


@pytest.mark.parametrize("dim", [0, 1], ids=["columns", "rows"])
def test_quiet_rows_and_columns_do_not_die_first(dim: int, site_of: SiteMaker) -> None:
    w = normal(WIDTH, WIDTH)
    w.narrow(1 - dim, 0, WIDTH // 2).mul_(0.01)
    assert int(mask_of(RIA(power=0.0), site_of(w, tokens())).sum(dim).min()) > 0
    assert int(mask_of(Magnitude(), site_of(w)).sum(dim).min()) == 0


def test_a_row_and_a_column_of_zeros_do_not_divide_by_zero(site_of: SiteMaker) -> None:
    w = normal(33, WIDTH)
    w[3], w[:, 5] = 0, 0
    mask = mask_of(RIA(sparsity=0.05), site_of(w, tokens()))  # 40 of 792, where 56 are zero
    assert int((~mask).sum()) == 40
    assert int((~mask & (w != 0)).sum()) == 0


@pytest.mark.parametrize("options", [{}, {"sparsity": "2:4"}, {"scope": "row"}], ids=str)
def test_scales_keep_the_mask(options: dict[str, Any], site_of: SiteMaker) -> None:
    plain = mask_of(RIA(**options), site_of(normal(33, WIDTH), tokens()))
    scaled = mask_of(RIA(**options), site_of(normal(33, WIDTH) * 0.25, tokens() * 4))
    assert torch.equal(scaled, plain)


def test_it_is_not_invariant_to_moved_scale(site_of: SiteMaker) -> None:
    shift = 2.0 ** torch.arange(WIDTH).remainder(5)
    plain = mask_of(RIA(), site_of(normal(33, WIDTH), tokens()))
    moved = mask_of(RIA(), site_of(normal(33, WIDTH) / shift, tokens() * shift))
    assert not torch.equal(moved, plain)


@pytest.mark.parametrize("options", [{}, {"sparsity": "2:4"}], ids=str)
def test_permuted_rows_give_a_permuted_mask(options: dict[str, Any], site_of: SiteMaker) -> None:
    order = torch.arange(33).flip(0)
    plain = mask_of(RIA(**options), site_of(normal(33, WIDTH), tokens()))
    assert torch.equal(mask_of(RIA(**options), site_of(normal(33, WIDTH)[order], tokens())), plain[order])


def test_permuted_columns_give_a_permuted_mask(site_of: SiteMaker) -> None:
    order = torch.arange(WIDTH).flip(0)
    plain = mask_of(RIA(), site_of(normal(33, WIDTH), tokens()))
    assert torch.equal(mask_of(RIA(), site_of(normal(33, WIDTH)[:, order], tokens()[:, order])), plain[:, order])


# -- RIA, permuted ---------------------------------------------------------------------------------


def permuted(site: Site, sparsity: str = "2:4") -> tuple[Masked, Tensor, Product]:
    """The masked values in their new order, that order, and the product of both."""
    result = RIA(sparsity=sparsity, permute=True).rewrite(site)
    assert isinstance(result, Product)
    assert isinstance(result.left, Masked)
    assert isinstance(result.right, Permutation)
    return result.left, result.right.order, result


@pytest.mark.parametrize("sparsity", ["2:4", "1:4", "5:8", "1:2"])
def test_the_permutation_is_undone(sparsity: str, site_of: SiteMaker) -> None:
    w = normal(33, WIDTH)
    inner, order, result = permuted(site_of(w, tokens()), sparsity)
    assert order.sort().values.tolist() == list(range(WIDTH))
    assert order.tolist() != list(range(WIDTH))
    assert torch.equal(result.dense(), w * inner.mask_OI[:, order.argsort()])
    assert torch.equal(result.dense()[:, order], inner.dense())


def test_the_product_applies_the_masked_weight_to_inputs_as_they_come(site_of: SiteMaker, assert_close: Close) -> None:
    inner, order, result = permuted(site_of(normal(33, WIDTH), tokens()))
    want = tokens().double() @ (normal(33, WIDTH) * inner.mask_OI[:, order.argsort()]).double().T
    assert_close("output", result.linear(tokens()), want, 1e-6)


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (5, 8), (1, 2)])
def test_every_group_of_the_new_order_keeps_n_of_m(n: int, m: int, site_of: SiteMaker) -> None:
    inner, _, _ = permuted(site_of(normal(33, WIDTH), tokens()), f"{n}:{m}")
    assert inner.mask_OI.unflatten(1, (-1, m)).sum(2).unique().tolist() == [n]
    assert inner.pattern == f"{n}:{m}"


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (5, 8), (1, 2)])
@given(seed=st.integers(0, 10_000))
def test_assignment_retains_no_less_than_dealing(n: int, m: int, seed: int, naive: ModuleType) -> None:
    """What is promised: each reassignment of a rank only adds. Not promised: more than the order as it was."""
    score = normal(5, WIDTH, seed=seed).exp() * normal(WIDTH, seed=seed + 1).exp()
    order = deal(score, NM(n=n, m=m))
    dealt = naive.retained(score[:, naive.snake(score, m)], n, m)
    assert naive.retained(score[:, order], n, m) >= dealt - 1e-6


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (3, 4), (3, 6)])
@pytest.mark.parametrize("seed", range(5))
def test_ranks_are_assigned_in_the_best_of_all_ways(n: int, m: int, seed: int, naive: ModuleType) -> None:
    score = normal(5, 12, seed=seed).exp() * normal(12, seed=seed + 50).exp()
    found = naive.retained(score[:, deal(score, NM(n=n, m=m))], n, m)
    ways = [naive.retained(score[:, order], n, m) for order in naive.deal(score, n, m)]
    assert any(found == pytest.approx(way, rel=1e-9) for way in ways)


def test_important_inputs_that_lie_together_are_dealt_apart(site_of: SiteMaker, naive: ModuleType) -> None:
    """What it is for: two groups of important inputs, of which every second would be lost."""
    w = normal(33, WIDTH) * torch.where(torch.arange(WIDTH) < 8, 10.0, 1.0)
    site = site_of(w, tokens())
    _, order, result = permuted(site)
    score = RIA().score(site)
    plain, dealt = naive.retained(score, 2, 4), naive.retained(score[:, order], 2, 4)
    assert site.ledger["retained_score"] == pytest.approx([plain, dealt], rel=1e-5)
    assert dealt > plain
    unpermuted = RIA(sparsity="2:4").rewrite(site_of(w, tokens())).dense()
    gram = tokens().T @ tokens()
    assert naive.proxy_loss(w, result.dense(), gram) < naive.proxy_loss(w, unpermuted, gram)


def test_only_groups_can_be_permuted() -> None:
    with pytest.raises(RecipeError, match=r"ria\.permute: only with n:m are there groups that a permutation changes"):
        RIA(permute=True)


@pytest.mark.parametrize("permute", [False, True])
def test_a_pruned_weight_is_not_pruned_again(permute: bool, site_of: SiteMaker) -> None:
    site = site_of(normal(33, WIDTH), tokens())
    site.weight = Masked(Dense(normal(33, WIDTH)), normal(33, WIDTH) > 0, "2:4")
    with pytest.raises(UnsupportedWeight, match=r"needs a dense weight; blocks\.0\.proj is already 2:4"):
        RIA(sparsity="2:4", permute=permute).rewrite(site)


def test_rows_of_zero_scores_lose_their_share_and_no_more() -> None:
    score = torch.rand(8, 40, generator=torch.Generator().manual_seed(0))
    score[3] = 0
    keep, alpha = keep_by_alpha(score, 0.5)
    assert int(keep[3].sum()) == 40 - int(alpha * 40)


def test_without_activations_ria_asks_for_none(site_of: SiteMaker) -> None:
    step = RIA(sparsity=0.5, power=0.0)
    assert step.requires == ()
    assert int(step.rewrite(site_of(normal(8, 24))).mask_OI.sum()) == 8 * 12


@pytest.mark.parametrize("seed", range(20))
def test_a_permutation_never_retains_less(seed: int, site_of: SiteMaker) -> None:
    site = site_of(normal(4, 8, seed=seed), normal(50, 8, seed=seed + 100))
    RIA(sparsity="2:4", permute=True).rewrite(site)
    plain, chosen = site.ledger["retained_score"]
    assert chosen >= plain


def test_a_sparsity_out_of_reach_of_alpha_is_a_fallback_under_its_true_name(site_of: SiteMaker) -> None:
    site = site_of(normal(16, 64), normal(200, 64, seed=1))
    weight = Wanda(sparsity=0.99, alpha=True).rewrite(site)
    ((name, reason),) = site.fallbacks
    assert name == "wanda"
    assert reason.startswith("no alpha up to 0.8 reaches 99%; ")
    assert weight.describe() != "99%"


def test_alpha_cuts_nothing_where_nothing_is_asked(site_of: SiteMaker) -> None:
    weight = Wanda(sparsity=0.0, alpha=True).rewrite(site_of(normal(16, 64), normal(200, 64, seed=1)))
    assert bool(weight.mask_OI.all())


def test_a_permutation_of_what_is_all_zero_is_finite(site_of: SiteMaker) -> None:
    site = site_of(normal(8, 16), torch.zeros(20, 16))
    RIA(sparsity="2:4", permute=True).rewrite(site)
    assert site.ledger["retained_score"] == [0.0, 0.0]
