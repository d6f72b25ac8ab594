"""The GPTQ pass: masks, compensation for pruned weights, dead inputs, shared factors, and the recorded fallback."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import GPTQ, RTN, CalibrationError, Dense, Grid, Magnitude, Masked, Quantizer, UnsupportedWeight, pattern
from compress.model.site import Site

SiteMaker = Callable[..., Site]
ORDERS = [{}, {"order": "activation"}, {"static": True}, {"group": 0}, {"group": 0, "order": "activation"},
          {"group": -1}, {"symmetric": True}, {"search": True}, {"bits": 2}, {"bits": 8}]  # fmt: skip


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(width: int = 48) -> Tensor:
    mixing = torch.eye(width) + normal(width, width, seed=2) / width**0.5
    return normal(300, width, seed=1) @ mixing * normal(width, seed=3).exp()


def pruned_site(site_of: SiteMaker, sparsity: float | str = "2:4") -> Site:
    site = site_of(normal(17, 48), tokens())
    site.weight = Magnitude(sparsity=sparsity).rewrite(site)
    return site


@pytest.mark.parametrize("target", ["weight", "original"])
@pytest.mark.parametrize("sparsity", ["2:4", 0.5], ids=["2:4", "50%"])
@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_a_mask_is_respected_exactly(
    options: dict[str, Any], sparsity: float | str, target: str, site_of: SiteMaker
) -> None:
    site = pruned_site(site_of, sparsity)
    mask_OI = site.weight.mask_OI
    site.weight = GPTQ(**{"group": 8, **options, "target": target}).rewrite(site)
    assert torch.equal(site.weight.mask_OI, mask_OI)
    assert int(site.weight.values.dense()[~mask_OI].count_nonzero()) == 0
    assert int(site.module.weight[~mask_OI].count_nonzero()) == 0
    assert int(site.module.weight[mask_OI].count_nonzero()) > 0


@pytest.mark.parametrize("bits", [3, 4, 8])
@pytest.mark.parametrize("order", ["natural", "activation"])
def test_what_a_mask_cut_can_be_compensated(order: str, bits: int, site_of: SiteMaker) -> None:
    errors = {}
    for target in ("weight", "original"):
        site = pruned_site(site_of)
        site.weight = GPTQ(bits=bits, group=8, order=order, target=target).rewrite(site)
        site.measure()
        errors[target] = site.output_error
    assert errors["original"] < errors["weight"]


def test_the_target_makes_no_difference_without_a_mask(site_of: SiteMaker) -> None:
    site = site_of(normal(17, 48), tokens())
    results = [GPTQ(group=8, target=target).rewrite(site).dense() for target in ("weight", "original")]
    assert torch.equal(*results)


@pytest.mark.parametrize("options", ORDERS, ids=str)
def test_error_feedback_beats_rounding(options: dict[str, Any], site_of: SiteMaker, naive: ModuleType) -> None:
    w, x = normal(17, 48), tokens()
    options = {"group": 8, **options}
    plain = {name: value for name, value in options.items() if name not in ("order", "static")}
    feedback = GPTQ(**options).rewrite(site_of(w, x)).dense()
    rounded = RTN(**plain).rewrite(site_of(w, x)).dense()
    assert naive.proxy_loss(w, feedback, x.T @ x) < naive.proxy_loss(w, rounded, x.T @ x)


def test_the_site_reports_the_errors_of_its_definition(site_of: SiteMaker, naive: ModuleType) -> None:
    w, x = normal(17, 48), tokens()
    site = site_of(w, x)
    site.weight = GPTQ(bits=3, group=8).rewrite(site)
    site.measure()
    assert site.weight_error == pytest.approx(naive.relative_mse(w, site.weight.dense()) ** 0.5, rel=1e-5)
    assert site.output_error == pytest.approx(naive.proxy_loss(w, site.weight.dense(), x.T @ x) ** 0.5, rel=1e-4)


# -- dead inputs -----------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ["natural", "activation"])
def test_inputs_that_never_fire_are_rounded_without_feedback(order: str, site_of: SiteMaker) -> None:
    w, x = normal(17, 48), tokens()
    dead = [0, 7, 47]
    x[:, dead] = 0
    site = site_of(w, x)
    rounded = Grid(bits=4).quantize(w)
    result = GPTQ(bits=4, group=0, order=order).rewrite(site)
    assert torch.equal(result.codes[:, dead], rounded.codes[:, dead])
    assert not torch.equal(result.codes, rounded.codes)
    assert site.ledger["dead_inputs"] == 3


def test_a_dead_input_does_not_disturb_the_living(site_of: SiteMaker) -> None:
    w, x = normal(17, 48), tokens()
    w[:, 9] = 0
    alive = [i for i in range(48) if i != 9]
    x[:, 9] = 0
    quieter = GPTQ(group=0, damping=1e-6).rewrite(site_of(w, x))
    without = GPTQ(group=0, damping=1e-6).rewrite(site_of(w[:, alive], x[:, alive]))
    assert torch.equal(quieter.codes[:, alive], without.codes)


def test_no_input_ever_fires(site_of: SiteMaker) -> None:
    site = site_of(normal(17, 48), torch.zeros(20, 48))
    assert torch.equal(GPTQ(group=8).rewrite(site).dense(), Grid(bits=4, group=8).quantize(normal(17, 48)).dense())
    assert site.fallbacks == []


# -- damping and fallback --------------------------------------------------------------------------


def hopeless() -> Tensor:
    """No damping of the ladder makes this positive definite."""
    gram = torch.eye(48)
    gram[0, 1] = gram[1, 0] = 100.0
    return gram


def test_the_damping_used_is_recorded(site_of: SiteMaker) -> None:
    gram = torch.eye(48)
    gram[0, 1] = gram[1, 0] = 1.05
    site = site_of(normal(17, 48), gram_II=gram)
    GPTQ(group=8).rewrite(site)
    assert site.ledger["damping"] == pytest.approx(0.1)
    assert site.ledger["damping_failed"] == [0.01]
    assert site.fallbacks == []
    GPTQ(group=8, damping=0.2).rewrite(site)  # a second pass, whose first try holds
    assert site.ledger["damping"] == pytest.approx(0.2) and "damping_failed" not in site.ledger


def test_a_hopeless_gram_is_rounded_and_recorded(site_of: SiteMaker) -> None:
    site = site_of(normal(17, 48), gram_II=hopeless())
    result = GPTQ(group=8).rewrite(site)
    assert torch.equal(result.dense(), RTN(group=8).rewrite(site_of(normal(17, 48))).dense())
    assert site.fallbacks == [
        ("gptq", "the Gram was not positive definite even at 1000 times the damping; rounded to nearest")
    ]


@pytest.mark.parametrize("target", ["weight", "original"])
def test_a_fallback_respects_the_mask(target: str, site_of: SiteMaker) -> None:
    site = site_of(normal(17, 48), gram_II=hopeless())
    mask_OI = pattern("2:4").keep(normal(17, 48).abs())
    site.weight = Masked(Dense(normal(17, 48)), mask_OI, "2:4")
    site.weight = GPTQ(group=8, target=target).rewrite(site)
    assert int(site.weight.values.dense()[~mask_OI].count_nonzero()) == 0
    assert len(site.fallbacks) == 1


def test_a_gram_that_is_not_finite_raises(site_of: SiteMaker) -> None:
    with pytest.raises(CalibrationError, match="the Gram matrix is not finite"):
        GPTQ(group=8).rewrite(site_of(normal(17, 48), gram_II=torch.full((48, 48), float("nan"))))


def test_sites_that_share_an_input_share_its_factor(site_of: SiteMaker, monkeypatch: pytest.MonkeyPatch) -> None:
    import compress.passes.hessian as module

    calls = []
    real = module.inverse_factor
    monkeypatch.setattr(module, "inverse_factor", lambda *args: calls.append(1) or real(*args))
    first, second = site_of(normal(17, 48), tokens()), site_of(normal(9, 48, seed=8))
    second.stats = first.stats
    GPTQ(group=8).rewrite(first)
    GPTQ(group=8, bits=3).rewrite(second)
    GPTQ(group=8, damping=0.1).rewrite(second)
    assert len(calls) == 2  # one a damping


# -- expressions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [RTN(group=8), GPTQ(group=8)], ids=str)
def test_the_masked_term_of_a_sum_is_quantized_under_its_mask(step: Quantizer, site_of: SiteMaker) -> None:
    site = pruned_site(site_of)
    mask_OI = site.weight.mask_OI
    site.weight = site.weight + Dense(normal(17, 2)) @ Dense(normal(2, 48))
    result = step.rewrite(site)
    assert result.describe() == "2:4·int4g8 + r2"
    assert int(result.terms[0].dense()[~mask_OI].count_nonzero()) == 0


@pytest.mark.parametrize("step", [RTN(group=8), GPTQ(group=8)], ids=str)
def test_a_product_cannot_be_quantized(step: Quantizer, site_of: SiteMaker) -> None:
    site = site_of(normal(17, 48), tokens())
    site.weight = Dense(normal(17, 2)) @ Dense(normal(2, 48))
    with pytest.raises(UnsupportedWeight, match=rf"{step.name} cannot quantize blocks\.0\.proj: it is r2"):
        step.rewrite(site)


@pytest.mark.parametrize(
    "options", [{"group": 8}, {"group": 0, "symmetric": True}, {"group": -1, "search": True}], ids=str
)
def test_rounding_is_the_grid_alone(options: dict[str, Any], site_of: SiteMaker) -> None:
    search = options.get("search", False)
    grid = Grid(bits=4, group=options["group"], symmetric=options.get("symmetric", False))
    want = grid.quantize(normal(17, 48), search=search)
    assert torch.equal(RTN(**options).rewrite(site_of(normal(17, 48))).dense(), want.dense())


@pytest.mark.parametrize("rank", [8, 5])
def test_factors_are_rounded_if_told(rank: int, site_of: SiteMaker) -> None:
    site = site_of(normal(17, 48), normal(200, 48, seed=1))
    left, right = normal(17, rank), normal(rank, 48)
    site.weight = Dense(normal(17, 48)) + Dense(left) @ Dense(right)
    _, product = RTN(group=8, factors=True).rewrite(site).children()
    got_left, got_right = product.children()
    assert torch.equal(got_left.dense(), Grid(bits=4, group=8 if rank == 8 else 0).quantize(left).dense())
    assert torch.equal(got_right.dense(), Grid(bits=4, group=8).quantize(right).dense())
