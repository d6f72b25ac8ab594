"""Unbiased scales: the output contains the whole original output, and its error is orthogonal to that."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from compress import Auto, BitDelta, DeltaCoMe, Site, UnsupportedWeight
from compress.passes.unbiased import enlarged, unbiased
from compress.stats import Gram
from compress.weights import Codebook, Dense, Grid, Masked, Product, Signs, Sum, Weight, pattern

OUT, IN = 64, 96


def case() -> tuple[Tensor, Tensor]:
    """A matrix and inputs that depend on each other."""
    g = torch.Generator().manual_seed(0)
    x_TI = torch.randn(512, IN, generator=g) @ (torch.eye(IN) + 0.1 * torch.randn(IN, IN, generator=g))
    return 0.01 * torch.randn(OUT, IN, generator=g), x_TI


def share(weight: Weight, w_OI: Tensor, gram_II: Tensor) -> float:
    """tr(W' G Wᵀ) / tr(W G Wᵀ)."""
    return float(((w_OI @ gram_II) * weight.dense()).sum() / ((w_OI @ gram_II) * w_OI).sum())


@pytest.mark.parametrize(
    "step", [BitDelta(), BitDelta(levels=2), BitDelta(scale="matrix"), DeltaCoMe(), Auto(bits=0.6)]
)
def test_the_output_holds_all_of_the_weights(step: BitDelta | DeltaCoMe | Auto, site_of: Callable[..., Site]) -> None:
    w_OI, x_TI = case()
    sites = {flag: site_of(w_OI, x_TI) for flag in (False, True)}
    made = {flag: type(step)(**{**step.options(), "unbiased": flag}).rewrite(site) for flag, site in sites.items()}
    gram_II = sites[True].stats[Gram]
    assert share(made[False], w_OI, gram_II) < 0.97
    assert share(made[True], w_OI, gram_II) == pytest.approx(1, abs=5e-3)
    assert made[True].nbytes() == made[False].nbytes()


def test_the_error_is_at_right_angles_to_the_weight(site_of: Callable[..., Site]) -> None:
    """Of the nearest matrix it is so to the matrix itself; that is what being too small means."""
    w_OI, x_TI = case()
    site = site_of(w_OI, x_TI)
    gram_II = site.stats[Gram]

    def angle(weight: Weight, to: Tensor) -> float:
        error_OI = weight.dense() - w_OI
        return float(((error_OI @ gram_II) * to).sum() / ((error_OI @ gram_II) * error_OI).sum())

    near, larger = (BitDelta(scale="matrix", unbiased=flag).rewrite(site) for flag in (False, True))
    assert angle(near, near.dense()) == pytest.approx(0, abs=0.02)
    assert angle(near, w_OI) == pytest.approx(-1, abs=0.02)
    assert angle(larger, w_OI) == pytest.approx(0, abs=0.02)


def test_signs_under_a_mask_count_only_where_it_keeps(site_of: Callable[..., Site]) -> None:
    w_OI, x_TI = case()
    mask_OI = pattern(0.7).keep(w_OI.abs())
    site = site_of(w_OI, x_TI)
    site.weight = Masked(Dense(w_OI), mask_OI, "70%")
    kept_OI = w_OI.masked_fill(~mask_OI, 0)
    assert share(BitDelta(unbiased=True).rewrite(site), kept_OI, site.stats[Gram]) == pytest.approx(1, abs=5e-3)


def test_without_a_gram_entries_count() -> None:
    w_OI, _ = case()
    small = Signs(w_OI > 0, torch.full((1, 1), 1e-3))
    assert share(unbiased(small, w_OI, None), w_OI, torch.eye(IN)) == pytest.approx(1, abs=5e-3)


def test_only_scales_change() -> None:
    w_OI, _ = case()
    codes = Grid(bits=3, group=0, symmetric=True).quantize(w_OI)
    for weight in (
        codes,
        Sum((codes, Product(Dense(w_OI[:, :8]), Dense(torch.randn(8, IN))))),
        Masked(codes, w_OI > 0, "some"),
    ):
        larger = enlarged(weight, 1.5)
        assert (larger.dense() - 1.5 * weight.dense()).norm() < 1e-2 * larger.dense().norm()
        assert larger.nbytes() == weight.nbytes()


def test_what_says_next_to_nothing_is_left() -> None:
    w_OI, _ = case()
    for little in (Dense(0.01 * w_OI), Dense(-w_OI), Dense(torch.zeros_like(w_OI))):
        assert unbiased(little, w_OI, None) is little
    assert unbiased(Dense(w_OI), torch.zeros_like(w_OI), None).dense() is w_OI


def test_a_book_has_no_such_scale() -> None:
    book = Codebook(torch.zeros(4, 2, dtype=torch.uint8), torch.randn(4, 2), Dense(torch.ones(1, 1)))
    with pytest.raises(UnsupportedWeight, match="has no scale by which"):
        enlarged(book, 2.0)
