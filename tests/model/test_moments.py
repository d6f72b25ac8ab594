"""Moments: the same result for any split of the windows, exact despite a large mean, and separate by window."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress import CalibrationError
from compress.stats import Collector, ColumnNorm, Gram, Moments

Close = Callable[[str, Tensor, Tensor, float], None]
INPUTS = 5
# sums of float32 over a window of at most 40 tokens: sqrt(40) eps / 2
RATIO = 5e-7


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def collected(batches: Sequence[Tensor]) -> Tensor:
    collector = Collector((Moments,), INPUTS, torch.device("cpu"))
    for batch in batches:
        collector.update(batch)
    return collector.finish("here")[Moments]


def windows(count: int = 8, length: int = 40) -> Tensor:
    """Windows [count, length, inputs] of different means."""
    return normal(count, length, INPUTS) * normal(INPUTS, seed=1).exp() + normal(count, 1, INPUTS, seed=2)


def test_they_are_those_of_two_passes(naive: ModuleType, assert_close: Close) -> None:
    x = windows()
    got, want = collected([x]), naive.moments(list(x))
    assert_close("mean", got[0], want[0], RATIO)
    assert_close("variance", got[1], want[1], RATIO)
    assert_close("variance within windows", got[2], want[2], RATIO)


@given(cuts=st.lists(st.integers(1, 7), max_size=4))
def test_any_split_of_the_windows_gives_the_same(cuts: list[int], assert_close: Close) -> None:
    bounds = [0, *sorted(cuts), 8]
    batches = [windows()[a:b] for a, b in pairwise(bounds)]
    assert_close("moments", collected(batches), collected([windows()]), 1e-6)


@given(lengths=st.lists(st.integers(1, 30), min_size=1, max_size=6))
def test_windows_count_by_their_tokens(lengths: list[int], naive: ModuleType, assert_close: Close) -> None:
    ragged = [normal(length, INPUTS, seed=i) + i for i, length in enumerate(lengths)]
    got, want = collected([w[None] for w in ragged]), naive.moments(ragged)
    assert_close("moments", got, want, 1e-6)


def test_the_order_of_windows_does_not_matter(assert_close: Close) -> None:
    assert_close("moments", collected([windows().flip(0)]), collected([windows()]), 1e-6)


def test_data_given_twice_changes_nothing(assert_close: Close) -> None:
    assert_close("moments", collected([windows(), windows()]), collected([windows()]), 1e-6)


def test_leading_dimensions_of_any_number_are_windows() -> None:
    assert torch.equal(collected([windows().unflatten(0, (2, 4))]), collected([windows()]))


def test_a_single_window_may_come_without_a_batch() -> None:
    """What an expert is given: the tokens [T, in] that were sent to it."""
    assert torch.equal(collected([windows()[0]]), collected([windows()[:1]]))


def test_a_mean_far_larger_than_the_spread_does_no_harm(naive: ModuleType, assert_close: Close) -> None:
    """Mean of squares less squared mean would leave nothing of the variance: 1e8 in float32 has steps of 8."""
    x = (windows(count=40) * 2**-4).round(decimals=3) + 1e4
    got, want = collected([x]), naive.moments(list(x))
    assert_close("mean", got[0], want[0], RATIO)
    # of a window's float32 mean the error is up to 1e4 eps / 2 = 6e-4, its square is what a variance of 4e-3 gains
    assert_close("variance", got[1], want[1], 1e-2)
    assert_close("variance within windows", got[2], want[2], 1e-2)
    assert bool((collected([x])[1:] > 0).all())


def test_the_variance_within_windows_leaves_out_that_of_their_means(assert_close: Close) -> None:
    x = windows()
    between = x.double().mean(1).var(0, correction=0)
    got = collected([x])
    assert bool((got[2] < got[1]).all())
    assert_close("between", got[1].double() - got[2], between, 1e-5)


def test_of_one_window_both_variances_are_one() -> None:
    got = collected([windows(count=1)])
    assert torch.equal(got[1], got[2])


def test_windows_of_one_token_do_not_vary_within(assert_close: Close) -> None:
    got = collected([windows(length=1)])
    assert torch.equal(got[2], torch.zeros(INPUTS))
    assert bool((got[1] > 0).all())


def test_an_input_that_does_not_change_has_no_variance() -> None:
    x = windows()
    x[..., 3] = 0.5
    got = collected([x])
    assert got[:, 3].tolist() == [0.5, 0.0, 0.0]


def test_without_tokens_all_is_zero() -> None:
    assert torch.equal(collected([]), torch.zeros(3, INPUTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_low_precision_is_widened_before_squaring(dtype: torch.dtype, naive: ModuleType, assert_close: Close) -> None:
    x = (windows() * 300).to(dtype)  # squares beyond 65504, the largest float16
    assert_close("moments", collected([x]), naive.moments(list(x.float())), 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_not_finite_is_refused(value: float) -> None:
    x = windows()
    x[3, 4, 2] = value
    with pytest.raises(CalibrationError, match="here: the Moments of its input is not finite"):
        collected([x])


def test_they_are_collected_beside_statistics_that_do_not_know_windows(assert_close: Close) -> None:
    collector = Collector((ColumnNorm, Moments, Gram), INPUTS, torch.device("cpu"))
    collector.update(windows()[:3])
    collector.update(windows()[3:])
    stats = collector.finish("here")
    mean, total, _ = stats[Moments].double()
    assert stats.tokens == 8 * 40
    assert_close("second moment", total + mean.square(), stats[Gram].diagonal(), 1e-5)
    assert_close("norm", (total + mean.square()).mul(8 * 40).sqrt(), stats[ColumnNorm], 1e-5)


def test_the_bytes_are_those_held() -> None:
    part = Moments(INPUTS, torch.device("cpu"))
    assert Moments.nbytes(INPUTS) == sum(t.nbytes for t in (part.mean_I, part.square_I, part.within_I))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0, 7, 5)], ids=str)
def test_a_batch_without_tokens_changes_nothing(shape: tuple[int, ...]) -> None:
    found = Moments(5, torch.device("cpu"))
    found.update(torch.ones(3, 4, 5))
    before = found.value()
    found.update(torch.zeros(shape))
    assert torch.equal(found.value(), before)
