"""Patterns keep exact counts, nest, break ties from the left, and refuse invalid values."""

from __future__ import annotations

from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress.errors import CalibrationError, RecipeError
from compress.weights import NM, Blocks, PerMatrix, PerRow, pattern
from compress.weights.pattern import drop_count, keep_highest, keep_of_few

SIZES = (1, 2, 3, 7, 16, 97, 100, 101, 4096, 4097)
SPARSITIES = ("0", "0.01", "0.1", "0.25", "0.29", "0.5", "0.57", "0.999", "1")


def score(*shape: int, seed: int = 0) -> Tensor:
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("size", SIZES)
def test_the_dropped_count_is_exact_in_decimal(size: int, sparsity: str, naive: ModuleType) -> None:
    assert drop_count(size, float(sparsity)) == naive.dropped(size, sparsity)


def test_29_percent_of_100_is_29_not_28() -> None:
    assert int(100 * 0.29) == 28  # what binary arithmetic says
    assert drop_count(100, 0.29) == 29


@pytest.mark.parametrize(("size", "dropped"), [(1, 0), (3, 2), (5, 2), (7, 4)])
def test_halves_round_to_even(size: int, dropped: int) -> None:
    assert drop_count(size, 0.5) == dropped


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("columns", SIZES)
def test_every_row_keeps_the_same_exact_count(columns: int, sparsity: str, naive: ModuleType) -> None:
    kept = PerRow(sparsity=float(sparsity)).keep(score(3, columns))
    assert kept.sum(1).tolist() == [columns - naive.dropped(columns, sparsity)] * 3


@pytest.mark.parametrize("sparsity", SPARSITIES)
@pytest.mark.parametrize("columns", SIZES)
def test_a_matrix_keeps_an_exact_count(columns: int, sparsity: str, naive: ModuleType) -> None:
    kept = PerMatrix(sparsity=float(sparsity)).keep(score(3, columns))
    assert int(kept.sum()) == 3 * columns - naive.dropped(3 * columns, sparsity)


@pytest.mark.parametrize(("n", "m"), [(1, 4), (2, 4), (3, 4), (2, 8), (5, 8), (1, 2), (4, 8), (7, 16)])
def test_n_of_m_keeps_exactly_n_of_every_group(n: int, m: int) -> None:
    kept = NM(n=n, m=m).keep(score(7, 3 * m))
    assert kept.unflatten(1, (-1, m)).sum(2).unique().tolist() == [n]


@pytest.mark.parametrize("n", [1, 2, 3])
def test_n_of_m_keeps_the_highest_of_each_group(n: int) -> None:
    scores = score(5, 12)
    kept = NM(n=n, m=4).keep(scores).unflatten(1, (-1, 4))
    groups = scores.unflatten(1, (-1, 4))
    lowest_kept = groups.masked_fill(~kept, 2).amin(2)
    highest_dropped = groups.masked_fill(kept, -1).amax(2)
    assert bool((lowest_kept > highest_dropped).all())


@pytest.mark.parametrize(("rows", "columns"), [(2, 4), (4, 2), (1, 8), (8, 1)])
def test_blocks_go_as_a_whole_by_their_sum(rows: int, columns: int) -> None:
    scores = score(8, 16)
    kept = Blocks(rows=rows, columns=columns, sparsity=0.5).keep(scores)
    tiles = kept.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum((1, 3))
    sums = scores.unflatten(1, (-1, columns)).unflatten(0, (-1, rows)).sum((1, 3))
    assert sorted(tiles.unique().tolist()) == [0, rows * columns]
    assert int((tiles > 0).sum()) == 64 // (rows * columns)
    assert float(sums[tiles > 0].min()) > float(sums[tiles == 0].max())


# -- which entries ---------------------------------------------------------------------------------


@given(values=st.lists(st.integers(0, 4), min_size=1, max_size=40), data=st.data())
def test_selection_is_by_stable_rank(values: list[int], data: st.DataObject, naive: ModuleType) -> None:
    drop = data.draw(st.integers(0, len(values)))
    kept = keep_highest(torch.tensor([values], dtype=torch.float32), drop)
    assert kept[0].tolist() == naive.drop_lowest(list(map(float, values)), drop)


@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.75])
def test_of_equal_scores_the_lower_index_goes_first(sparsity: float) -> None:
    kept = PerRow(sparsity=sparsity).keep(torch.ones(2, 8))
    assert kept[0].tolist() == [i >= 8 * sparsity for i in range(8)]


def test_ties_across_rows_go_in_row_order() -> None:
    assert PerMatrix(sparsity=0.5).keep(torch.ones(2, 3)).tolist() == [[False] * 3, [True] * 3]


@pytest.mark.parametrize("scope", ["row", "matrix", "2x4"])
@pytest.mark.parametrize("levels", [3, 1000], ids=["ties", "distinct"])
def test_masks_nest_as_sparsity_grows(scope: str, levels: int) -> None:
    scores = (score(6, 16) * levels).floor()
    masks = [pattern(step / 20, scope).keep(scores) for step in range(21)]
    assert all(bool((denser | ~sparser).all()) for denser, sparser in pairwise(masks))


@pytest.mark.parametrize("scope", ["row", "matrix", "2x4"])
def test_zero_sparsity_keeps_all_and_one_keeps_none(scope: str) -> None:
    assert bool(pattern(0.0, scope).keep(score(6, 16)).all())
    assert not bool(pattern(1.0, scope).keep(score(6, 16)).any())


def test_infinite_scores_rank_like_numbers() -> None:
    scores = torch.tensor([[float("inf"), -float("inf"), 0.0, 1.0]])
    assert PerRow(sparsity=0.5).keep(scores).tolist() == [[True, False, False, True]]


@pytest.mark.parametrize("chosen", [PerRow(sparsity=0.5), PerMatrix(sparsity=0.0), NM(n=2, m=4)], ids=lambda p: p.name)
def test_a_nan_score_raises(chosen: PerRow) -> None:
    scores = score(2, 8)
    scores[1, 3] = float("nan")
    with pytest.raises(CalibrationError, match="a pruning score is NaN"):
        chosen.keep(scores)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_scores_of_any_float_dtype_are_ranked(dtype: torch.dtype) -> None:
    scores = torch.arange(8).flip(0).to(dtype)[None]
    assert PerRow(sparsity=0.5).keep(scores).tolist() == [[True] * 4 + [False] * 4]


# -- names and refusals ----------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "name"), [("2:4", "2:4"), ("5:8", "5:8")])
def test_a_pattern_of_groups_is_named_as_it_is_said(text: str, name: str) -> None:
    assert pattern(text).name == name


@pytest.mark.parametrize(
    ("sparsity", "scope", "name"),
    [
        (0.125, "row", "12.5%"), (0.5, "row", "50%"), (0.29, "matrix", "29%m"), (0.5, "16x8", "50%b16x8"),
        (1, "row", "100%"), (0, "row", "0%"),
    ],
)  # fmt: skip
def test_a_fraction_is_named_as_briefly_as_it_is_said(sparsity: float, scope: str, name: str) -> None:
    assert pattern(sparsity, scope).name == name


@pytest.mark.parametrize("text", ["4:2", "0:4", "4:4", "2:128", "2:", "two:four", "0.5", "2:4:8", "", " 2:4", "-2:4"])
def test_a_meaningless_pattern_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match=r"is not a pattern; allowed: a fraction such as 0\.5, or n:m"):
        pattern(text)


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan"), float("inf"), 50])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(RecipeError, match=r"is out of range; allowed: 0 to 1, or n:m"):
        pattern(fraction)


@pytest.mark.parametrize("scope", ["column", "", "16", "16x", "0x4", "4x0", "x"])
def test_an_unknown_scope_is_refused(scope: str) -> None:
    with pytest.raises(RecipeError, match=r"is unknown; allowed: row, matrix, or a block such as 16x16"):
        pattern(0.5, scope)


def test_an_unknown_scope_is_refused_with_n_of_m() -> None:
    with pytest.raises(RecipeError):
        pattern("2:4", "colunm")


@pytest.mark.parametrize(
    ("sparsity", "scope", "reason"),
    [
        ("2:4", "row", "2:4 needs a width divisible by 4, got 30"),
        (0.5, "16x10", "blocks of 16x10 do not tile a matrix of 33x30"),
        (0.5, "11x4", "blocks of 11x4 do not tile a matrix of 33x30"),
    ],
)
def test_a_pattern_says_which_shape_it_cannot_follow(sparsity: float | str, scope: str, reason: str) -> None:
    assert pattern(sparsity, scope).check((33, 30)) == reason


@pytest.mark.parametrize(("sparsity", "scope"), [("2:4", "row"), (0.5, "row"), (0.5, "matrix"), (0.5, "11x4")])
def test_a_pattern_accepts_a_shape_it_fits(sparsity: float | str, scope: str) -> None:
    assert pattern(sparsity, scope).check((33, 36)) is None


@pytest.mark.parametrize("m", [1, 2, 4, 5, 8])
def test_few_entries_compared_in_pairs_keep_what_sorting_keeps(m: int) -> None:
    """Also where scores are equal, which a coarse grid of them makes frequent."""
    score_MG = torch.randint(4, (m, 300), generator=torch.Generator().manual_seed(m)).float()
    for drop in range(m + 1):
        assert torch.equal(keep_of_few(score_MG, drop), keep_highest(score_MG.T.contiguous(), drop).T)


def test_a_nan_among_few_is_refused() -> None:
    score_MG = torch.ones(4, 300)
    score_MG[2, 170] = torch.nan
    with pytest.raises(CalibrationError, match="NaN"):
        keep_of_few(score_MG, 2)
