"""SLiM, with masks, codes and factors in alternation: each step helps, the clip is optimal, pruned entries stay 0."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import GPTQ, RTN, Calibration, Magnitude, Masked, Quantized, Recipe, RecipeError, Sum, Wanda, run
from compress.artifact import Artifact
from compress.errors import UnsupportedWeight
from compress.model.site import Site
from compress.passes.hybrid.repair import Repair
from compress.passes.hybrid.slim import ClippedGrid, SLiM, best_clip, raised
from compress.stats import ColumnNorm, Gram
from compress.weights import Weight

SiteMaker = Callable[..., Site]
ROWS, WIDTH = 40, 64
PAPER: dict[str, Any] = {"rounding": "nearest", "metric": "diagonal", "group": -1, "rounds": 1}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tokens() -> Tensor:
    """Correlated inputs with channels of different loudness."""
    mixing = torch.eye(WIDTH) + normal(WIDTH, WIDTH, seed=1) / WIDTH**0.5
    return normal(400, WIDTH, seed=2) @ mixing * normal(WIDTH, seed=3).exp()


@pytest.fixture
def site(site_of: SiteMaker) -> Site:
    """A dense site with measured inputs."""
    return site_of(normal(ROWS, WIDTH), tokens())


@pytest.fixture
def loss(site: Site, naive: ModuleType) -> Callable[[Weight], float]:
    """The output error of an expression there."""
    return lambda weight: naive.proxy_loss(site.target.data, weight.dense(), site.stats[Gram])


def parts(result: Weight) -> tuple[Masked, Weight]:
    """The masked term and the factors."""
    assert isinstance(result, Sum)
    masked, factors = result.terms
    assert isinstance(masked, Masked)
    assert isinstance(masked.values, Quantized)
    return masked, factors


# -- SLiM-Quant ------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("power", [1, 3], ids=["normal", "heavy-tailed"])
def test_the_clip_is_the_best_of_all(bits: int, power: int, naive: ModuleType) -> None:
    """To 2 %: a bin is 1/512 of the range wide, and where the error is least it is flat."""
    w = normal(64, 96, seed=bits) ** power
    least = naive.least_clipped_error(w, bits, 1000)
    found = naive.clipped_error(w, best_clip(w, bits), bits)
    assert found <= 1.02 * least
    assert found <= naive.clipped_error(w, float(w.abs().max()), bits)


def test_the_clip_of_two_outliers_is_no_worse_than_the_whole_range(naive: ModuleType) -> None:
    """A histogram has them in the middle of its last bins, half a bin nearer to the others than they are."""
    w = normal(40, 64)
    w[0, 0], w[-1, -1] = 1e4, -1e4
    assert naive.clipped_error(w, best_clip(w, 4), 4) <= naive.clipped_error(w, 1e4, 4)


def test_the_grid_is_that_of_the_clip(naive: ModuleType) -> None:
    w = normal(64, 96)
    quantized = ClippedGrid(bits=4).quantize(w)
    assert (quantized.scale.shape, quantized.zero, quantized.group) == (
        (1, 1),
        None,
        RTN(group=-1).grid.quantize(w).group,
    )
    error = float((quantized.dense().double() - w).square().sum())
    assert error == pytest.approx(naive.clipped_error(w, best_clip(w, 4), 4), rel=1e-2)  # its scale is a float16


def test_a_matrix_of_zeros_stays_one() -> None:
    assert int(ClippedGrid(bits=4).quantize(torch.zeros(4, 8)).dense().count_nonzero()) == 0


# -- the steps -------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [PAPER, PAPER | {"group": 32}], ids=["tensor", "group"])
def test_adapters_beat_what_they_correct(options: dict[str, Any], site: Site, loss: Callable[[Weight], float]) -> None:
    masked, _ = parts(SLiM(sparsity="2:4", **options).rewrite(site))
    wanda = Wanda(sparsity="2:4").rewrite(site)
    assert isinstance(wanda, Masked)
    assert torch.equal(masked.mask_OI, wanda.mask_OI)
    site.weight = wanda
    alone = RTN(bits=4, group=options["group"], symmetric=options["group"] < 0).rewrite(site)
    site.weight = site.original
    assert loss(SLiM(sparsity="2:4", **options).rewrite(site)) < loss(alone)


@pytest.mark.parametrize("options", [PAPER, {}, {"rounding": "nearest"}, {"metric": "diagonal"}], ids=str)
def test_codes_made_again_for_what_factors_leave_are_better(
    options: dict[str, Any], site: Site, loss: Callable[[Weight], float]
) -> None:
    step = SLiM(sparsity="2:4", share=0.2, **options)
    code = step.by_feedback(site) if step.rounding == "feedback" else step.to_nearest(site, site.target.data.abs())
    assert code is not None
    first, recoded, refitted, *_ = map(loss, step.tried(site.target.data, code, step.weighing(site)))
    assert min(recoded, refitted) < first
    if step.metric == "diagonal":  # by the full Gram the first factors fit the first codes best
        assert recoded < first


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_more_rounds_are_never_worse(rounding: str, site: Site, loss: Callable[[Weight], float]) -> None:
    losses = [loss(SLiM(sparsity="2:4", rounding=rounding, rounds=n).rewrite(site)) for n in (1, 2, 4, 8)]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]


def test_the_best_of_the_rounds_is_kept(site: Site, loss: Callable[[Weight], float]) -> None:
    result = SLiM(sparsity="2:4", rounds=3).rewrite(site)
    errors = site.ledger["output_errors"]
    assert len(errors) == 7
    assert min(errors) == pytest.approx(loss(result) ** 0.5, rel=1e-4)


def test_feedback_and_the_gram_beat_the_paper(site: Site, loss: Callable[[Weight], float]) -> None:
    losses = [
        loss(SLiM(sparsity="2:4", **options).rewrite(site))
        for options in ({}, {"rounding": "nearest", "rounds": 1}, PAPER | {"group": 64}, PAPER)
    ]
    assert losses == sorted(losses)


def test_it_beats_a_correction_afterwards(site: Site, loss: Callable[[Weight], float]) -> None:
    ours = SLiM(bits=2, group=32, precision="int8").rewrite(site)
    site.weight = GPTQ(bits=2, group=32).rewrite(site)
    theirs = Repair(precision="int8").rewrite(site)
    assert ours.nbytes() == theirs.nbytes()
    assert loss(ours) < loss(theirs) < loss(site.weight)


def test_a_shorter_range_helps_few_bits(site: Site, loss: Callable[[Weight], float]) -> None:
    losses = [loss(SLiM(bits=2, search=search).rewrite(site)) for search in (True, False)]
    assert losses[0] < losses[1]


# -- masks -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [-1, 32])
@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
@pytest.mark.parametrize("sparsity", ["2:4", 0.5], ids=["2:4", "50%"])
def test_the_base_is_zero_where_the_mask_cuts(sparsity: Any, rounding: str, group: int, site: Site) -> None:
    masked, factors = parts(SLiM(sparsity=sparsity, rounding=rounding, group=group).rewrite(site))
    assert masked.pattern.startswith("2:4" if sparsity == "2:4" else "50%")
    assert int(masked.mask_OI.sum()) == ROWS * WIDTH // 2
    if sparsity == "2:4":
        assert torch.equal(masked.mask_OI.unflatten(1, (-1, 4)).sum(-1), torch.full((ROWS, WIDTH // 4), 2))
    assert int(masked.values.dense()[~masked.mask_OI].count_nonzero()) == 0  # on the grid itself
    assert factors.describe() == "r4"


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_a_mask_that_is_there_stays(rounding: str, site: Site) -> None:
    before = Magnitude(sparsity="2:4").rewrite(site)
    assert isinstance(before, Masked)
    site.weight = before
    masked, _ = parts(SLiM(rounding=rounding).rewrite(site))
    assert torch.equal(masked.mask_OI, before.mask_OI)
    with pytest.raises(UnsupportedWeight, match=r"slim: blocks\.0\.proj is already 2:4; leave out sparsity"):
        SLiM(sparsity="2:4", rounding=rounding).rewrite(site)


@pytest.mark.parametrize("rounding", ["nearest", "feedback"])
def test_without_sparsity_nothing_is_cut(rounding: str, site: Site) -> None:
    assert SLiM(group=32, rounding=rounding).rewrite(site).describe() == "int4g32 + r4"


def test_silent_inputs_still_differ(site_of: SiteMaker) -> None:
    """By the smallest norm above 0: among them the larger weight is kept."""
    assert torch.equal(raised(torch.tensor([0.0, 3.0, 2.0])), torch.tensor([2.0, 3.0, 2.0]))
    assert torch.equal(raised(torch.zeros(2)), torch.ones(2))
    x = tokens()
    x[:, :4] = 0
    silent = site_of(normal(ROWS, WIDTH), x)
    masked, _ = parts(SLiM(sparsity="2:4", rounding="nearest").rewrite(silent))
    largest = silent.target.data[:, :4].abs().topk(2, dim=1).indices
    assert bool(masked.mask_OI[:, :4].gather(1, largest).all())
    assert SLiM(sparsity="2:4").rewrite(silent).dense().isfinite().all()


# -- without what it needs -------------------------------------------------------------------------


def test_without_a_factor_of_the_gram_it_rounds_to_nearest_loudly(site: Site) -> None:
    site.stats.values[Gram] = site.stats[Gram] - 1e6 * torch.eye(WIDTH)
    masked, _ = parts(SLiM(sparsity="2:4").rewrite(site))
    assert "rounded to nearest" in site.fallbacks[0][1]
    kept = Wanda(sparsity="2:4").rewrite(site)
    assert isinstance(kept, Masked)
    assert torch.equal(masked.mask_OI, kept.mask_OI)


def test_without_statistics_magnitudes_decide(site_of: SiteMaker) -> None:
    unfed = site_of(normal(ROWS, WIDTH))
    masked, factors = parts(SLiM(sparsity="2:4").rewrite_unfed(unfed))
    kept = Magnitude(sparsity="2:4").rewrite(unfed)
    assert isinstance(kept, Masked)
    assert torch.equal(masked.mask_OI, kept.mask_OI)
    assert factors.describe() == "r4"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": "5:4"}, r"^slim\.sparsity"),
        ({"sparsity": 1.5}, r"^slim\.sparsity"),
        ({"group": -1, "search": True}, r"^slim\.search: SLiM-Quant has a search of its own"),
        ({"rounds": 0}, r"^slim\.rounds"),
    ],
    ids=str,
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        SLiM(**options)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({"group": 48}, (64, 64), "group 48 does not divide its width of 64"),
        ({"sparsity": "2:4", "group": 0}, (64, 63), "4"),
        ({"rank": 32}, (64, 64), "no smaller"),
    ],
    ids=str,
)
def test_shapes_that_do_not_fit_are_refused(options: dict[str, Any], shape: tuple[int, int], message: str) -> None:
    with pytest.raises(RecipeError, match=rf"slim: a\.b: .*{message}"):
        SLiM(**options).check("a.b", shape)


# -- the whole way ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["half", "int4"])
def test_an_artifact_loads_lowers_and_computes_the_sum(
    precision: str, tiny_llama: Path, tmp_path: Path, ids: Tensor, hugging_face: Callable[[Path], Any],
    assert_close: Callable[..., None],
) -> None:  # fmt: skip
    recipe = Recipe(
        passes=(SLiM(sparsity="2:4", group=8, precision=precision), Repair(rank=2)),
        calibration=Calibration(samples=6, length=32),
    )
    report = run(tiny_llama, recipe, tmp_path / "out")
    model = compress.load(report.out)
    artifact = Artifact(report.out)
    dense = hugging_face(tiny_llama)
    for name in artifact.specs:
        weight = artifact.expression(name)
        assert weight.describe().startswith("2:4·int4g8 + r")
        dense.get_submodule(name).weight.data = weight.dense().float()
    with torch.inference_mode():
        assert_close("logits", model(input_ids=ids).logits, dense(input_ids=ids).logits, 1e-4)


def test_the_norms_are_those_of_wanda(site: Site) -> None:
    assert set(SLiM().requires) == {ColumnNorm, Gram}
