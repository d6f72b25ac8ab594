"""Magnitude and Wanda: the masks of the specification, and the invariances of each score."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import CalibrationError, Dense, Magnitude, Masked, Pruner, UnsupportedWeight, Wanda
from compress.stats import ColumnNorm

SiteMaker = Callable[..., Any]
both = pytest.mark.parametrize("kind", [Magnitude, Wanda], ids=["magnitude", "wanda"])
every_pattern = pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": "2:4"},
        {"sparsity": "5:8"},
        {"sparsity": 0.29, "scope": "row"},
        {"scope": "matrix"},
        {"scope": "3x4"},
    ],
    ids=str,
)


def weight(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(width: int = 24) -> Tensor:
    return weight(50, width, seed=1) * weight(width, seed=2).exp()


def mask_of(step: Pruner, site: Any) -> Tensor:
    rewritten = step.rewrite(site)
    assert isinstance(rewritten, Masked)
    return rewritten.mask_OI


# pruning.md section 16: float64, no random numbers; kept columns a row, column 0 the highest bit
GOLDEN = [
    (Magnitude(sparsity=0.5), "7a2b f40e aa15 7a0b", 514.726819),
    (Magnitude(sparsity="2:4"), "5aa3 5556 aa55 5aaa", 1160.953979),
    (Wanda(sparsity=0.5), "788e 714e a8d5 788e", 267.956041),
    (Wanda(sparsity="2:4"), "5aaa 5956 aac5 5aaa", 917.525922),
]


@pytest.mark.parametrize(("step", "masks", "error"), GOLDEN, ids=lambda v: str(v) if isinstance(v, Pruner) else "")
def test_masks_and_errors_are_the_specified_ones(
    step: Pruner, masks: str, error: float, site_of: SiteMaker, naive: ModuleType
) -> None:
    w, x = naive.golden_weight(), naive.golden_tokens()
    kept = mask_of(step, site_of(w.float(), x.float()))
    assert naive.mask_hex(kept) == masks.split()
    assert naive.energy(-w * ~kept, x.T @ x) == pytest.approx(error, abs=5e-7)


def test_the_golden_fixture_is_the_specified_one(naive: ModuleType) -> None:
    w, x = naive.golden_weight(), naive.golden_tokens()
    assert [float(w[0, 0]), float(w[1, 3]), float(w[3, 15])] == pytest.approx([0.443280, 1.132062, 0.758326], abs=5e-7)
    assert [float(x[0, 0]), float(x[5, 7]), float(x[31, 15])] == pytest.approx(
        [1.119202, -2.893765, 1.449187], abs=5e-7
    )
    assert x.square().sum(0)[[0, 7, 15]].tolist() == pytest.approx([17.135209, 148.577940, 23.280493], abs=5e-7)


# -- values ----------------------------------------------------------------------------------------


@every_pattern
@both
def test_kept_weights_do_not_change(kind: type[Pruner], options: dict[str, Any], site_of: SiteMaker) -> None:
    w = weight(33, 24)
    rewritten = kind(**options).rewrite(site_of(w, tokens()))
    assert torch.equal(rewritten.dense(), w * rewritten.mask_OI)


@both
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_zero_sparsity_returns_the_weight(kind: type[Pruner], scope: str, site_of: SiteMaker) -> None:
    w = weight(33, 24)
    assert torch.equal(kind(sparsity=0.0, scope=scope).rewrite(site_of(w, tokens())).dense(), w)


@both
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_full_sparsity_returns_zeros(kind: type[Pruner], scope: str, site_of: SiteMaker) -> None:
    rewritten = kind(sparsity=1.0, scope=scope).rewrite(site_of(weight(33, 24), tokens()))
    assert torch.equal(rewritten.dense(), torch.zeros(33, 24))


@every_pattern
@both
def test_masks_nest_as_sparsity_grows(kind: type[Pruner], options: dict[str, Any], site_of: SiteMaker) -> None:
    scope = {"scope": options["scope"]} if "scope" in options else {}
    site = site_of(weight(33, 24), tokens())
    masks = [mask_of(kind(sparsity=s, **scope), site) for s in (0.1, 0.29, 0.5, 0.8)]
    assert all(bool((denser | ~sparser).all()) for denser, sparser in pairwise(masks))


# -- invariants ------------------------------------------------------------------------------------


@every_pattern
@both
def test_scaling_the_weight_keeps_the_mask(kind: type[Pruner], options: dict[str, Any], site_of: SiteMaker) -> None:
    plain = mask_of(kind(**options), site_of(weight(33, 24), tokens()))
    scaled = mask_of(kind(**options), site_of(weight(33, 24) * 0.25, tokens()))
    assert torch.equal(scaled, plain)


@every_pattern
def test_scaling_the_inputs_keeps_the_mask_of_wanda(options: dict[str, Any], site_of: SiteMaker) -> None:
    plain = mask_of(Wanda(**options), site_of(weight(33, 24), tokens()))
    scaled = mask_of(Wanda(**options), site_of(weight(33, 24), tokens() * 8))
    assert torch.equal(scaled, plain)


@pytest.mark.parametrize("options", [{}, {"sparsity": "2:4"}, {"scope": "matrix"}], ids=str)
def test_moving_scale_from_weight_to_input_keeps_the_mask_of_wanda(options: dict[str, Any], site_of: SiteMaker) -> None:
    shift = 2.0 ** torch.arange(24).remainder(5)
    plain = mask_of(Wanda(**options), site_of(weight(33, 24), tokens()))
    moved = mask_of(Wanda(**options), site_of(weight(33, 24) / shift, tokens() * shift))
    assert torch.equal(moved, plain)


def test_magnitude_is_not_invariant_to_moved_scale(site_of: SiteMaker) -> None:
    shift = 2.0 ** torch.arange(24).remainder(5)
    plain = mask_of(Magnitude(), site_of(weight(33, 24)))
    assert not torch.equal(mask_of(Magnitude(), site_of(weight(33, 24) / shift)), plain)


@pytest.mark.parametrize("options", [{}, {"sparsity": "2:4"}, {"scope": "matrix"}], ids=str)
@both
def test_permuted_rows_give_a_permuted_mask(kind: type[Pruner], options: dict[str, Any], site_of: SiteMaker) -> None:
    order = torch.randperm(33, generator=torch.Generator().manual_seed(4))
    plain = mask_of(kind(**options), site_of(weight(33, 24), tokens()))
    permuted = mask_of(kind(**options), site_of(weight(33, 24)[order], tokens()))
    assert torch.equal(permuted, plain[order])


@both
@pytest.mark.parametrize("scope", ["row", "matrix"])
def test_permuted_columns_give_a_permuted_mask(kind: type[Pruner], scope: str, site_of: SiteMaker) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    plain = mask_of(kind(scope=scope), site_of(weight(33, 24), tokens()))
    permuted = mask_of(kind(scope=scope), site_of(weight(33, 24)[:, order], tokens()[:, order]))
    assert torch.equal(permuted, plain[:, order])


@both
def test_groups_of_m_do_not_follow_permuted_columns(kind: type[Pruner], site_of: SiteMaker) -> None:
    order = torch.randperm(24, generator=torch.Generator().manual_seed(4))
    plain = mask_of(kind(sparsity="2:4"), site_of(weight(33, 24), tokens()))
    permuted = mask_of(kind(sparsity="2:4"), site_of(weight(33, 24)[:, order], tokens()[:, order]))
    assert not torch.equal(permuted, plain[:, order])


@pytest.mark.parametrize(
    "step", [Wanda(), Wanda(sparsity="2:4"), Magnitude(sparsity="2:4"), Magnitude(scope="row")], ids=str
)
def test_rows_are_pruned_independently(step: Pruner, site_of: SiteMaker) -> None:
    whole = mask_of(step, site_of(weight(33, 24), tokens()))
    some = mask_of(step, site_of(weight(33, 24)[5:11], tokens()))
    assert torch.equal(some, whole[5:11])


def test_rows_compete_under_the_default_magnitude(site_of: SiteMaker) -> None:
    w = weight(8, 24) * torch.tensor([1.0, 100.0]).repeat_interleave(4)[:, None]
    kept = mask_of(Magnitude(), site_of(w))
    assert int(kept[:4].sum()) < int(kept[4:].sum())
    assert int(kept.sum()) == 8 * 24 // 2


@pytest.mark.parametrize("sparsity", [0.5, "2:4", 0.29])
def test_equal_norms_make_wanda_magnitude_within_rows(sparsity: float | str, site_of: SiteMaker) -> None:
    quiet = torch.eye(24)  # every feature fires once: all norms are 1
    wanda = mask_of(Wanda(sparsity=sparsity), site_of(weight(33, 24), quiet))
    magnitude = mask_of(Magnitude(sparsity=sparsity, scope="row"), site_of(weight(33, 24)))
    assert torch.equal(wanda, magnitude)


def test_wanda_loses_less_output_than_magnitude(site_of: SiteMaker, naive: ModuleType) -> None:
    w, x = weight(33, 24), tokens()
    errors = [
        naive.proxy_loss(w, step.rewrite(site_of(w, x)).dense(), x.T @ x) for step in (Wanda(), Magnitude(scope="row"))
    ]
    assert errors[0] < errors[1]


def test_an_input_that_never_fires_goes_first(site_of: SiteMaker) -> None:
    x = tokens()
    x[:, 7] = 0
    kept = mask_of(Wanda(sparsity=0.05), site_of(weight(33, 24), x))  # one of 24 a row
    assert kept.sum(0).tolist() == [33] * 7 + [0] + [33] * 16


# -- refusals --------------------------------------------------------------------------------------


@both
def test_a_pruned_weight_is_not_pruned_again(kind: type[Pruner], site_of: SiteMaker) -> None:
    site = site_of(weight(33, 24), tokens())
    site.weight = Masked(Dense(weight(33, 24)), weight(33, 24) > 0, "2:4")
    with pytest.raises(UnsupportedWeight, match=r"needs a dense weight; blocks\.0\.proj is already 2:4"):
        kind().rewrite(site)


@both
def test_a_nan_weight_is_a_calibration_error(kind: type[Pruner], site_of: SiteMaker) -> None:
    w = weight(33, 24)
    w[3, 4] = float("nan")
    with pytest.raises(CalibrationError, match="a pruning score is NaN"):
        kind().rewrite(site_of(w, tokens()))


def test_a_missing_statistic_is_named(site_of: SiteMaker) -> None:
    with pytest.raises(CalibrationError, match="no ColumnNorm was collected; the pass must name it in `requires`"):
        Wanda().rewrite(site_of(weight(33, 24)))


def test_magnitude_needs_no_data() -> None:
    assert Magnitude.requires == ()
    assert Magnitude().requires == ()
    assert Wanda().requires == (ColumnNorm,)
