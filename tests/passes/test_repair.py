"""Low-rank corrections: the closed form of the remaining error, what they leave unchanged, when they are refused."""

from __future__ import annotations

from collections.abc import Callable
from math import log
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import GPTQ, RTN, Dense, Masked, Product, Quantized, RecipeError, Rotate, Sum, Wanda
from compress.model.site import Site
from compress.passes import SVD, Pass
from compress.passes.hybrid.repair import Repair
from compress.stats import ColumnNorm, Gram
from compress.weights import pack, specify, unpack

SiteMaker = Callable[..., Site]
Close = Callable[[str, Tensor, Tensor, float], None]
ROWS, WIDTH = 40, 64
HALF = 2.0**-10  # the relative error of a product of two float16 factors


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> Tensor:
    """Correlated inputs with channels of different loudness."""
    mixing = torch.eye(WIDTH) + normal(WIDTH, WIDTH, seed=1) / WIDTH**0.5
    return normal(400, WIDTH, seed=2) @ mixing * normal(WIDTH, seed=3).exp()


@pytest.fixture
def rounded(site_of: SiteMaker) -> Callable[..., Site]:
    """`rounded(*steps)`: a site behind these passes, by default rounded to 2 bits."""

    def make(*steps: Any, x_TI: Tensor | None = None) -> Site:
        site = site_of(normal(ROWS, WIDTH), tokens() if x_TI is None else x_TI)
        for step in steps or (RTN(bits=2),):
            site.weight = step.rewrite(site)
        return site

    return make


def error_of(site: Site) -> Tensor:
    return site.target.data - site.weight.dense().float()


def metric_of(site: Site, kind: str) -> Tensor:
    """The metric of an option as a matrix."""
    match kind:
        case "gram":
            return site.stats[Gram]
        case "diagonal":
            return site.stats[ColumnNorm].square().diag() / 400
        case _:
            return torch.eye(WIDTH)


# -- what is left ----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["gram", "diagonal", "plain"])
def test_all_ranks_restore_the_weight(kind: str, rounded: Callable[..., Site], assert_close: Close) -> None:
    site = rounded()
    assert_close("restored", Repair(rank=ROWS, metric=kind).rewrite(site).dense(), site.target.data, HALF)


@pytest.mark.parametrize("kind", ["gram", "diagonal", "plain"])
def test_what_is_left_is_the_tail_of_the_weighted_singular_values(
    kind: str, rounded: Callable[..., Site], naive: ModuleType
) -> None:
    site = rounded()
    error, metric = error_of(site), metric_of(site, kind)
    squares = torch.linalg.svdvals(error.double() @ torch.linalg.cholesky(metric.double())).square()
    site.weight = Repair(rank=5, metric=kind).rewrite(site)
    assert naive.energy(error_of(site), metric) == pytest.approx(float(squares[5:].sum()), rel=1e-3)
    assert site.ledger["repair"]["left"] == pytest.approx(float(squares[5:].sum() / squares.sum()), rel=1e-4)


@pytest.mark.parametrize("kind", ["gram", "diagonal", "plain"])
def test_no_metric_is_better_in_another_than_that_itself(
    kind: str, rounded: Callable[..., Site], naive: ModuleType
) -> None:
    site = rounded()
    metric = metric_of(site, kind)
    left = {
        other: naive.energy(site.target.data - Repair(rank=5, metric=other).rewrite(site).dense(), metric)
        for other in ("gram", "diagonal", "plain")
    }
    assert left[kind] == min(left.values())


def test_the_output_is_best_by_the_gram_then_by_its_diagonal(rounded: Callable[..., Site], naive: ModuleType) -> None:
    """The first is a theorem, the second what unequal loudness makes likely."""
    site = rounded()
    left = [
        naive.proxy_loss(site.target.data, Repair(rank=8, metric=kind).rewrite(site).dense(), site.stats[Gram])
        for kind in ("gram", "diagonal", "plain")
    ]
    assert left == sorted(left)


def test_it_is_eora_without_the_inverse(rounded: Callable[..., Site], naive: ModuleType, assert_close: Close) -> None:
    site = rounded()
    want = naive.eora(error_of(site), site.stats[Gram], 6)
    result = Repair(rank=6).rewrite(site)
    assert isinstance(result, Sum)
    assert_close("correction", result.terms[1].dense(), want, HALF)


def test_inputs_that_never_fire_need_no_care(rounded: Callable[..., Site]) -> None:
    x = tokens()
    x[:, ::3] = 0
    site = rounded(x_TI=x)
    for kind in ("gram", "diagonal"):
        assert Repair(rank=5, metric=kind).rewrite(site).dense().isfinite().all()


def test_the_ledger_weighs_bits_against_bits(rounded: Callable[..., Site]) -> None:
    site = rounded()
    Repair(rank=4).rewrite(site)
    found = site.ledger["repair"]
    assert found["rank"] == 4
    assert found["costs_bits"] == pytest.approx(16 * 4 * (ROWS + WIDTH) / (ROWS * WIDTH))
    assert found["saves_bits"] == pytest.approx(-log(found["left"], 4))


# -- what it does to an expression -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("steps", "name"),
    [
        ((Wanda(sparsity="2:4"),), "2:4 + r4"),
        ((Wanda(sparsity="2:4"), GPTQ(group=32)), "2:4·int4g32 + r4"),
        ((Rotate(), GPTQ(group=32)), "int4g32@had + r4"),
        ((SVD(removed=0.5), Repair(rank=2)), "r12 + r2 + r4"),
        ((GPTQ(group=32), Repair(rank=2)), "int4g32 + r2 + r4"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_it_adds_to_whatever_is_there(
    steps: tuple[Pass, ...], name: str, rounded: Callable[..., Site], naive: ModuleType
) -> None:
    site = rounded(*steps)
    before = site.weight
    after = Repair(rank=4).rewrite(site)
    assert isinstance(after, Sum)
    assert after.describe() == name
    assert after.terms[:-1] == (before.terms if isinstance(before, Sum) else (before,))
    losses = [naive.proxy_loss(site.target.data, w.dense(), site.stats[Gram]) for w in (after, before)]
    assert losses[0] < losses[1]
    assert torch.equal(unpack(specify(after), pack(after)).dense(), after.dense())


def test_a_zero_of_the_mask_stays_in_its_term_only(rounded: Callable[..., Site]) -> None:
    site = rounded(Wanda(sparsity="2:4"))
    assert isinstance(site.weight, Masked)
    cut = ~site.weight.mask_OI
    after = Repair(rank=4).rewrite(site)
    assert isinstance(after, Sum)
    assert int(after.terms[0].dense()[cut].count_nonzero()) == 0
    assert int(after.dense()[cut].count_nonzero()) == int(cut.sum())


@pytest.mark.parametrize("precision", ["int8", "int4"])
def test_factors_of_integers_cost_their_bits(precision: str, rounded: Callable[..., Site], naive: ModuleType) -> None:
    site = rounded()
    loss = naive.proxy_loss(site.target.data, site.weight.dense(), site.stats[Gram])
    after = Repair(rank=8, precision=precision).rewrite(site)
    assert isinstance(after, Sum)
    factors = after.terms[1]
    assert isinstance(factors, Product)
    assert isinstance(factors.left, Quantized)
    assert factors.nbytes() == int(precision[3:]) * 8 * (ROWS + WIDTH) // 8 + 2 * (1 + 8)
    exact = Repair(rank=8).rewrite(site).dense()
    losses = [naive.proxy_loss(site.target.data, w, site.stats[Gram]) for w in (exact, after.dense())]
    assert losses[0] <= losses[1] < loss


def test_a_weight_without_error_is_left_alone(site_of: SiteMaker) -> None:
    site = site_of(normal(ROWS, WIDTH), tokens())
    assert Repair().rewrite(site) is site.weight
    assert site.ledger["repair"] == "nothing to correct"


def test_without_statistics_weights_alone_decide(rounded: Callable[..., Site]) -> None:
    site = rounded()
    assert torch.equal(Repair().rewrite_unfed(site).dense(), Repair(metric="plain").rewrite(site).dense())


def test_it_needs_no_more_data_than_its_metric() -> None:
    assert Repair(metric="plain").requires == ()
    assert Repair(metric="diagonal").requires == (ColumnNorm,)


# -- refusals --------------------------------------------------------------------------------------


def test_a_share_is_of_the_shorter_side() -> None:
    assert Repair(share=0.1).rank_of((80, 48)) == 4
    assert Repair(share=0.7).rank_of((10, 40)) == 7  # 0.7 * 10 is below 7 in binary


def test_factors_as_large_as_the_matrix_are_refused() -> None:
    Repair(rank=15).check("a.b", (32, 32))
    with pytest.raises(RecipeError, match=r"repair: a\.b: factors of rank 16 are no smaller .* at most rank 15 is"):
        Repair(rank=16).check("a.b", (32, 32))


def test_a_share_that_buys_no_rank_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"repair: a\.b: a share of 0\.1 of 8x64 gives rank 0; raise share"):
        Repair().check("a.b", (8, 64))


@pytest.mark.parametrize("options", [{"rank": 0}, {"share": 0.0}, {"share": 1.0}, {"precision": "int2"}], ids=str)
def test_other_options_are_refused(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"^repair\."):
        Repair(**options)


def test_a_dense_weight_is_nothing_to_repair(tiny_llama: Any, tmp_path: Any) -> None:
    from compress import Recipe, run

    with pytest.raises(RecipeError, match=r"passes\[0\]\.repair: takes a pruned or .* is dense by then"):
        run(tiny_llama, Recipe(passes=(Repair(rank=4),)), tmp_path / "out")


def test_it_corrects_towards_a_moved_target(rounded: Callable[..., Site], assert_close: Close) -> None:
    site = rounded()
    site.target = Dense(normal(ROWS, WIDTH, seed=9))
    assert_close("restored", Repair(rank=ROWS).rewrite(site).dense(), site.target.data, HALF)
