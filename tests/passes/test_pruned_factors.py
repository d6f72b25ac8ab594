"""Pruned low-rank factors: each is pruned as a matrix of its own, with the statistics of its own inputs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import (
    ALPS,
    GPTQ,
    HQQ,
    OATS,
    RTN,
    SVDLLM,
    VQ,
    Calibration,
    Dense,
    Magnitude,
    Masked,
    Product,
    Quantized,
    RecipeError,
    SparseGPT,
    Sum,
    UnsupportedWeight,
    Wanda,
)
from compress.artifact import Artifact, verify
from compress.model.site import Site
from compress.passes.masks import mask_statistics

SiteMaker = Callable[..., Site]
FEW = Calibration(samples=6, length=32)
PRUNERS = (Magnitude, Wanda, SparseGPT, ALPS)
each_pruner = pytest.mark.parametrize("kind", PRUNERS, ids=lambda kind: kind.name)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def loud(count: int, width: int) -> Tensor:
    """Tokens whose features are of different loudness."""
    return normal(count, width, seed=1) * normal(width, seed=2).exp()


def factored(site_of: SiteMaker, rank: int = 12, columns: int = 64) -> tuple[Site, Tensor, Tensor, Tensor]:
    """A site of two factors, the factors and its tokens."""
    left, right, x = normal(48, rank, seed=3), normal(rank, columns, seed=4), loud(400, columns)
    site = site_of(left @ right, x)
    site.weight = Product(Dense(left), Dense(right))
    return site, left, right, x


@each_pruner
def test_a_factor_is_pruned_as_a_matrix_with_its_own_input(
    kind: Any, site_of: SiteMaker, assert_close: Callable[..., None]
) -> None:
    site, left, right, x = factored(site_of)
    step = kind(sparsity="2:4", factors=True)
    inner = step.rewrite(site_of(right, x))
    outer = step.rewrite(site_of(left, x @ inner.dense().T))
    made = step.rewrite(site)
    assert torch.equal(made.right.mask_OI, inner.mask_OI) and torch.equal(made.left.mask_OI, outer.mask_OI)
    assert_close("right", made.right.dense(), inner.dense(), 1e-6)
    assert_close("left", made.left.dense(), outer.dense(), 1e-4)  # its Gram is W G Wᵀ, not summed over tokens


def test_norms_behind_a_factor_are_those_of_its_tokens(site_of: SiteMaker) -> None:
    site, left, right, x = factored(site_of)
    outer, _ = site.factors(left, right)
    torch.testing.assert_close(outer.stats[compress.stats.ColumnNorm], (x @ right.T).norm(dim=0), rtol=1e-4, atol=0)


@each_pruner
def test_a_rank_that_the_pattern_does_not_divide_is_filled_up(kind: Any, site_of: SiteMaker) -> None:
    site, *_ = factored(site_of, rank=9)
    made = kind(sparsity="2:4", factors=True).rewrite(site)
    assert (made.left.shape, made.right.shape) == ((48, 12), (12, 64))
    assert made.left.mask_OI.view(48, 3, 4).sum(-1).eq(2).all()
    assert not made.right.dense()[9:].any()


def test_the_record_of_a_site_is_of_its_own_inputs_and_not_of_a_rank(site_of: SiteMaker) -> None:
    """A rank that is filled up has inputs that are always 0, and whose weights are all pruned or 0."""
    site, *_ = factored(site_of, rank=9)
    made = SparseGPT(sparsity="2:4", factors=True).rewrite(site)
    assert site.ledger["dead_inputs"] == 0
    inner, outer = (int((~factor.mask_OI.any(0)).sum()) for factor in (made.right, made.left))
    assert mask_statistics(made)["mask"]["empty_inputs"] == inner != outer


def test_compensation_beats_the_mask_alone_in_factors_too(site_of: SiteMaker, naive: ModuleType) -> None:
    site, *_, x = factored(site_of)
    gram = x.T @ x / len(x)
    losses = [
        naive.proxy_loss(site.weight.dense(), kind(sparsity=0.5, factors=True).rewrite(site).dense(), gram)
        for kind in (Wanda, SparseGPT)
    ]
    assert losses[1] < 0.8 * losses[0]


def test_of_a_sum_only_the_factors_are_pruned(site_of: SiteMaker) -> None:
    site = site_of(normal(48, 64), loud(400, 64))
    site.weight = before = OATS(sparsity=0.5).rewrite(site)
    made = Wanda(sparsity="2:4", factors=True).rewrite(site)
    assert isinstance(made, Sum) and isinstance(before, Sum)
    assert made.terms[0] is before.terms[0]
    assert [type(factor) for factor in made.terms[1].children()] == [Masked, Masked]
    assert made.terms[1].describe() == f"2:4·r{made.terms[1].left.shape[1]}"


def test_a_plain_weight_is_pruned_as_without_it(site_of: SiteMaker) -> None:
    w, x = normal(48, 64), loud(400, 64)
    for kind in PRUNERS:
        told, plain = (kind(sparsity="2:4", factors=on).rewrite(site_of(w, x)) for on in (True, False))
        assert torch.equal(told.mask_OI, plain.mask_OI) and torch.equal(told.dense(), plain.dense())


@pytest.mark.parametrize(
    "step", [RTN(bits=4, group=0), GPTQ(bits=4, group=8), HQQ(bits=4, group=0)], ids=lambda step: step.name
)
def test_rounding_keeps_the_masks_of_factors(step: Any, site_of: SiteMaker) -> None:
    site, *_ = factored(site_of)
    site.weight = pruned = SparseGPT(sparsity="2:4", factors=True).rewrite(site)
    made = replace(step, factors=True).rewrite(site)
    for before, after in zip(pruned.children(), made.children(), strict=True):
        assert isinstance(after, Masked) and isinstance(after.values, Quantized)
        assert torch.equal(after.mask_OI, before.mask_OI)
        assert not after.dense()[~before.mask_OI].any()


def test_a_factor_has_one_grid_a_row_where_groups_do_not_divide_it(site_of: SiteMaker) -> None:
    site, left, right, _ = factored(site_of, rank=12)
    step, outer = SparseGPT(sparsity="2:4", factors=True, bits=4, group=8), site.factors(left, right)[0]
    made, want = step.prune(outer), replace(step, group=0).prune(outer)
    assert torch.equal(made.dense(), want.dense())
    for found in (made, step.prune_unfed(outer), step.outlined(outer)):
        assert found.values.scale.shape == (48, 1)
    assert step.rewrite(site).right.values.scale.shape == (12, 8)


def test_codes_of_pruned_factors_are_refused(site_of: SiteMaker) -> None:
    site, *_ = factored(site_of, rank=16)
    site.weight = Wanda(sparsity="2:4", factors=True).rewrite(site)
    with pytest.raises(UnsupportedWeight, match="a pruned factor has zeros"):
        VQ(factors=True).rewrite(site)


def test_tiles_that_do_not_fit_a_factor_are_refused(site_of: SiteMaker) -> None:
    site, *_ = factored(site_of, rank=10)
    with pytest.raises(UnsupportedWeight, match=r"wanda: blocks\.0\.proj: a factor of 10 x 64: "):
        Wanda(sparsity=0.5, scope="4x4", factors=True).rewrite(site)


def test_factors_do_not_go_with_rows_of_unequal_sparsity() -> None:
    with pytest.raises(RecipeError, match=r"wanda\.factors: cannot be combined with alpha"):
        Wanda(alpha=True, factors=True)


def test_factors_are_pruned_only_if_told_and_refined_by_nobody(tiny_llama: Path, tmp_path: Path) -> None:
    for steps, said in (
        (
            (SVDLLM(removed=0.4), Wanda(sparsity="2:4")),
            r"passes\[1\]\.wanda: takes a dense weight; .*set factors: true",
        ),
        (
            (SVDLLM(removed=0.4), Wanda(sparsity="2:4", factors=True), compress.DSnoT()),
            r"passes\[2\]\.dsnot: takes a pruned weight; .* is factored by then",
        ),
    ):
        with pytest.raises(RecipeError, match=said):
            compress.run(tiny_llama, list(steps), tmp_path / "o", calibration=FEW)


@pytest.mark.parametrize("shared", [False, True])
def test_pruned_and_rounded_factors_are_saved_loaded_and_foreseen(
    shared: bool, tiny_llama: Path, tmp_path: Path
) -> None:
    from compress.planning import plan_run

    steps = (SVDLLM(removed=0.2, shared=shared), SparseGPT(sparsity="2:4", factors=True), RTN(group=0, factors=True))
    recipe = compress.Recipe(passes=steps, calibration=FEW)
    planned = plan_run(tiny_llama, recipe)
    out = compress.run(tiny_llama, recipe, tmp_path / "o").out
    verify(out)
    artifact = Artifact(out)
    told = artifact.provenance["sizes"]["bytes"]
    assert planned.bytes == told if not shared else planned.bytes >= told
    expression = artifact.expression("model.layers.0.mlp.down_proj")
    assert expression.describe().startswith("2:4·r")
    model, ids = compress.load(out), torch.arange(40).view(2, 20) + 5
    weight = model.get_submodule("model.layers.0.mlp.down_proj")
    x = normal(3, expression.shape[1])
    torch.testing.assert_close(weight(x), x @ expression.dense().T, rtol=1e-3, atol=1e-4)
    assert model(ids).logits.isfinite().all()
