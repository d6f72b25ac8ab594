"""Robust PCA: planted structure is recovered, absent structure is not invented, and the run reports it."""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from pathlib import Path

import pytest
import torch
from torch import Tensor

import compress
from compress import Calibration, Masked, Product, Recipe, RecipeError, Sum
from compress.model.site import Site
from compress.passes import OATS, RPCA, RTN, Reconstruct
from compress.passes.hybrid.rpca import decompose, shrunk
from compress.plan import check_order

SiteMaker = Callable[..., Site]
Close = Callable[[str, Tensor, Tensor, float], None]
SHAPES = pytest.mark.parametrize("shape", [(60, 100), (100, 60), (80, 80)], ids=str)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def planted(rows: int, columns: int, rank: int = 3) -> tuple[Tensor, Tensor]:
    """(L, S) with 3 % of S not 0."""
    low = normal(rows, rank) @ normal(rank, columns, seed=1) / sqrt(rank)
    return low, 5 * normal(rows, columns, seed=2) * (normal(rows, columns, seed=3).abs() > 2.2)


@SHAPES
@pytest.mark.parametrize("by", [0.0, 1.0, 9.0])
def test_singular_values_are_shrunk(shape: tuple[int, int], by: float, assert_close: Close) -> None:
    a = normal(*shape)
    left, right = shrunk(a, by)
    u, s, v = torch.linalg.svd(a, full_matrices=False)
    assert left.shape[1] == int((s > by).sum())
    assert_close("shrunk", left @ right, u * (s - by).clamp(min=0) @ v, 1e-5)


@SHAPES
def test_what_was_planted_is_recovered(shape: tuple[int, int], assert_close: Close) -> None:
    low, sparse = planted(*shape)
    left, right, mask = decompose(low + sparse, 1 / sqrt(max(shape)), 1e-6)
    assert left.shape[1] == 3
    assert_close("low rank", left @ right, low, 1e-3)
    assert bool(mask[sparse != 0].all())
    assert int(mask.sum()) < 1.25 * int((sparse != 0).sum())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scaled", [True, False])
def test_the_weight_becomes_its_two_terms(scaled: bool, dtype: torch.dtype, site_of: SiteMaker) -> None:
    w = sum(planted(60, 100)).to(dtype)  # type: ignore[union-attr]
    site = site_of(w, normal(200, 100, seed=4) * (0.5 * normal(100, seed=5)).exp())
    result = RPCA(scaled=scaled).rewrite(site)
    assert isinstance(result, Sum)
    assert isinstance(result.terms[0], Masked)
    assert isinstance(result.terms[1], Product)
    assert site.ledger["rank"] == 3
    assert not site.fallbacks
    assert result.nbytes() < 0.25 * w.nbytes
    assert float((result.dense().float() - w.float()).norm() / w.float().norm()) < 0.02


def test_a_heavier_lambda_leaves_fewer_entries() -> None:
    a = normal(60, 100)
    found = [decompose(a, lam / 10, 0.01) for lam in (0.5, 1.0, 2.0)]
    entries, ranks = [int(mask.sum()) for _, _, mask in found], [left.shape[1] for left, _, _ in found]
    assert entries == sorted(entries, reverse=True)
    assert ranks == sorted(ranks)
    assert len(set(entries)) == 3


def test_a_matrix_that_is_not_of_that_kind_stays_whole(site_of: SiteMaker) -> None:
    site = site_of(normal(60, 100), normal(200, 100, seed=4))
    result = RPCA().rewrite(site)
    assert result is site.original
    ((name, reason),) = site.fallbacks
    assert name == "rpca"
    assert reason.startswith("left unchanged: rank ")
    assert float(reason.split()[-4]) > 1


def test_a_term_that_is_not_there_is_not_stored(site_of: SiteMaker, assert_close: Close) -> None:
    sparse = planted(60, 100)[1]
    alone = RPCA(scaled=False).rewrite_unfed(site_of(sparse))
    assert isinstance(alone, Masked)
    assert_close("sparse", alone.dense(), sparse, 0.01)
    assert not RPCA().rewrite_unfed(site_of(torch.zeros(6, 8))).dense().any()
    assert RPCA(scaled=False).requires == ()


def test_what_refines_masks_is_refused_after_two_terms() -> None:
    check_order(["a"], [OATS(), RTN()])
    with pytest.raises(RecipeError, match=r"passes\[1\].oats: takes a dense weight; a is split by then"):
        check_order(["a"], [OATS(), OATS()])
    with pytest.raises(RecipeError, match=r"passes\[1\].reconstruct: takes a pruned weight; a is split by then"):
        check_order(["a"], [OATS(), Reconstruct()])


def test_a_model_left_whole_makes_no_artifact(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(RPCA(),), calibration=Calibration(samples=6, length=32))
    with pytest.raises(RecipeError, match="the passes left every weight as it was; there is nothing to write"):
        compress.run(tiny_llama, recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()
