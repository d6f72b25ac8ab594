"""Exact swaps: the golden rows, an exhaustive search over pairs as an oracle, and a loss that never rises."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress import Dense, Masked, RecipeError, SparseGPT, Swaps, UnsupportedWeight, Wanda, pattern
from compress.model.site import Site
from compress.passes.pruning.swaps import swap, swap_in_groups
from compress.stats import Gram

SiteMaker = Callable[..., Site]
WIDTH = 12  # small enough to try every mask
ALL = 64  # a shortlist that leaves no pair out
every_start = pytest.mark.parametrize("start", ["pruned", "random", "compensated", "scaled"])


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


class Problem:
    """Rows with a mask and the Gram of their inputs; `start` tells where the kept values come from."""

    def __init__(self, rows: int = 40, n: int = 0, m: int = 0, seed: int = 0, start: str = "pruned") -> None:
        self.m = m
        self.w_OI = normal(rows, WIDTH, seed=seed)
        mixing = torch.eye(WIDTH) + normal(WIDTH, WIDTH, seed=seed + 1) / WIDTH**0.5
        x_TI = normal(50, WIDTH, seed=seed + 2) @ mixing * normal(WIDTH, seed=seed + 3).exp()
        self.gram_II = x_TI.T @ x_TI / len(x_TI)
        scores = {"random": normal(rows, WIDTH, seed=seed + 4)}
        by = scores.get(start, self.w_OI.abs() * x_TI.norm(dim=0))
        self.keep_OI = pattern(f"{n}:{m}" if m else 0.5).keep(by)
        factors = {"compensated": 1 + normal(rows, WIDTH, seed=seed + 5) / 4, "scaled": torch.tensor(3.0)}
        self.kept_OI = self.w_OI * factors.get(start, torch.tensor(1.0)) * self.keep_OI

    def run(self, limit: int = 100, shortlist: int = ALL) -> tuple[Tensor, Tensor, Tensor]:
        start = (self.w_OI, self.kept_OI, self.keep_OI, self.gram_II)
        return swap_in_groups(*start, self.m, limit) if self.m else swap(*start, limit, shortlist)

    def scalar(self, naive: ModuleType, row: int, limit: int = 100) -> tuple[Tensor, list[bool], list[float]]:
        start = (self.w_OI[row], self.kept_OI[row], self.keep_OI[row].tolist(), self.gram_II)
        result: tuple[Tensor, list[bool], list[float]]
        result = naive.swap_row_in_groups(*start, self.m, limit) if self.m else naive.swap_row(*start, limit)
        return result

    def losses(self, now_OI: Tensor) -> Tensor:
        missing_OI = self.w_OI - now_OI
        return (missing_OI @ self.gram_II * missing_OI).sum(1)


def groups() -> Any:
    return pytest.mark.parametrize(("n", "m"), [(0, 0), (2, 4), (1, 4), (3, 6)], ids=["rows", "2:4", "1:4", "3:6"])


# -- the specification -----------------------------------------------------------------------------

# pruning.md section 16: exact swaps from Wanda at 50 %, and the best of all masks
START, MASKS, ERROR, SWAPS = "788e 714e a8d5 788e", "7c86 f04e 68cd 7c86", 45.724727, [1, 1, 3, 1]
BEST, LEAST = "fa12 f017 e994 fa12", 26.302660


def test_the_core_gives_the_specified_rows(naive: ModuleType) -> None:
    w, x = naive.golden_weight(), naive.golden_tokens()
    keep = pattern(0.5).keep(w.abs() * x.norm(dim=0))
    after, mask, counts = swap(w, w * keep, keep, x.T @ x, shortlist=ALL)
    assert naive.mask_hex(keep) == START.split()
    assert naive.mask_hex(mask) == MASKS.split()
    assert counts.tolist() == SWAPS
    assert naive.energy(after - w, x.T @ x) == pytest.approx(ERROR, abs=5e-7)


def test_the_pass_gives_the_specified_rows(site_of: SiteMaker, naive: ModuleType) -> None:
    w, x = naive.golden_weight(), naive.golden_tokens()
    site = site_of(w.float(), x.float())
    site.weight = Wanda().rewrite(site)
    site.weight = Swaps().rewrite(site)
    assert naive.mask_hex(site.weight.mask_OI) == MASKS.split()
    assert site.ledger["swaps"] == sum(SWAPS)
    assert naive.energy(site.weight.dense().double() - w, x.T @ x) == pytest.approx(ERROR, rel=1e-6)


def test_the_oracles_give_the_specified_rows(naive: ModuleType) -> None:
    w, x = naive.golden_weight(), naive.golden_tokens()
    keep = pattern(0.5).keep(w.abs() * x.norm(dim=0))
    swapped = [naive.swap_row(w[r], w[r] * keep[r], keep[r].tolist(), x.T @ x) for r in range(4)]
    best = [naive.best_mask_row(w[r], x.T @ x, 8) for r in range(4)]
    assert naive.mask_hex(torch.tensor([kept for _, kept, _ in swapped])) == MASKS.split()
    assert sum(losses[-1] for _, _, losses in swapped) == pytest.approx(ERROR, abs=5e-7)
    assert naive.mask_hex(torch.stack([mask for mask, _ in best])) == BEST.split()
    assert sum(loss for _, loss in best) == pytest.approx(LEAST, abs=5e-7)


# -- the oracle ------------------------------------------------------------------------------------


def degenerate(n: int, m: int, start: str, seed: int) -> Problem:
    """Rows of which some have nothing cut, everything cut or one entry only; one input never fires."""
    problem = Problem(rows=40, n=n, m=m, seed=seed, start=start)
    problem.gram_II[2] = 0
    problem.gram_II[:, 2] = 0
    problem.keep_OI[12:14], problem.keep_OI[14:16] = True, False
    problem.keep_OI[16:18] = torch.arange(WIDTH) == 7
    problem.kept_OI = torch.where(problem.kept_OI == 0, problem.w_OI, problem.kept_OI) * problem.keep_OI
    return problem


@pytest.mark.slow
@groups()
@every_start
@pytest.mark.parametrize("seed", [0, 20])
def test_all_rows_at_once_are_each_row_alone(n: int, m: int, start: str, seed: int, naive: ModuleType) -> None:
    problem = degenerate(n, m, start, seed)
    after, keep, counts = problem.run()
    want = [problem.scalar(naive, row) for row in range(len(problem.w_OI))]
    assert torch.equal(keep, torch.tensor([kept for _, kept, _ in want]))
    assert torch.equal(after, torch.stack([values for values, _, _ in want]))
    assert counts.tolist() == [len(losses) - 1 for _, _, losses in want]


@groups()
@every_start
def test_of_equal_exchanges_any_leads_to_the_same_loss(n: int, m: int, start: str, naive: ModuleType) -> None:
    """Zero weights and inputs that never fire may be exchanged for each other: which one is not promised."""
    problem = degenerate(n, m, start, 60)
    problem.gram_II[9] = 0
    problem.gram_II[:, 9] = 0
    problem.w_OI[:10, ::3] = 0
    problem.w_OI[10] = 0
    problem.kept_OI = problem.kept_OI * (problem.w_OI != 0)
    after, keep, _ = problem.run()
    want = [problem.scalar(naive, row)[2][-1] for row in range(len(problem.w_OI))]
    assert problem.losses(after).tolist() == pytest.approx(want, rel=1e-9, abs=1e-12)
    assert torch.equal(keep.sum(1), problem.keep_OI.sum(1))


@groups()
@pytest.mark.parametrize("limit", [0, 1, 2])
def test_a_limit_stops_each_row(n: int, m: int, limit: int, naive: ModuleType) -> None:
    problem = degenerate(n, m, "random", 40)
    _, keep, counts = problem.run(limit)
    want = [problem.scalar(naive, row, limit) for row in range(len(problem.w_OI))]
    assert torch.equal(keep, torch.tensor([kept for _, kept, _ in want]))
    assert counts.tolist() == [len(losses) - 1 for _, _, losses in want]


def test_groups_see_swaps_in_blocks_before_them(naive: ModuleType) -> None:
    """Wider than the blocks between two products: 64 inputs."""
    w, keep_by, mixing = (normal(*shape, seed=i) for i, shape in enumerate([(6, 144), (6, 144), (200, 144)]))
    gram, keep = mixing.T @ mixing / 200, pattern("2:4").keep(keep_by)
    _, mask, _ = swap_in_groups(w, w * keep, keep, gram, 4, limit=2)
    want = [naive.swap_row_in_groups(w[r], w[r] * keep[r], keep[r].tolist(), gram, 4, 2)[1] for r in range(6)]
    assert torch.equal(mask, torch.tensor(want))


def test_rows_are_worked_on_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = Problem()
    whole = problem.run()
    monkeypatch.setattr("compress.passes.pruning.swaps.AT_ONCE", 3 * WIDTH)
    parts = problem.run()
    assert all(torch.equal(a, b) for a, b in zip(parts, whole, strict=True))


# -- promises --------------------------------------------------------------------------------------


@pytest.mark.slow
@groups()
@given(seed=st.integers(0, 10_000), start=st.sampled_from(["pruned", "random", "compensated", "scaled"]))
def test_the_loss_never_rises(n: int, m: int, seed: int, start: str) -> None:
    problem = Problem(rows=6, n=n, m=m, seed=seed, start=start)
    losses = torch.stack([problem.losses(problem.run(limit)[0]) for limit in range(5)])
    assert bool((losses[1:] <= losses[:-1] * (1 + 1e-9)).all())


@pytest.mark.parametrize("shortlist", [1, 2, 4])
@every_start
def test_a_small_shortlist_never_raises_the_loss_either(shortlist: int, start: str) -> None:
    problem = Problem(start=start)
    losses = torch.stack([problem.losses(problem.run(limit, shortlist)[0]) for limit in range(6)])
    assert bool((losses[1:] <= losses[:-1] * (1 + 1e-9)).all())
    assert float(losses[-1].sum()) < float(losses[0].sum())


@groups()
@every_start
def test_no_single_exchange_helps_at_the_end(n: int, m: int, start: str, naive: ModuleType) -> None:
    problem = Problem(n=n, m=m, start=start)
    after, keep, _ = problem.run()
    losses = problem.losses(after)
    better = [
        found[0] < losses[row] * (1 - 1e-6)
        for row in range(len(after))
        for first in range(0, WIDTH, m or WIDTH)
        if (
            found := naive.best_pair(
                problem.w_OI[row], after[row], keep[row].tolist(), problem.gram_II, range(first, first + (m or WIDTH))
            )
        )
    ]
    assert len(better) == len(after) * (WIDTH // m if m else 1)
    assert not any(better)


def test_the_loss_lies_between_the_start_and_the_best_of_all_masks(naive: ModuleType) -> None:
    problem = Problem()
    after = problem.losses(problem.run()[0])
    lowest = [naive.best_mask_row(w, problem.gram_II, WIDTH // 2)[1] for w in problem.w_OI]
    best = torch.tensor(lowest, dtype=torch.float64)
    before = problem.losses(problem.kept_OI)
    assert bool((after <= before).all())
    assert bool((after >= best * (1 - 1e-9)).all())
    assert float((after <= best * (1 + 1e-9)).double().mean()) > 0.5  # most rows reach it
    assert float((after - best).sum()) < float((before - after).sum())  # and together more than half of the way


def test_huge_tokens_do_not_hide_what_undoes_a_swap_from_a_shortlist() -> None:
    """One token in 512 is 5,000 times as loud; with pairs of two shortlists alone 4.8 times the loss was left."""
    rows, width = 64, 256
    x = normal(2048, width, seed=1) @ (torch.eye(width) + normal(width, width, seed=2) / width**0.5)
    x[::512] *= 5000
    w, gram = normal(rows, width, seed=3), x.T @ x / len(x)
    keep = pattern(0.5).keep(w.abs() * gram.diagonal().sqrt())
    losses = []
    for shortlist in (8, width):
        missing = w - swap(w, w * keep, keep, gram, 2000, shortlist)[0]
        losses.append(float((missing @ gram * missing).sum()))
    assert losses[0] < 1.6 * losses[1]


def test_a_pair_of_which_one_is_listed_is_found_at_the_end() -> None:
    problem = Problem(rows=200)
    after_OI, keep_OI, _ = problem.run(shortlist=1)
    missing_OI = problem.w_OI - after_OI
    c_OI, diagonal_I = missing_OI @ problem.gram_II, problem.gram_II.diagonal()
    up_OI = (problem.w_OI**2 * diagonal_I - 2 * problem.w_OI * c_OI).masked_fill(keep_OI, torch.inf)
    down_OI = (after_OI**2 * diagonal_I + 2 * after_OI * c_OI).masked_fill(~keep_OI, torch.inf)
    cross_OII = 2 * problem.gram_II * problem.w_OI[:, :, None] * after_OI[:, None, :]
    gain_OII = up_OI[:, :, None] + down_OI[:, None, :] - cross_OII
    rows = torch.arange(200)
    least = torch.minimum(gain_OII[rows, up_OI.argmin(1)].amin(1), gain_OII[rows, :, down_OI.argmin(1)].amin(1))
    assert (least > -1e-6 * problem.losses(after_OI)).all()


@groups()
@every_start
@pytest.mark.parametrize("limit", [1, 2, 100])
def test_counts_stay(n: int, m: int, start: str, limit: int) -> None:
    problem = Problem(n=n, m=m, start=start)
    _, keep, _ = problem.run(limit)
    size = m or WIDTH
    assert torch.equal(keep.unflatten(1, (-1, size)).sum(2), problem.keep_OI.unflatten(1, (-1, size)).sum(2))


@groups()
@every_start
def test_kept_values_stay_and_restored_ones_are_the_original(n: int, m: int, start: str) -> None:
    problem = Problem(n=n, m=m, start=start)
    after, keep, counts = problem.run()
    stayed, values = keep & problem.keep_OI, torch.stack((problem.w_OI, problem.kept_OI))
    assert bool(((after == values[0]) | (after == values[1]))[keep].all())
    assert bool((after == 0)[~keep].all())
    assert torch.equal(after[keep & ~problem.keep_OI], problem.w_OI[keep & ~problem.keep_OI])
    assert int(stayed.sum()) < int(keep.sum())
    assert int(counts.sum()) > 0


@groups()
def test_the_start_is_not_changed_in_place(n: int, m: int) -> None:
    problem, same = (Problem(n=n, m=m, start="random") for _ in range(2))
    problem.run()
    assert torch.equal(problem.kept_OI, same.kept_OI)
    assert torch.equal(problem.keep_OI, same.keep_OI)
    assert torch.equal(problem.gram_II, same.gram_II)


# -- symmetries ------------------------------------------------------------------------------------


@groups()
def test_rows_are_independent(n: int, m: int) -> None:
    problem = Problem(n=n, m=m)
    _, whole, _ = problem.run()
    problem.w_OI, problem.kept_OI, problem.keep_OI = (
        t[5:11] for t in (problem.w_OI, problem.kept_OI, problem.keep_OI)
    )  # fmt: skip
    assert torch.equal(problem.run()[1], whole[5:11])


def test_permuted_columns_give_a_permuted_mask() -> None:
    problem, order = Problem(), torch.arange(WIDTH).flip(0)
    _, plain, _ = problem.run()
    problem.w_OI, problem.kept_OI, problem.keep_OI = (
        t[:, order] for t in (problem.w_OI, problem.kept_OI, problem.keep_OI)
    )  # fmt: skip
    problem.gram_II = problem.gram_II[order][:, order]
    assert torch.equal(problem.run()[1], plain[:, order])


@groups()
def test_scale_moves_between_weight_and_input(n: int, m: int) -> None:
    problem, shift = Problem(n=n, m=m, start="random"), 2.0 ** torch.arange(WIDTH).remainder(5)
    after, plain, _ = problem.run()
    problem.w_OI, problem.kept_OI = problem.w_OI / shift, problem.kept_OI / shift
    problem.gram_II = problem.gram_II * shift * shift[:, None]
    moved, mask, _ = problem.run()
    assert torch.equal(mask, plain)
    assert torch.equal(moved * shift, after)


@groups()
def test_scales_change_nothing(n: int, m: int) -> None:
    problem = Problem(n=n, m=m, start="random")
    after, plain, _ = problem.run()
    problem.w_OI, problem.kept_OI, problem.gram_II = problem.w_OI * 4, problem.kept_OI * 4, problem.gram_II / 8
    moved, mask, _ = problem.run()
    assert torch.equal(mask, plain)
    assert torch.equal(moved, after * 4)


# -- the pass --------------------------------------------------------------------------------------


def tokens(width: int) -> Tensor:
    mixing = torch.eye(width) + normal(width, width, seed=2) / width**0.5
    return (normal(200, width, seed=1) @ mixing * normal(width, seed=3).exp()).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("first", [Wanda, SparseGPT], ids=["wanda", "sparsegpt"])
@pytest.mark.parametrize("sparsity", [0.5, 0.29, "2:4", "1:4"])
def test_every_row_of_a_pruned_site_loses_less_or_as_much(
    sparsity: float | str, first: type[Wanda | SparseGPT], dtype: torch.dtype, site_of: SiteMaker, naive: ModuleType
) -> None:
    site = site_of(normal(33, 48).to(dtype), tokens(48).to(dtype))
    site.weight = first(sparsity=sparsity).rewrite(site)
    result = Swaps().rewrite(site)
    assert isinstance(result, Masked)
    w, gram = site.original.data, site.stats[Gram]
    losses = [[naive.row_loss(w[r], now.dense()[r], gram) for r in range(33)] for now in (site.weight, result)]
    assert all(after <= before * (1 + 1e-6) for before, after in zip(*losses, strict=True))
    assert sum(losses[1]) < sum(losses[0])
    assert torch.equal(result.mask_OI.sum(1), site.weight.mask_OI.sum(1))
    assert result.dense().dtype == dtype
    assert result.pattern == site.weight.pattern
    assert site.ledger["swaps"] > 0


def test_groups_stay_n_of_m_through_the_pass(site_of: SiteMaker) -> None:
    site = site_of(normal(33, 48).float(), tokens(48))
    site.weight = Wanda(sparsity="1:4").rewrite(site)
    result = Swaps().rewrite(site)
    assert isinstance(result, Masked)
    assert result.mask_OI.unflatten(1, (-1, 4)).sum(2).unique().tolist() == [1]


def test_blocks_are_refused(site_of: SiteMaker) -> None:
    site = site_of(normal(33, 48).float(), tokens(48))
    site.weight = Wanda(scope="3x4").rewrite(site)
    with pytest.raises(UnsupportedWeight, match=r"swaps moves single weights; blocks\.0\.proj is pruned in blocks"):
        Swaps().rewrite(site)


def test_a_dense_weight_is_refused(site_of: SiteMaker) -> None:
    with pytest.raises(UnsupportedWeight, match=r"swaps needs unquantized values under a mask"):
        Swaps().rewrite(site_of(normal(33, 48).float(), tokens(48)))


def test_an_expert_without_tokens_is_left_as_it_was(site_of: SiteMaker) -> None:
    site = site_of(normal(33, 48).float())
    site.weight = Masked(Dense(site.original.data), site.original.data > 0, "50%")
    assert Swaps().rewrite_unfed(site) is site.weight


def test_an_empty_shortlist_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"swaps\.shortlist"):
        Swaps(shortlist=0)
