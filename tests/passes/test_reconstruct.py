"""Reconstruction: the least squares solution of each row, its one-sweep approximation, and no increase of the loss."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import Dense, Masked, Reconstruct, SparseGPT, UnsupportedWeight, Wanda, pattern
from compress.model.site import Site
from compress.passes.feedback import Given, Unrounded, feed_back
from compress.passes.hessian import damp, inverse_factor
from compress.passes.pruning.reconstruct import better, least_squares, row_loss
from compress.stats import Gram

SiteMaker = Callable[..., Site]
Close = Callable[[str, Tensor, Tensor, float], None]
WIDTH = 48
ROWS = 17
METHODS = ("exact", "obs")
every_method = pytest.mark.parametrize("method", METHODS)
every_pattern = pytest.mark.parametrize("sparsity", [0.5, 0.8, "2:4", "1:4"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(count: int = 200) -> Tensor:
    mixing = torch.eye(WIDTH) + normal(WIDTH, WIDTH, seed=2) / WIDTH**0.5
    return normal(count, WIDTH, seed=1) @ mixing * normal(WIDTH, seed=3).exp()


def pruned_site(
    site_of: SiteMaker, sparsity: float | str = 0.5, dtype: torch.dtype = torch.float32, count: int = 200
) -> Site:
    site = site_of(normal(ROWS, WIDTH).to(dtype), tokens(count).to(dtype))
    site.weight = Wanda(sparsity=sparsity).rewrite(site)
    return site


def rebuilt(step: Reconstruct, site: Site) -> Masked:
    result = step.rewrite(site)
    assert isinstance(result, Masked)
    return result


def losses(naive: ModuleType, site: Site, now_OI: Tensor, gram_II: Tensor | None = None) -> list[float]:
    gram_II = site.stats[Gram] if gram_II is None else gram_II
    w = site.original.data
    return [naive.row_loss(w[r], now_OI[r], gram_II) for r in range(len(w))]


# -- exact -----------------------------------------------------------------------------------------


@every_pattern
def test_the_core_solves_each_row(sparsity: float | str, naive: ModuleType, assert_close: Close) -> None:
    w, gram = normal(ROWS, WIDTH).double(), damp(tokens().double().T @ tokens().double() / 200, 0.01)
    keep = pattern(sparsity).keep(w.abs())
    solved, _ = least_squares(w, keep, gram, w * keep, 500, 1e-13)
    want = torch.stack([naive.least_squares_row(w[r], keep[r], gram) for r in range(ROWS)])
    assert_close("values", solved, want, 1e-10)


def test_the_start_does_not_matter_in_the_end(assert_close: Close) -> None:
    w, gram = normal(ROWS, WIDTH).double(), damp(tokens().double().T @ tokens().double() / 200, 0.01)
    keep = pattern(0.5).keep(w.abs())
    solved = [least_squares(w, keep, gram, start, 500, 1e-13)[0] for start in (w, torch.zeros_like(w), -w)]
    assert_close("from 0", solved[1], solved[0], 1e-10)
    assert_close("from -w", solved[2], solved[0], 1e-10)


@pytest.mark.parametrize("keep", [torch.zeros(3, WIDTH) > 0, torch.ones(3, WIDTH) > 0], ids=["nothing", "all"])
def test_nothing_or_all_kept_is_solved_at_once(keep: Tensor, assert_close: Close) -> None:
    w, gram = normal(3, WIDTH).double(), damp(tokens().double().T @ tokens().double() / 200, 0.01)
    solved, taken = least_squares(w, keep, gram, w * keep)
    assert torch.equal(solved, w * keep)
    assert taken == 0


@every_pattern
def test_the_pass_solves_the_damped_problem(
    sparsity: float | str, site_of: SiteMaker, naive: ModuleType, assert_close: Close
) -> None:
    site = pruned_site(site_of, sparsity)
    mask, gram = site.weight.mask_OI, damp(site.stats[Gram], 0.01)
    result = rebuilt(Reconstruct(steps=2000, tolerance=1e-7), site)
    want = torch.stack([naive.least_squares_row(site.original.data[r], mask[r], gram) for r in range(ROWS)])
    assert_close("values", result.dense(), want, 1e-4)  # float32 under a Gram of condition 1600
    assert site.ledger["damping"] == pytest.approx(0.01)


@every_pattern
def test_exact_is_at_most_one_sweep_which_is_at_most_the_start(
    sparsity: float | str, site_of: SiteMaker, naive: ModuleType
) -> None:
    """In the damped objective that both minimise; each row."""
    exact, sweep = (
        rebuilt(Reconstruct(method=method, steps=500, tolerance=1e-6), pruned_site(site_of, sparsity)).dense()
        for method in ("exact", "obs")
    )
    site = pruned_site(site_of, sparsity)
    gram = damp(site.stats[Gram], 0.01)
    rows = [losses(naive, site, now, gram) for now in (exact, sweep, site.weight.dense())]
    assert all(a <= b * (1 + 1e-5) for a, b in zip(rows[0], rows[1], strict=True))
    assert sum(rows[0]) < sum(rows[1]) < sum(rows[2])


def test_the_defaults_come_within_a_hundredth_of_the_least_loss(site_of: SiteMaker, naive: ModuleType) -> None:
    site = pruned_site(site_of)
    mask, gram = site.weight.mask_OI, site.stats[Gram]
    got = rebuilt(Reconstruct(), site).dense()
    best = torch.stack([naive.least_squares_row(site.original.data[r], mask[r], damp(gram, 0.01)) for r in range(ROWS)])
    assert sum(losses(naive, site, got)) == pytest.approx(sum(losses(naive, site, best)), rel=0.01)
    assert 0 < site.ledger["steps"] <= 50


def test_an_input_that_is_most_of_the_residual_does_not_end_it(site_of: SiteMaker, naive: ModuleType) -> None:
    x = tokens()
    x[::50, 3] = 1e4 * x.abs().mean()
    site = site_of(normal(ROWS, WIDTH), x)
    w, keep = site.original.data, Wanda().rewrite(site).mask_OI
    gram = site.stats[Gram] + 0.01 * torch.eye(WIDTH)
    solved, _ = least_squares(w, keep, gram, w * keep)
    best = torch.stack([naive.least_squares_row(w[r], keep[r], gram) for r in range(ROWS)])
    assert sum(losses(naive, site, solved, gram)) == pytest.approx(sum(losses(naive, site, best, gram)), rel=0.05)


# -- one sweep -------------------------------------------------------------------------------------


def test_one_sweep_is_error_feedback_under_the_mask(site_of: SiteMaker) -> None:
    site = pruned_site(site_of)
    found = inverse_factor(site.stats[Gram], 0.01)
    assert found is not None
    fed, _, _ = feed_back(site.original.data, found[0], Unrounded(), Given(site.weight.mask_OI))
    result = rebuilt(Reconstruct(method="obs"), site).dense()
    chosen = better(site.original.data, site.weight.dense(), fed, site.stats[Gram])
    assert torch.equal(result, chosen)
    assert int((result == fed).all(1).sum()) > ROWS * 0.75  # typical, though no theorem: section 14, item 14


def test_a_sweep_that_is_worse_than_the_mask_alone_is_not_taken(site_of: SiteMaker, naive: ModuleType) -> None:
    """The counterexample of pruning.md section 14, item 14: mask only 0.50, one sweep 12.65."""
    gram = torch.tensor([[1, 0.05, -0.05], [0.05, 1, 0.99], [-0.05, 0.99, 1]])
    w, keep = torch.tensor([[1, 1, 0.02]]), torch.tensor([[False, True, False]])
    found = inverse_factor(gram, 1e-9)
    assert found is not None
    fed, _, _ = feed_back(w, found[0], Unrounded(), Given(keep))
    site = site_of(w, gram_II=gram)
    site.weight = Masked(site.original, keep, "67%")
    result = rebuilt(Reconstruct(method="obs", damping=1e-9), site)
    assert naive.row_loss(w[0], fed[0], gram) / 2 == pytest.approx(12.65, abs=0.01)
    assert naive.row_loss(w[0], w[0] * keep[0], gram) / 2 == pytest.approx(0.50, abs=0.01)
    assert torch.equal(result.dense(), w * keep)


# -- promises of both ------------------------------------------------------------------------------


@every_method
@every_pattern
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_no_row_is_worse_than_it_was(
    method: Any, sparsity: float | str, dtype: torch.dtype, site_of: SiteMaker, naive: ModuleType
) -> None:
    site = pruned_site(site_of, sparsity, dtype)
    before = losses(naive, site, site.weight.dense())
    site.weight = rebuilt(Reconstruct(method=method), site)
    after = losses(naive, site, site.module.weight)
    assert all(a <= b * (1 + 1e-5) for a, b in zip(after, before, strict=True))
    assert sum(after) < 0.95 * sum(before)
    assert site.ledger["row_errors"] == pytest.approx([sum(before), sum(after)], rel=1e-3)


@every_method
@pytest.mark.parametrize("seed", range(10, 30))
def test_no_row_is_worse_than_any_start(method: Any, seed: int, site_of: SiteMaker, naive: ModuleType) -> None:
    site = site_of(normal(6, WIDTH, seed=seed), tokens())
    mask = pattern(0.5).keep(normal(6, WIDTH, seed=seed + 1))
    site.weight = Masked(Dense(site.original.data * (1 + normal(6, WIDTH, seed=seed + 2) / 4)), mask, "50%")
    before, after = (
        losses(naive, site, site.weight.dense()),
        losses(naive, site, Reconstruct(method=method).rewrite(site).dense()),
    )
    assert all(a <= b * (1 + 1e-5) for a, b in zip(after, before, strict=True))


@every_method
def test_what_was_optimal_stays(method: Any, site_of: SiteMaker, naive: ModuleType) -> None:
    site = pruned_site(site_of)
    gram, mask = site.stats[Gram], site.weight.mask_OI
    best = torch.stack([naive.least_squares_row(site.original.data[r], mask[r], gram) for r in range(ROWS)]).float()
    site.weight = Masked(Dense(best), mask, "50%")
    after = losses(naive, site, rebuilt(Reconstruct(method=method), site).dense())
    assert after == pytest.approx(losses(naive, site, best), rel=1e-5)


@every_method
@every_pattern
def test_the_mask_is_untouched(method: Any, sparsity: float | str, site_of: SiteMaker) -> None:
    site = pruned_site(site_of, sparsity)
    result = rebuilt(Reconstruct(method=method), site)
    assert torch.equal(result.mask_OI, site.weight.mask_OI)
    assert int(result.values.dense()[~result.mask_OI].count_nonzero()) == 0
    assert result.pattern == site.weight.pattern


@every_method
def test_values_that_were_compensated_are_replaced_by_better_ones(
    method: Any, site_of: SiteMaker, naive: ModuleType
) -> None:
    site = site_of(normal(ROWS, WIDTH), tokens())
    site.weight = SparseGPT().rewrite(site)
    before, after = (
        losses(naive, site, now) for now in (site.weight.dense(), Reconstruct(method=method).rewrite(site).dense())
    )
    assert all(a <= b * (1 + 1e-5) for a, b in zip(after, before, strict=True))


@every_method
def test_fewer_tokens_than_inputs_suffice(method: Any, site_of: SiteMaker, naive: ModuleType) -> None:
    site = pruned_site(site_of, count=20)
    result = rebuilt(Reconstruct(method=method), site).dense()
    assert bool(torch.isfinite(result).all())
    assert sum(losses(naive, site, result)) < sum(losses(naive, site, site.weight.dense()))


@every_method
def test_inputs_that_never_fire_keep_their_weights(method: Any, site_of: SiteMaker) -> None:
    x = tokens()
    x[:, [5, 30]] = 0
    site = site_of(normal(ROWS, WIDTH), x)
    site.weight = Masked(site.original, pattern(0.5).keep(normal(ROWS, WIDTH, seed=5)), "50%")
    result = rebuilt(Reconstruct(method=method), site).dense()
    assert bool(torch.isfinite(result).all())
    assert torch.equal(result[:, [5, 30]], site.weight.dense()[:, [5, 30]])


@every_method
def test_rows_are_independent(method: Any, site_of: SiteMaker, assert_close: Close) -> None:
    step = Reconstruct(method=method, steps=500, tolerance=1e-6)
    whole = rebuilt(step, pruned_site(site_of)).dense()
    site = site_of(normal(ROWS, WIDTH)[5:11], tokens())
    site.weight = Wanda().rewrite(site)
    assert_close("rows", rebuilt(step, site).dense(), whole[5:11], 1e-4)


def test_the_loss_of_rows_is_that_of_its_formula(naive: ModuleType) -> None:
    w, now, gram = normal(ROWS, WIDTH), normal(ROWS, WIDTH, seed=1), tokens().T @ tokens() / 200
    want = [naive.row_loss(w[r], now[r], gram) for r in range(ROWS)]
    assert row_loss(w, now, gram).tolist() == pytest.approx(want, rel=1e-5)


# -- what it cannot do -----------------------------------------------------------------------------


@every_method
def test_a_hopeless_gram_changes_nothing_and_is_recorded(method: Any, site_of: SiteMaker) -> None:
    hopeless = torch.eye(WIDTH)
    hopeless[0, 1] = hopeless[1, 0] = 100.0  # no damping of the ladder makes this positive definite
    site = site_of(normal(ROWS, WIDTH), gram_II=hopeless)
    site.weight = Masked(site.original, site.original.data > 0, "50%")
    assert Reconstruct(method=method).rewrite(site) is site.weight
    assert site.fallbacks == [
        ("reconstruct", "the Gram was not positive definite even at 1000 times the damping; left as it was")
    ]


def test_a_dense_weight_is_refused(site_of: SiteMaker) -> None:
    with pytest.raises(
        UnsupportedWeight, match=r"reconstruct needs unquantized values under a mask; blocks\.0\.proj is .*"
    ):
        Reconstruct().rewrite(site_of(normal(ROWS, WIDTH), tokens()))


def test_an_expert_without_tokens_is_left_as_it_was(site_of: SiteMaker) -> None:
    site = pruned_site(site_of)
    assert Reconstruct().rewrite_unfed(site) is site.weight


def test_tokens_of_huge_activations_do_not_end_it_at_once(site_of: SiteMaker, naive: ModuleType) -> None:
    x = tokens(600)
    x[::60, :2] += 1e4
    site = site_of(normal(ROWS, WIDTH), x)
    site.weight = Wanda(sparsity=0.5).rewrite(site)
    swept, gram = rebuilt(Reconstruct(method="obs"), site), site.stats[Gram]
    solved = rebuilt(Reconstruct(), site)
    best = rebuilt(Reconstruct(tolerance=1e-9, steps=1000), site)
    lost = [sum(losses(naive, site, made.dense(), gram)) for made in (swept, solved, best)]
    assert lost[1] < 1.01 * lost[2] < lost[0]
