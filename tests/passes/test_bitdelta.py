"""BitDelta: signs with the scales of least error, in the weights or in the output."""

from __future__ import annotations

from collections.abc import Callable
from math import pi
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress import (
    RTN,
    Dense,
    Hadamard,
    Magnitude,
    Masked,
    Product,
    Recipe,
    RecipeError,
    Signs,
    Sum,
    Weight,
    pattern,
)
from compress.passes import BitDelta, FineTune, Repair
from compress.plan import check_order
from compress.stats import Gram

SiteMaker = Callable[..., Any]
ROUNDED = 2.0**-8  # relative, of a scale in bfloat16


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def lost(weight: Weight, w_OI: Tensor, gram_II: Tensor | None = None) -> float:
    """The relative squared error, of the output if a Gram is given."""
    change, whole = weight.dense().double() - w_OI, w_OI.double()
    if gram_II is None:
        return float(change.square().sum() / whole.square().sum())
    gram = gram_II.double()
    return float(((change @ gram) * change).sum() / ((whole @ gram) * whole).sum())


def tokens(inputs: int, seed: int = 1) -> Tensor:
    """Correlated, of channels of different loudness."""
    mixing = torch.eye(inputs) + 2 * normal(inputs, inputs, seed=seed) / inputs**0.5
    return normal(4 * inputs, inputs, seed=seed + 1) @ mixing * normal(inputs, seed=seed + 2).exp()


# -- scales by the weights -------------------------------------------------------------------------


def test_one_scale_is_the_mean_size(site_of: SiteMaker) -> None:
    w_OI = normal(33, 65)
    weight = BitDelta(scale="matrix", fit="mean").rewrite(site_of(w_OI))
    assert isinstance(weight, Signs)
    assert weight.scale.shape == (1, 1)
    assert float(weight.scale) == pytest.approx(float(w_OI.abs().mean()), rel=ROUNDED)
    assert torch.equal(weight.positive, w_OI > 0)


def test_a_scale_a_row_is_the_mean_size_of_the_row(site_of: SiteMaker) -> None:
    w_OI = normal(33, 65) * normal(33, 1, seed=1).exp()
    weight = BitDelta(fit="mean").rewrite(site_of(w_OI))
    torch.testing.assert_close(weight.scale.float(), w_OI.abs().mean(1, keepdim=True), rtol=ROUNDED, atol=0)


def test_normal_weights_lose_what_the_closed_form_says(site_of: SiteMaker) -> None:
    """E (|w| - E|w|)^2 = 1 - 2/pi; half a percent is three standard deviations of a million entries."""
    w_OI = normal(256, 4096)
    for scale in ("matrix", "row"):
        assert lost(BitDelta(fit="mean", scale=scale).rewrite(site_of(w_OI)), w_OI) == pytest.approx(
            1 - 2 / pi, rel=5e-3
        )


def test_scales_of_rows_save_what_the_specification_says(site_of: SiteMaker) -> None:
    """Rows of log-normal size, sigma 0.5: the error falls from 1 - 2/pi exp(-sigma^2) = 0.504 to 1 - 2/pi."""
    w_OI = normal(2048, 512) * (0.5 * normal(2048, 1, seed=1)).exp()
    matrix, row = (BitDelta(fit="mean", scale=scale).rewrite(site_of(w_OI)) for scale in ("matrix", "row"))
    assert lost(matrix, w_OI) == pytest.approx(0.504, abs=0.015)
    assert lost(row, w_OI) == pytest.approx(0.363, abs=0.005)


def recursion(w_OI: Tensor, levels: int) -> Tensor:
    """Each level the mean size of what the levels before left, as the specification has it."""
    made = torch.zeros_like(w_OI)
    for _ in range(levels):
        left = w_OI - made
        made = made + left.abs().mean(1, keepdim=True) * torch.where(left >= 0, 1.0, -1.0)
    return made


@pytest.mark.parametrize(("levels", "golden"), [(1, 0.363), (2, 0.131), (3, 0.0586), (4, 0.0331)])
def test_each_level_loses_less_and_no_more_than_the_recursion(levels: int, golden: float, site_of: SiteMaker) -> None:
    w_OI = normal(256, 4096)
    weight = BitDelta(fit="mean", levels=levels).rewrite(site_of(w_OI))
    naive = lost(Dense(recursion(w_OI, levels)), w_OI)
    assert naive == pytest.approx(golden, rel=0.01)
    assert lost(weight, w_OI) <= naive * (1 + 1e-3)
    assert lost(weight, w_OI) > 0.8 * naive  # only the scales are other ones
    assert weight.nbytes() == levels * (256 * 4096 // 8 + 2 * 256)


def test_levels_are_signs_of_what_is_left(site_of: SiteMaker) -> None:
    w_OI = normal(16, 64)
    weight = BitDelta(fit="mean", levels=2).rewrite(site_of(w_OI))
    assert isinstance(weight, Sum)
    first, second = weight.terms
    assert torch.equal(first.positive, w_OI > 0)
    assert torch.equal(second.positive, w_OI - recursion(w_OI, 1) >= 0)


def test_zero_counts_as_positive(site_of: SiteMaker) -> None:
    w_OI = torch.tensor([[0.0, -0.0, 1.0, -1.0]])
    assert BitDelta(fit="mean").rewrite(site_of(w_OI)).positive.tolist() == [[True, True, True, False]]


# -- scales by the output --------------------------------------------------------------------------


def test_scales_are_the_closed_form(site_of: SiteMaker) -> None:
    w_OI, x_TI = normal(12, 20), tokens(20)
    site = site_of(w_OI, x_TI)
    gram, d, s = site.stats[Gram].double(), w_OI.double(), torch.where(w_OI >= 0, 1.0, -1.0).double()
    rows = [float(d[o] @ gram @ s[o] / (s[o] @ gram @ s[o])) for o in range(12)]
    whole = float(torch.trace(d @ gram @ s.T) / torch.trace(s @ gram @ s.T))
    assert BitDelta().rewrite(site).scale[:, 0].tolist() == pytest.approx(rows, rel=ROUNDED)
    assert float(BitDelta(scale="matrix").rewrite(site).scale) == pytest.approx(whole, rel=ROUNDED)


def test_scales_of_several_levels_are_a_regression_on_the_outputs(site_of: SiteMaker) -> None:
    w_OI, x_TI = normal(6, 20), tokens(20)
    terms = BitDelta(levels=3).rewrite(site_of(w_OI, x_TI)).terms
    x = x_TI.double()
    for o in range(6):
        outputs = torch.stack([x @ torch.where(t.positive[o], 1.0, -1.0).double() for t in terms], 1)
        want = torch.linalg.lstsq(outputs, x @ w_OI[o].double()).solution
        assert [float(t.scale[o]) for t in terms] == pytest.approx(want.tolist(), rel=ROUNDED, abs=1e-3)


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["matrix", "row"]))
def test_by_the_output_never_loses_more_output(seed: int, levels: int, scale: str) -> None:
    """Scales rounded to bfloat16 cost 2^-16 of the energy at most, twice."""
    w_OI, x_TI = normal(9, 24, seed=seed), tokens(24, seed=seed)
    gram = x_TI.T @ x_TI / len(x_TI)
    by = [BitDelta(levels=levels, scale=scale).signs(w_OI, None, given) for given in (None, gram)]
    assert lost(by[1], w_OI, gram) <= lost(by[0], w_OI, gram) * 1.001 + 2 * levels * 2.0**-14


def test_by_the_output_gains_where_inputs_are_correlated(site_of: SiteMaker) -> None:
    w_OI, x_TI = normal(64, 128), tokens(128)
    site = site_of(w_OI, x_TI)
    mean, output = (lost(BitDelta(fit=fit).rewrite(site), w_OI, site.stats[Gram]) for fit in ("mean", "output"))
    assert output < 0.95 * mean


def test_inputs_that_are_alike_give_the_mean(site_of: SiteMaker) -> None:
    w_OI = normal(8, 16)
    site = site_of(w_OI, gram_II=3 * torch.eye(16))
    for levels in (1, 3):
        mean, output = (BitDelta(levels=levels, fit=fit).rewrite(site).dense() for fit in ("mean", "output"))
        torch.testing.assert_close(output, mean, rtol=2 * ROUNDED, atol=1e-5)


@pytest.mark.parametrize("levels", [1, 2])
def test_an_input_that_never_fires_is_scaled_by_the_weights(levels: int, site_of: SiteMaker) -> None:
    site = site_of(normal(8, 16), gram_II=torch.zeros(16, 16))
    mean, output = (BitDelta(levels=levels, fit=fit).rewrite(site).dense() for fit in ("mean", "output"))
    assert torch.equal(mean, output)


@pytest.mark.parametrize("levels", [1, 4])
@pytest.mark.parametrize("fit", ["mean", "output"])
def test_a_row_of_zeros_stays_zero(levels: int, fit: str, site_of: SiteMaker) -> None:
    w_OI = normal(8, 16)
    w_OI[3] = 0
    weight = BitDelta(levels=levels, fit=fit).rewrite(site_of(w_OI, tokens(16)))
    assert weight.dense()[3].tolist() == [0] * 16
    assert bool(weight.dense().isfinite().all())


def test_small_differences_keep_their_scale(site_of: SiteMaker) -> None:
    w_OI = 1e-7 * normal(8, 64)
    assert lost(BitDelta(fit="mean").rewrite(site_of(w_OI)), w_OI) == pytest.approx(1 - 2 / pi, abs=0.05)


def test_an_expert_without_tokens_is_scaled_by_its_weights(site_of: SiteMaker) -> None:
    site = site_of(normal(8, 16))
    assert torch.equal(BitDelta().rewrite_unfed(site).dense(), BitDelta(fit="mean").rewrite(site).dense())
    assert BitDelta(fit="mean").requires == ()
    assert BitDelta().requires == (Gram,)


# -- beside other passes ---------------------------------------------------------------------------


def test_under_a_mask_only_what_is_kept_counts(site_of: SiteMaker) -> None:
    w_OI = normal(16, 64)
    site = site_of(w_OI)
    site.weight = Magnitude(sparsity=0.9, scope="row").rewrite(site)
    mask_OI = site.weight.mask_OI
    weight = BitDelta(fit="mean").rewrite(site)
    assert isinstance(weight, Masked)
    want = (w_OI.abs() * mask_OI).sum(1) / mask_OI.sum(1)
    torch.testing.assert_close(weight.values.scale[:, 0].float(), want, rtol=ROUNDED, atol=0)
    assert int(weight.dense()[~mask_OI].count_nonzero()) == 0


def test_a_mask_counts_in_the_output_too(site_of: SiteMaker) -> None:
    w_OI, x_TI = normal(16, 64), tokens(64)
    site = site_of(w_OI, x_TI)
    mask_OI = pattern("2:4").keep(w_OI.abs())
    site.weight = Masked(Dense(w_OI), mask_OI, "2:4")
    cut_OI = w_OI.masked_fill(~mask_OI, 0)
    by = [BitDelta(fit=fit).rewrite(site) for fit in ("mean", "output")]
    assert lost(by[1], cut_OI, site.stats[Gram]) < lost(by[0], cut_OI, site.stats[Gram])


def test_a_rotated_weight_is_scaled_behind_its_rotation(site_of: SiteMaker) -> None:
    rotation = Hadamard(normal(64) > 0)
    w_OI = normal(16, 64)
    site = site_of(w_OI, tokens(64))
    site.weight = Product(Dense(rotation.linear(w_OI)), rotation)
    by = [BitDelta(fit=fit).rewrite(site) for fit in ("mean", "output")]
    assert lost(by[1], w_OI, site.stats[Gram]) < lost(by[0], w_OI, site.stats[Gram])
    assert lost(by[0], w_OI) < 0.4


def test_what_may_follow() -> None:
    check_order(["a"], Recipe(passes=(BitDelta(), Repair(), FineTune(steps=1))).passes)
    with pytest.raises(RecipeError, match=r"passes\[1\]\.rtn: takes .* a is signed by then"):
        check_order(["a"], Recipe(passes=(BitDelta(), RTN())).passes)


@pytest.mark.parametrize("options", [{"levels": 0}, {"levels": 5}, {"scale": "column"}, {"fit": "best"}], ids=str)
def test_options_out_of_range_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="bitdelta"):
        BitDelta(**options)
