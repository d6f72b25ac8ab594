"""SparseGPT: the masks and losses of the specification, optimal brain surgery as an oracle, consequences of both."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import (
    GPTQ,
    RTN,
    CalibrationError,
    Dense,
    Magnitude,
    Masked,
    RecipeError,
    SparseGPT,
    UnsupportedWeight,
    Wanda,
    pattern,
)
from compress.model.site import Site
from compress.passes import feedback
from compress.passes.feedback import Chosen, Given, Unrounded, feed_back
from compress.passes.hessian import inverse_factor

SiteMaker = Callable[..., Site]
Close = Callable[[str, Tensor, Tensor, float], None]
WIDTH = 48
# float32: 48 updates round to sqrt(48) eps / 2, 4e-7; the damped Grams here, of condition 1600, amplify by its root
RATIO = 2e-5
every_pattern = pytest.mark.parametrize(
    "options",
    [
        {},
        {"sparsity": 0.29},
        {"sparsity": "2:4"},
        {"sparsity": "1:4"},
        {"sparsity": "5:8"},
        {"sparsity": 0.29, "scope": "row"},
        {"scope": "16x16"},
    ],
    ids=str,
)
by_row = pytest.mark.parametrize("options", [{"sparsity": "2:4"}, {"scope": "row"}], ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens(width: int = WIDTH, count: int = 200, seed: int = 1) -> Tensor:
    mixing = torch.eye(width) + normal(width, width, seed=2) / width**0.5
    return normal(count, width, seed=seed) @ mixing * normal(width, seed=3).exp()


def pruned(step: SparseGPT, site: Site) -> Masked:
    result = step.rewrite(site)
    assert isinstance(result, Masked)
    return result


def gram(x_TI: Tensor) -> Tensor:
    return x_TI.double().T @ x_TI.double() / len(x_TI)


def damped(gram_II: Tensor, damping: float = 0.01) -> Tensor:
    return gram_II + damping * gram_II.diagonal().mean() * torch.eye(len(gram_II), dtype=gram_II.dtype)


def factor(gram_II: Tensor, damping: float = 0.01) -> Tensor:
    found = inverse_factor(gram_II, damping)
    assert found is not None
    return found[0].float()


# -- the specification -----------------------------------------------------------------------------

# pruning.md section 16, H = X^T X (there 2 G / 2 for two sequences) with 1 % damping: masks, loss, error
GOLDEN = [
    (0.5, 16, "788f 504f a8d5 588f", 82.264691, 128.992674),
    (0.5, 8, "784f f407 a887 784b", 26.691834, 33.881428),
    ("2:4", 16, "5aa3 5956 aac5 5a63", 84.860735, 148.181488),
]
golden = pytest.mark.parametrize(("sparsity", "block", "masks", "loss", "error"), GOLDEN)


@golden
def test_the_core_gives_the_specified_masks_and_losses(
    sparsity: float | str, block: int, masks: str, loss: float, error: float, naive: ModuleType
) -> None:
    w, x = naive.golden_weight(), naive.golden_tokens()
    chosen = Chosen(pattern(sparsity, "matrix"))
    after, keep, got = feed_back(w, factor(x.T @ x), Unrounded(), chosen, block)
    assert keep is not None
    assert naive.mask_hex(keep) == masks.split()
    assert got == pytest.approx(loss, rel=1e-5)
    assert naive.energy(after.double() - w, x.T @ x) == pytest.approx(error, rel=1e-5)


@golden
def test_the_pass_gives_the_specified_masks_and_losses(
    sparsity: float | str, block: int, masks: str, loss: float, error: float, site_of: SiteMaker, naive: ModuleType
) -> None:
    w, x = naive.golden_weight(), naive.golden_tokens()
    site = site_of(w.float(), x.float())
    result = pruned(SparseGPT(sparsity=sparsity, block=block), site)
    assert naive.mask_hex(result.mask_OI) == masks.split()
    assert site.ledger["loss"] * len(x) == pytest.approx(loss, rel=1e-5)
    assert naive.energy(result.dense().double() - w, x.T @ x) == pytest.approx(error, rel=1e-5)


@golden
def test_the_oracle_gives_the_specified_values(
    sparsity: float | str, block: int, masks: str, loss: float, error: float, naive: ModuleType
) -> None:
    w, x = naive.golden_weight(), naive.golden_tokens()
    after, keep, got = naive.sparsegpt(w, damped(x.T @ x), str(sparsity), block)
    assert naive.mask_hex(keep) == masks.split()
    assert got == pytest.approx(loss, abs=5e-7)
    assert naive.energy(after - w, x.T @ x) == pytest.approx(error, abs=5e-7)


def test_the_first_row_starts_as_specified(site_of: SiteMaker, naive: ModuleType) -> None:
    site = site_of(naive.golden_weight().float(), naive.golden_tokens().float())
    row = SparseGPT(sparsity="2:4", block=16).rewrite(site).dense()[0, :6]
    assert row.tolist() == pytest.approx([0, 1.38670, 0, -1.62903, 1.33536, 0], abs=1e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("block", [8, 24])
@pytest.mark.parametrize("sparsity", ["0.5", "0.29", "0.8", "2:4", "1:4", "5:8"])
def test_masks_and_values_are_those_of_optimal_brain_surgery(
    sparsity: str, block: int, seed: int, naive: ModuleType, assert_close: Close
) -> None:
    w, h = normal(6, 24, seed=seed), gram(tokens(24, 60, seed + 10))
    chosen = Chosen(pattern(sparsity if ":" in sparsity else float(sparsity), "matrix"))
    after, keep, loss = feed_back(w, factor(h), Unrounded(), chosen, block)
    values, mask, cost = naive.sparsegpt(w, damped(h), sparsity, block)
    assert torch.equal(keep, mask)
    assert_close("values", after, values, RATIO)
    assert loss == pytest.approx(cost, rel=RATIO)


# -- what follows from the definition --------------------------------------------------------------


@pytest.mark.parametrize("sparsity", [0.5, 0.8, "2:4"])
def test_the_loss_is_the_damped_error_of_the_change(sparsity: float | str, naive: ModuleType) -> None:
    w, h = normal(33, WIDTH), gram(tokens())
    after, _, loss = feed_back(w, factor(h), Unrounded(), Chosen(pattern(sparsity, "matrix")), 16)
    assert loss == pytest.approx(naive.energy(after.double() - w.double(), damped(h)) / 2, rel=RATIO)


def test_the_ledger_holds_that_loss(site_of: SiteMaker, naive: ModuleType) -> None:
    w, x = normal(33, WIDTH), tokens()
    site = site_of(w, x)
    change = pruned(SparseGPT(), site).dense() - w
    assert site.ledger["loss"] == pytest.approx(naive.energy(change, damped(gram(x))) / 2, rel=RATIO)


@pytest.mark.parametrize("block", [1, 7, 16, 48, 128])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_given_the_mask_blocks_do_not_matter(
    sparsity: float | str, block: int, naive: ModuleType, assert_close: Close
) -> None:
    w, h = normal(9, WIDTH), gram(tokens())
    keep = pattern(sparsity).keep(w.abs())
    after, same, loss = feed_back(w, factor(h), Unrounded(), Given(keep), block)
    values, _, cost = naive.sparsegpt(w, damped(h), "0.5", block, keep)
    assert torch.equal(same, keep)
    assert_close("values", after, values, RATIO)
    assert loss == pytest.approx(cost, rel=RATIO)


def test_blocks_do_change_which_mask_is_chosen(site_of: SiteMaker) -> None:
    masks = [pruned(SparseGPT(block=block), site_of(normal(33, WIDTH), tokens())).mask_OI for block in (8, 48)]
    assert not torch.equal(*masks)


def test_one_grid_a_row_leaves_the_block_as_asked(site_of: SiteMaker) -> None:
    steps = [SparseGPT(sparsity=0.5, bits=4, group=0, block=block) for block in (8, WIDTH)]
    masks = [pruned(step, site_of(normal(33, WIDTH), tokens())).mask_OI for step in steps]
    assert not torch.equal(*masks)
    assert masks[0].unflatten(1, (-1, 8)).sum((0, 2)).unique().numel() == 1  # half of each block


def test_the_factor_tells_the_inverse_of_what_is_left() -> None:
    h = gram(tokens())
    found = inverse_factor(h, 0.01)
    assert found is not None
    left = torch.stack([torch.linalg.inv(damped(h)[j:, j:])[0, 0] for j in range(WIDTH)])
    torch.testing.assert_close(found[0].diagonal().square(), left, rtol=1e-9, atol=0)


@pytest.mark.parametrize("block", [16, WIDTH])
def test_endless_damping_is_magnitude_within_blocks(block: int, assert_close: Close) -> None:
    w = normal(33, WIDTH)
    chosen = pattern(0.5, "matrix")
    after, keep, _ = feed_back(w, factor(gram(tokens()), 1e9), Unrounded(), Chosen(chosen), block)
    parts = [chosen.keep_part(w[:, at : at + block].abs(), at) for at in range(0, WIDTH, block)]
    assert keep is not None
    assert torch.equal(keep, torch.cat(parts, 1))
    assert_close("values", after, w * keep, 1e-6)


@pytest.mark.parametrize("sparsity", ["2:4", "1:4", "5:8"])
def test_inputs_that_do_not_correlate_make_it_wanda(sparsity: str, site_of: SiteMaker) -> None:
    w, x = normal(33, WIDTH), torch.diag(normal(WIDTH, seed=3).exp())  # each token fires one input
    result = pruned(SparseGPT(sparsity=sparsity, damping=1e-12), site_of(w, x))
    wanda = Wanda(sparsity=sparsity).rewrite(site_of(w, x))
    assert isinstance(wanda, Masked)
    assert torch.equal(result.mask_OI, wanda.mask_OI)
    assert torch.equal(result.dense(), wanda.dense())


def test_compensation_loses_less_output_than_wanda_and_magnitude(site_of: SiteMaker, naive: ModuleType) -> None:
    w, x = normal(33, WIDTH), tokens()
    steps = (SparseGPT(), Wanda(), Magnitude())
    errors = [naive.proxy_loss(w, step.rewrite(site_of(w, x)).dense(), x.T @ x) for step in steps]
    assert errors[0] < min(errors[1:])


# -- counts ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@every_pattern
def test_what_is_cut_is_exactly_zero(options: dict[str, Any], dtype: torch.dtype, site_of: SiteMaker) -> None:
    site = site_of(normal(32, WIDTH).to(dtype), tokens().to(dtype))
    site.weight = pruned(SparseGPT(block=16, **options), site)
    mask = site.weight.mask_OI
    assert site.module.weight.dtype == dtype
    assert int(site.weight.values.data[~mask].count_nonzero()) == 0
    assert int(site.module.weight[~mask].count_nonzero()) == 0
    assert int(site.module.weight[mask].count_nonzero()) == int(mask.sum())


@pytest.mark.parametrize("sparsity", ["0.29", "0.5", "0.333"])
def test_a_matrix_loses_exactly_what_was_asked(sparsity: str, site_of: SiteMaker, naive: ModuleType) -> None:
    mask = pruned(SparseGPT(sparsity=float(sparsity), block=16), site_of(normal(33, WIDTH), tokens())).mask_OI
    assert int((~mask).sum()) == naive.dropped(33 * WIDTH, sparsity)
    ends = [naive.dropped(33 * end, sparsity) for end in (16, 32, 48)]
    assert (~mask).sum(0).cumsum(0)[[15, 31, 47]].tolist() == ends


@pytest.mark.parametrize("sparsity", ["0.29", "0.5", "0.333"])
def test_rows_lose_exactly_what_was_asked(sparsity: str, site_of: SiteMaker, naive: ModuleType) -> None:
    step = SparseGPT(sparsity=float(sparsity), scope="row", block=16)
    mask = pruned(step, site_of(normal(33, WIDTH), tokens())).mask_OI
    assert (~mask).sum(1).tolist() == [naive.dropped(WIDTH, sparsity)] * 33


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (5, 8), (2, 3)])
def test_every_group_keeps_n_of_m(n: int, m: int, site_of: SiteMaker) -> None:
    mask = pruned(SparseGPT(sparsity=f"{n}:{m}", block=20), site_of(normal(33, WIDTH), tokens())).mask_OI
    assert mask.unflatten(1, (-1, m)).sum(2).unique().tolist() == [n]


def test_tiles_are_cut_whole(site_of: SiteMaker) -> None:
    mask = pruned(SparseGPT(scope="16x16", block=16), site_of(normal(64, WIDTH), tokens())).mask_OI
    kept = mask.unflatten(1, (3, 16)).unflatten(0, (4, 16)).sum((1, 3))
    assert kept.unique().tolist() == [0, 256]
    assert (kept > 0).sum(0).tolist() == [2, 2, 2]  # half of each block's tiles


# -- symmetries ------------------------------------------------------------------------------------


@every_pattern
def test_permuted_rows_give_permuted_rows(options: dict[str, Any], site_of: SiteMaker, assert_close: Close) -> None:
    order = torch.arange(32).view(2, 16).flip(0).flatten()  # whole tiles change places
    step = SparseGPT(block=16, **options)
    plain, moved = (pruned(step, site_of(w, tokens())) for w in (normal(32, WIDTH), normal(32, WIDTH)[order]))
    assert torch.equal(moved.mask_OI, plain.mask_OI[order])
    assert_close("values", moved.dense(), plain.dense()[order], 1e-6)


@by_row
def test_rows_that_do_not_compete_are_independent(
    options: dict[str, Any], site_of: SiteMaker, assert_close: Close
) -> None:
    whole = pruned(SparseGPT(block=16, **options), site_of(normal(33, WIDTH), tokens()))
    some = pruned(SparseGPT(block=16, **options), site_of(normal(33, WIDTH)[5:11], tokens()))
    assert torch.equal(some.mask_OI, whole.mask_OI[5:11])
    assert_close("values", some.dense(), whole.dense()[5:11], 1e-6)


def test_rows_of_a_matrix_compete(site_of: SiteMaker) -> None:
    w = normal(8, WIDTH) * torch.tensor([1.0, 100.0]).repeat_interleave(4)[:, None]
    mask = pruned(SparseGPT(), site_of(w, tokens())).mask_OI
    assert int(mask[:4].sum()) < int(mask[4:].sum())


@by_row
def test_the_order_of_columns_matters(options: dict[str, Any], site_of: SiteMaker) -> None:
    order = torch.arange(WIDTH).flip(0)
    w, x = normal(33, WIDTH), tokens()
    plain = pruned(SparseGPT(block=16, **options), site_of(w, x))
    moved = pruned(SparseGPT(block=16, **options), site_of(w[:, order], x[:, order]))
    assert not torch.equal(moved.mask_OI, plain.mask_OI[:, order])


@every_pattern
def test_scales_change_nothing(options: dict[str, Any], site_of: SiteMaker) -> None:
    step = SparseGPT(block=16, **options)
    plain = pruned(step, site_of(normal(32, WIDTH), tokens()))
    scaled = pruned(step, site_of(normal(32, WIDTH) * 0.25, tokens() * 8))  # powers of two: exact in floats
    assert torch.equal(scaled.mask_OI, plain.mask_OI)
    assert torch.equal(scaled.dense(), plain.dense() * 0.25)


def test_scale_moves_between_weight_and_input_without_damping(assert_close: Close) -> None:
    w, h, shift = normal(33, WIDTH), gram(tokens()), 2.0 ** torch.arange(WIDTH).remainder(5)
    chosen = Chosen(pattern(0.5, "matrix"))
    plain, keep, _ = feed_back(w, factor(h, 0.0), Unrounded(), chosen, 16)
    moved, same, _ = feed_back(w / shift, factor(h * shift * shift[:, None], 0.0), Unrounded(), chosen, 16)
    assert torch.equal(same, keep)
    assert_close("values", moved * shift, plain, RATIO)


# -- a mask without an update ----------------------------------------------------------------------


@pytest.mark.parametrize("sparsity", ["0.5", "2:4"])
def test_without_update_weights_stay_and_scores_see_them_as_they_are(
    sparsity: str, site_of: SiteMaker, naive: ModuleType
) -> None:
    w, x = normal(9, WIDTH), tokens()
    share = sparsity if ":" in sparsity else float(sparsity)
    result = pruned(SparseGPT(sparsity=share, update=False, block=48), site_of(w, x))
    left = [torch.linalg.inv(damped(gram(x))[j:, j:])[0, 0] for j in range(WIDTH)]
    chosen = pattern(share, "matrix")
    assert torch.equal(result.mask_OI, chosen.keep(w.double().square() / torch.stack(left)))
    assert torch.equal(result.dense(), w * result.mask_OI)


@every_pattern
def test_without_update_counts_are_the_same(options: dict[str, Any], site_of: SiteMaker) -> None:
    masks = [
        pruned(SparseGPT(block=16, update=update, **options), site_of(normal(32, WIDTH), tokens())).mask_OI
        for update in (True, False)
    ]
    assert masks[0].sum() == masks[1].sum()
    assert not torch.equal(*masks)


# -- dead inputs, few tokens, broken Grams ---------------------------------------------------------

DEAD = [0, 7, 47]


def with_dead_inputs() -> Tensor:
    x = tokens()
    x[:, DEAD] = 0
    return x


def test_inputs_that_never_fire_are_cut_first(site_of: SiteMaker, naive: ModuleType) -> None:
    site = site_of(normal(33, WIDTH), with_dead_inputs())
    mask = pruned(SparseGPT(sparsity=0.05), site).mask_OI  # 79 of 1584, where 99 are dead
    assert int((~mask[:, DEAD]).sum()) == naive.dropped(33 * WIDTH, "0.05")
    assert site.ledger["dead_inputs"] == 3


def test_a_kept_weight_of_a_dead_input_does_not_change(site_of: SiteMaker) -> None:
    w = normal(33, WIDTH)
    result = pruned(SparseGPT(sparsity=0.05), site_of(w, with_dead_inputs()))
    assert torch.equal(result.dense()[:, DEAD], w[:, DEAD] * result.mask_OI[:, DEAD])
    assert int(result.mask_OI[:, DEAD].sum()) == 20  # the 99 less the 79 that go


@pytest.mark.parametrize("options", [{"sparsity": "2:4"}, {"scope": "row"}, {}], ids=str)
def test_dead_inputs_do_not_change_counts(options: dict[str, Any], site_of: SiteMaker) -> None:
    masks = [
        pruned(SparseGPT(block=16, **options), site_of(normal(33, WIDTH), x)).mask_OI
        for x in (tokens(), with_dead_inputs())
    ]
    assert masks[0].sum() == masks[1].sum()


def test_no_input_ever_fires(site_of: SiteMaker) -> None:
    w = normal(33, WIDTH)
    result = pruned(SparseGPT(sparsity="2:4"), site_of(w, torch.zeros(20, WIDTH)))
    assert torch.equal(result.dense(), w * result.mask_OI)


def test_fewer_tokens_than_inputs_suffice(site_of: SiteMaker, naive: ModuleType) -> None:
    w, x = normal(33, WIDTH), tokens(count=20)
    result = SparseGPT().rewrite(site_of(w, x)).dense()
    assert bool(torch.isfinite(result).all())
    assert naive.proxy_loss(w, result, x.T @ x) < naive.proxy_loss(
        w, Wanda().rewrite(site_of(w, x)).dense(), x.T @ x
    )  # fmt: skip


def test_an_input_that_is_not_finite_is_refused(site_of: SiteMaker) -> None:
    x = tokens()
    x[5, 5] = float("nan")
    with pytest.raises(CalibrationError, match="is not finite"):
        site_of(normal(33, WIDTH), x)
    with pytest.raises(CalibrationError, match="the Gram matrix is not finite"):
        SparseGPT().rewrite(site_of(normal(33, WIDTH), gram_II=x.T @ x))


@every_pattern
def test_a_weight_that_is_not_a_number_is_refused(options: dict[str, Any], site_of: SiteMaker) -> None:
    w = normal(32, WIDTH)
    w[3, 4] = float("nan")
    with pytest.raises(CalibrationError, match="a pruning score is NaN"):
        SparseGPT(block=16, **options).rewrite(site_of(w, tokens()))


def test_a_hopeless_gram_is_pruned_by_magnitude_and_recorded(site_of: SiteMaker) -> None:
    hopeless = torch.eye(WIDTH)
    hopeless[0, 1] = hopeless[1, 0] = 100.0  # no damping of the ladder makes this positive definite
    site = site_of(normal(33, WIDTH), gram_II=hopeless)
    result = SparseGPT().rewrite(site)
    assert torch.equal(result.dense(), Magnitude().rewrite(site_of(normal(33, WIDTH))).dense())
    assert site.fallbacks == [
        (
            "sparsegpt",
            "the Gram was not positive definite even at 1000 times the damping; pruned by magnitude, uncompensated",
        )
    ]


@every_pattern
def test_an_expert_without_tokens_is_pruned_by_magnitude(options: dict[str, Any], site_of: SiteMaker) -> None:
    site = site_of(normal(32, WIDTH))
    result = SparseGPT(**options).rewrite_unfed(site)
    assert torch.equal(result.dense(), Magnitude(**options).rewrite(site).dense())


# -- rounding in the same sweep --------------------------------------------------------------------


@pytest.mark.parametrize("grid", [{}, {"symmetric": True}, {"group": 0}, {"bits": 2}, {"bits": 8}], ids=str)
@every_pattern
def test_rounding_keeps_zeros_exact(options: dict[str, Any], grid: dict[str, Any], site_of: SiteMaker) -> None:
    site = site_of(normal(32, WIDTH), tokens())
    site.weight = pruned(SparseGPT(**{"bits": 4, "group": 8, "block": 16, **grid, **options}), site)
    mask = site.weight.mask_OI
    assert int(site.weight.values.dense()[~mask].count_nonzero()) == 0
    assert int(site.module.weight[~mask].count_nonzero()) == 0
    assert site.weight.describe().startswith(pattern(**{"sparsity": 0.5, "scope": "matrix", **options}).name)


@pytest.mark.parametrize("grid", [{"group": 8}, {"group": 0}, {"group": 8, "symmetric": True}], ids=str)
def test_rounding_alone_is_gptq(grid: dict[str, Any], site_of: SiteMaker) -> None:
    site, other = (site_of(normal(33, WIDTH), tokens()) for _ in range(2))
    joint, plain = SparseGPT(sparsity=0.0, bits=4, **grid).rewrite(site), GPTQ(bits=4, **grid).rewrite(other)
    assert torch.equal(joint.dense(), plain.dense())
    assert site.ledger["loss"] == pytest.approx(other.ledger["loss"], rel=1e-6)


@pytest.mark.parametrize("bits", [3, 4])
@pytest.mark.parametrize("sparsity", [0.5, "2:4"])
def test_rounding_in_the_same_sweep_beats_rounding_afterwards(
    sparsity: float | str, bits: int, site_of: SiteMaker, naive: ModuleType
) -> None:
    w, x = normal(33, WIDTH), tokens()
    joint = SparseGPT(sparsity=sparsity, bits=bits, group=8).rewrite(site_of(w, x))
    site = site_of(w, x)
    site.weight = SparseGPT(sparsity=sparsity).rewrite(site)
    after = RTN(bits=bits, group=8).rewrite(site)
    assert naive.proxy_loss(w, joint.dense(), x.T @ x) < naive.proxy_loss(w, after.dense(), x.T @ x)


# -- refusals --------------------------------------------------------------------------------------


def test_rounding_needs_the_update() -> None:
    with pytest.raises(RecipeError, match=r"sparsegpt\.bits: rounding is part of the update; it needs update: true"):
        SparseGPT(bits=4, update=False)


@pytest.mark.parametrize(
    ("step", "reason"),
    [
        (SparseGPT(bits=4, group=20), "group 20 does not divide its width of 48"),
        (SparseGPT(sparsity="2:5"), "2:5 needs a width divisible by 5, got 48"),
        (SparseGPT(scope="16x20"), "blocks of 16x20 do not tile a matrix of 32x48"),
        (SparseGPT(scope="16x16", block=24), "blocks of 24 columns do not hold whole tiles of 16"),
    ],
    ids=str,
)
def test_what_does_not_fit_the_matrix_is_refused(step: SparseGPT, reason: str) -> None:
    with pytest.raises(RecipeError, match=f"sparsegpt: blocks.0.proj: {reason}"):
        step.check("blocks.0.proj", (32, WIDTH))


def test_a_group_is_only_asked_of_what_is_rounded() -> None:
    SparseGPT(group=20).check("blocks.0.proj", (32, WIDTH))


def test_a_pruned_weight_is_not_pruned_again(site_of: SiteMaker) -> None:
    site = site_of(normal(33, WIDTH), tokens())
    site.weight = Masked(Dense(normal(33, WIDTH)), normal(33, WIDTH) > 0, "2:4")
    with pytest.raises(UnsupportedWeight, match=r"needs a dense weight; blocks\.0\.proj is already 2:4"):
        SparseGPT().rewrite(site)


def test_tiles_wider_than_a_group_keep_their_blocks_whole(site_of: SiteMaker) -> None:
    step = SparseGPT(sparsity=0.5, scope="16x16", block=32, bits=4, group=24)
    kept = step.rewrite(site_of(normal(32, 96), normal(200, 96, seed=1))).mask_OI
    tiles = kept.unflatten(1, (6, 16)).unflatten(0, (2, 16)).sum((1, 3))
    assert set(tiles.flatten().tolist()) == {0, 256}
    assert int(kept.sum()) == 32 * 96 // 2


def test_joint_rounding_holds_without_statistics_too(site_of: SiteMaker) -> None:
    step = SparseGPT(sparsity="2:4", bits=4, group=8)
    weight = step.rewrite_unfed(site_of(normal(16, 32), normal(3, 32, seed=1)))
    assert weight.describe() == "2:4·int4g8"
    assert int(weight.dense()[~weight.mask_OI].count_nonzero()) == 0


@pytest.mark.parametrize(("sparsity", "group"), [("2:3", 16), ("6:12", 16), ("3:6", 0), ("8:16", 24), ("2:4", 24)])
def test_groups_that_strips_do_not_hold_see_every_update(sparsity: str, group: int, site_of: SiteMaker) -> None:
    """The whole width as one strip is a plain loop over columns."""
    w, x = normal(16, 96), normal(200, 96, seed=1)
    step = SparseGPT(sparsity=sparsity, bits=4, group=group, block=96)
    masks = []
    for strip in (feedback.STRIP, 96):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(feedback, "STRIP", strip)
            masks.append(step.rewrite(site_of(w, x)).mask_OI)
    assert torch.equal(*masks)
