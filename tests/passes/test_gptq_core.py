"""GPTQ's core: published losses, an independent oracle, and the identities of the algorithm."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType

import pytest
import torch
from torch import Tensor

from compress.errors import CalibrationError
from compress.passes import hessian
from compress.passes.feedback import feed_back
from compress.passes.hessian import inverse_factor
from compress.passes.quantization.gptq import PLAIN, FixedGrids, falling, gptq, keeps_groups
from compress.weights import Grid

Close = Callable[[str, Tensor, Tensor, float], None]
DAMPING = 0.01


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gram_of(width: int = 48) -> Tensor:
    """A correlated Gram of full rank, with channels of different loudness."""
    x = normal(4 * width, width, seed=1) @ (torch.eye(width) + normal(width, width, seed=2) / width**0.5)
    x = x * normal(width, seed=3).exp()
    return x.T @ x / len(x)


def factor(gram_II: Tensor, order_I: Tensor | None = None) -> Tensor:
    found = inverse_factor(gram_II, DAMPING, order_I)
    assert found is not None
    assert found[1] == DAMPING
    return found[0]


def damped(gram_II: Tensor) -> Tensor:
    return gram_II + DAMPING * gram_II.diagonal().mean() * torch.eye(len(gram_II))


# -- published numbers -----------------------------------------------------------------------------

# lowrank_quant_delta.md section 0.1: relative proxy loss on its synthetic fixture, 4, 3 and 2 bits
ROUNDED = {0: (0.01207, 0.05493, 0.3001), 64: (0.00827, 0.03879, 0.2157)}
NATURAL = {0: (0.00263, 0.01216, 0.0711), 64: (0.00181, 0.00853, 0.0526)}
ACTIVATION = {0: (0.00162, 0.00749, 0.0448), 64: (0.00112, 0.00525, 0.0335)}  # groups are static in this order
GOLDEN = [
    (order, group, bits, want)
    for order, table in (("none", ROUNDED), ("natural", NATURAL), ("activation", ACTIVATION))
    for group, row in table.items()
    for bits, want in zip((4, 3, 2), row, strict=True)
]


@pytest.fixture(scope="module")
def fixture(naive: ModuleType) -> tuple[Tensor, Tensor]:
    w, gram = naive.golden_correlated()
    return w, gram


@pytest.mark.parametrize(("order", "group", "bits", "want"), GOLDEN)
def test_losses_are_the_published_ones(
    order: str, group: int, bits: int, want: float, fixture: tuple[Tensor, Tensor], naive: ModuleType
) -> None:
    w, gram = fixture[0].float(), fixture[1].float()
    grid = Grid(bits=bits, group=group)
    order_I = gram.diagonal().argsort(descending=True) if order == "activation" else None
    if order == "none":
        result = grid.quantize(w)
    else:
        result, _ = gptq(w, factor(gram, order_I), grid, None, order_I)
    assert naive.proxy_loss(fixture[0], result.dense(), fixture[1]) == pytest.approx(want, rel=0.02)


# -- identities ------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [0, 8], ids=["row", "group"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 4])
def test_the_loss_is_half_the_damped_output_error(bits: int, symmetric: bool, group: int, naive: ModuleType) -> None:
    w, gram = normal(17, 48), gram_of()
    result, loss = gptq(w, factor(gram), Grid(bits=bits, group=group, symmetric=symmetric))
    assert loss == pytest.approx(naive.energy(result.dense() - w, damped(gram)) / 2, rel=1e-4)


def test_the_loss_counts_what_a_mask_cuts(naive: ModuleType) -> None:
    w, gram, keep = normal(17, 48), gram_of(), normal(17, 48, seed=5) > 0
    result, loss = gptq(w, factor(gram), Grid(bits=4), keep)
    assert loss == pytest.approx(naive.energy(result.dense() - w, damped(gram)) / 2, rel=1e-4)


@pytest.mark.parametrize("block", [1, 7, 16, 47, 48, 128])
def test_the_block_size_changes_nothing(block: int) -> None:
    w, gram = normal(17, 48), gram_of()
    some, all_at_once = (FixedGrids(Grid(bits=3, group=8), w, None, PLAIN) for _ in range(2))
    _, _, loss = feed_back(w, factor(gram), some, None, block)
    _, _, whole_loss = feed_back(w, factor(gram), all_at_once, None, 48)
    assert torch.equal(some.codes_OI, all_at_once.codes_OI)
    assert loss == pytest.approx(whole_loss, rel=1e-5)


@pytest.mark.parametrize("block", [8, 16, 40, 128])
def test_the_block_size_changes_nothing_with_fitted_grids(block: int) -> None:
    w, upper = normal(17, 80), factor(gram_of(80))
    blocked, _ = gptq(w, upper, Grid(bits=3, group=8), block=block)
    whole, _ = gptq(w, upper, Grid(bits=3, group=8), block=80)
    assert torch.equal(blocked.codes, whole.codes)
    assert torch.equal(blocked.scale, whole.scale)


@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_gptq_is_ldlq(bits: int, symmetric: bool, naive: ModuleType) -> None:
    w, gram = normal(17, 40), gram_of(40)
    result, _ = gptq(w, factor(gram), Grid(bits=bits, symmetric=symmetric))
    zero = torch.full((17, 1), 2 ** (bits - 1)) if result.zero is None else result.zero
    oracle = naive.ldlq(w, damped(gram), result.scale[:, 0], zero[:, 0], bits)
    assert torch.equal(result.codes.double(), oracle)


@pytest.mark.parametrize("group", [0, 8, -1], ids=["row", "group", "tensor"])
@pytest.mark.parametrize("symmetric", [False, True], ids=["asym", "sym"])
def test_uncorrelated_inputs_make_it_rounding(symmetric: bool, group: int) -> None:
    w, grid = normal(17, 48), Grid(bits=3, group=group, symmetric=symmetric)
    result, _ = gptq(w, factor(torch.eye(48)), grid)
    plain = grid.quantize(w)
    assert torch.equal(result.codes, plain.codes)
    assert torch.equal(result.scale, plain.scale)


def test_inputs_of_unequal_loudness_but_uncorrelated_make_it_rounding() -> None:
    result, _ = gptq(normal(17, 48), factor(torch.diag(normal(48).exp())), Grid(bits=3))
    assert torch.equal(result.codes, Grid(bits=3).quantize(normal(17, 48)).codes)


@pytest.mark.parametrize("scale", [2.0**-20, 3.0, 2.0**20])
def test_scaling_the_gram_changes_nothing(scale: float) -> None:
    w, gram = normal(17, 48), gram_of()
    scaled, _ = gptq(w, factor(gram * scale), Grid(bits=3, group=8))
    plain, _ = gptq(w, factor(gram), Grid(bits=3, group=8))
    assert torch.equal(scaled.codes, plain.codes)


def test_permuted_rows_give_permuted_codes() -> None:
    order = torch.randperm(17, generator=torch.Generator().manual_seed(4))
    w, upper = normal(17, 48), factor(gram_of())
    assert torch.equal(gptq(w[order], upper, Grid(bits=3))[0].codes, gptq(w, upper, Grid(bits=3))[0].codes[order])


def test_permuted_inputs_give_permuted_codes_in_activation_order() -> None:
    permutation = torch.randperm(48, generator=torch.Generator().manual_seed(4))

    def codes(w: Tensor, gram: Tensor) -> Tensor:
        order = gram.diagonal().argsort(descending=True)
        return gptq(w, factor(gram, order), Grid(bits=3), None, order)[0].codes

    w, gram = normal(17, 48), gram_of()
    permuted = codes(w[:, permutation], gram[permutation][:, permutation])
    assert torch.equal(permuted, codes(w, gram)[:, permutation])


def test_fitted_grids_see_the_corrected_weights() -> None:
    w, upper = normal(17, 48), factor(gram_of())
    fitted, _ = gptq(w, upper, Grid(bits=3, group=8))
    static, _ = gptq(w, upper, Grid(bits=3, group=8), static=True)
    assert torch.equal(fitted.scale[:, :1], static.scale[:, :1])  # nothing is corrected before the first group
    assert not torch.equal(fitted.scale[:, 1:], static.scale[:, 1:])
    assert torch.equal(static.scale, Grid(bits=3, group=8).quantize(w).scale)


def test_scales_too_small_for_float16_stay_exact_in_every_group() -> None:
    w = normal(17, 48)
    w[:, 16:24] *= 1e-7
    result, _ = gptq(w, factor(torch.eye(48)), Grid(bits=4, group=8))
    assert result.scale.dtype == torch.float32
    assert float((result.dense() - w)[:, 16:24].abs().max()) < 1e-7


# -- factor ----------------------------------------------------------------------------------------


def test_the_factor_is_that_of_the_damped_inverse(assert_close: Close) -> None:
    gram = gram_of()
    upper = factor(gram).double()
    assert torch.equal(upper, upper.triu())
    # float32 Cholesky twice: error of about the condition number (<= 1/damping x spread) times eps
    assert_close("inverse", upper.T @ upper, torch.linalg.inv(damped(gram).double()), 1e-3)


def test_the_gram_is_not_modified() -> None:
    gram = gram_of()
    gram[5], gram[:, 5] = 0, 0
    before = gram.clone()
    inverse_factor(gram, DAMPING)
    assert torch.equal(gram, before)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_gram_that_is_not_finite_raises(value: float) -> None:
    gram = gram_of()
    gram[3, 3] = value
    with pytest.raises(CalibrationError, match="the Gram matrix is not finite; the activations before this site"):
        inverse_factor(gram, DAMPING)


DEGENERATE = {
    "rank-1": torch.outer(normal(48), normal(48)),
    "few-tokens": normal(5, 48).T @ normal(5, 48),
    "two-equal-inputs": (lambda x: x.T @ x)(normal(99, 24).repeat(1, 2)),
    "zero": torch.zeros(48, 48),
    "tiny": gram_of() * 1e-30,
}


@pytest.mark.parametrize("name", DEGENERATE)
def test_a_singular_gram_is_damped_into_use(name: str) -> None:
    found = inverse_factor(DEGENERATE[name], DAMPING)
    assert found is not None
    assert found[1] == DAMPING
    result, loss = gptq(normal(17, 48), found[0], Grid(bits=4))
    assert bool(torch.isfinite(result.dense()).all())
    assert loss >= 0


def test_a_zero_gram_makes_it_rounding() -> None:
    result, _ = gptq(normal(17, 48), factor(torch.zeros(48, 48)), Grid(bits=4))
    assert torch.equal(result.codes, Grid(bits=4).quantize(normal(17, 48)).codes)


def indefinite(lowest: float) -> Tensor:
    """A Gram-like matrix of unit diagonal whose lowest eigenvalue is `lowest`."""
    gram = torch.eye(48)
    gram[0, 1] = gram[1, 0] = 1 - lowest
    return gram


@pytest.mark.parametrize(("lowest", "used"), [(-0.001, 0.01), (-0.05, 0.1), (-0.5, 1.0), (-5.0, 10.0)])
def test_damping_climbs_by_tens_until_it_holds(lowest: float, used: float) -> None:
    found = inverse_factor(indefinite(lowest), DAMPING)
    assert found is not None
    assert found[1] == pytest.approx(used)


def test_damping_gives_up_after_a_thousandfold() -> None:
    assert inverse_factor(indefinite(-50.0), DAMPING) is None


# -- orders that keep groups together --------------------------------------------------------------


def test_group_aware_order_is_the_sorted_order_of_its_definition() -> None:
    energy = torch.tensor([1.0, 5.0, 2.0, 9.0, 3.0, 3.0, 7.0, 0.0])
    assert falling(energy, 2).tolist() == [
        3,
        2,
        6,
        7,
        1,
        0,
        4,
        5,
    ]  # pairs by their largest
    assert falling(energy).tolist() == [3, 6, 1, 4, 5, 2, 0, 7]


def test_only_orders_that_mix_groups_do() -> None:
    energy = normal(24).abs()
    assert keeps_groups(None, 8)
    assert keeps_groups(falling(energy, 8), 8)
    assert not keeps_groups(falling(energy), 8)


@pytest.mark.parametrize("static", [False, True])
def test_group_aware_gptq_is_gptq_of_the_reordered_problem(static: bool) -> None:
    w, gram = normal(9, 24), gram_of(24)
    order = falling(gram.diagonal(), 8)
    upper, grid = factor(gram, order), Grid(bits=3, group=8)
    got, loss = gptq(w, upper, grid, order_I=order, static=static)
    plain, want = gptq(w[:, order].contiguous(), upper, grid, static=static)
    torch.testing.assert_close(got.dense()[:, order], plain.dense(), rtol=0, atol=0)
    assert loss == want


def test_ranges_by_output_never_cost_more_than_whole_ranges() -> None:
    w, gram = normal(9, 24), gram_of(24)
    for bits in (2, 3, 4):
        grid = Grid(bits=bits, group=8)
        costs = [block_cost(grid.quantize(w, search=True, gram_II=g).dense() - w, gram, 8) for g in (gram, None)]
        whole = block_cost(grid.quantize(w).dense() - w, gram, 8)
        assert bool((costs[0] <= whole * (1 + 1e-6)).all())
        assert float(costs[0].sum()) < float(costs[1].sum())  # and less than what the search by weights finds


def block_cost(deviation: Tensor, gram: Tensor, group: int) -> Tensor:
    parts = [slice(at, at + group) for at in range(0, len(gram), group)]
    return torch.stack([(deviation[:, p] @ gram[p, p] * deviation[:, p]).sum(1) for p in parts], 1)


def test_where_kernels_run_a_factor_lies_by_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    gram = torch.randn(40, 20, generator=torch.Generator().manual_seed(0))
    plain = hessian.factor_of_inverse(gram.T @ gram)
    monkeypatch.setattr(hessian.solver, "usable", lambda tensor: True)
    upper = hessian.factor_of_inverse(gram.T @ gram)
    # LAPACK and cuSOLVER give columns; a sweep reads rows, and without them every column is a dozen launches
    assert upper is not None and upper.stride() == (20, 1)
    assert plain is not None and (upper - plain).norm() < 1e-5 * plain.norm()
