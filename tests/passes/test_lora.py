"""LoRA: the rank of a merged adapter is found, its product comes nearer than the difference, and the rest is refused.

The oracle is the product itself: it is drawn, merged as PEFT merges (rounded to the dtype, then added) and hidden.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import compress
from compress import Delta, Product, Recipe, RecipeError, UnsupportedWeight
from compress.artifact import Artifact
from compress.model.anatomy import Place
from compress.model.site import DeltaSite, Site
from compress.model.source import Checkpoint, locate
from compress.passes import LoRA, Magnitude
from compress.passes.delta.lora import (
    Merge,
    balanced,
    fitted,
    foretold,
    grid_of,
    leading,
    least_rank,
    merge_of,
    merged,
    step_of,
    suffices,
    unexplained,
)
from compress.passes.whitened import most_rank
from compress.planning.costs import modelled
from compress.weights import Dense, External

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHAPES = {"tall": (300, 60), "wide": (60, 300), "square": (128, 128)}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(name: str) -> Tensor:
    """A matrix of the built-in model, whose rows and columns have very different sizes."""
    return Checkpoint(locate("builtin")).tensor(f"model.layers.{name}.weight")


def product_of(rank: int, base: Tensor, share: float, seed: int = 1) -> Tensor:
    """A B of this rank, with `share` of the norm of the base; float64."""
    rows, columns = base.shape
    product_OI = normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 50)
    return product_OI * (share * float(base.double().norm() / product_OI.norm()))


def tuned_by(product_OI: Tensor, base: Tensor) -> Tensor:
    """The fine-tune that PEFT writes: the product rounded to the base's dtype, and the rounded sum."""
    return base + product_OI.to(base.dtype)


def site_of_merge(own: Tensor, base: Tensor) -> DeltaSite:
    """The site of a fine-tuned matrix beside its base."""
    module = nn.Linear(own.shape[1], own.shape[0], bias=False, dtype=own.dtype)
    module.weight.data = own.clone()
    place = Place(site="a.b", tensor="a.b.weight", module="a.b", transposed=False, shape=tuple(own.shape), peers="a.b")
    return DeltaSite("a.b", module, place, External(base, "base", "a.b.weight"))


def error(got: Tensor, want: Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def truncated(merge: Merge, rank: int) -> Tensor:
    left_OK, values_K, right_KI = torch.linalg.svd(merge.change_OI.double(), full_matrices=False)
    return (left_OK[:, :rank] * values_K[:rank]) @ right_KI[:rank]


# -- the rank and the product ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.003, 0.03])
@pytest.mark.parametrize("rank", [1, 4, 16])
@pytest.mark.parametrize("name", ["1.self_attn.k_proj", "2.mlp.down_proj"])
def test_an_adapter_of_the_built_in_model_is_found(name: str, rank: int, share: float, dtype: str) -> None:
    base = trained(name).to(DTYPES[dtype])
    true_OI = product_of(rank, base, share)
    site = site_of_merge(tuned_by(true_OI, base), base)
    found = LoRA().rewrite(site)
    assert site.ledger["rank"] == rank
    merge = merged(site, "lora")
    got = error(found.dense(), true_OI)
    own_rounding = torch.finfo(torch.float32).eps / 2  # of factors in float32
    assert got < 0.9 * error(truncated(merge, rank), true_OI) + own_rounding
    assert got < 0.3 * error(merge.change_OI, true_OI)
    assert got < {"float32": 1e-5, "float16": 0.04, "bfloat16": 0.15}[dtype]
    assert site.ledger["reproduced"] > 0.85


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
def test_an_adapter_of_a_random_matrix_is_found(shape: str, dtype: str) -> None:
    base = (0.02 * normal(*SHAPES[shape])).to(DTYPES[dtype])
    true_OI = product_of(4, base, 0.01)
    site = site_of_merge(tuned_by(true_OI, base), base)
    found = LoRA().rewrite(site)
    assert site.ledger["rank"] == 4
    assert found.shape == base.shape
    assert error(found.dense(), true_OI) < 0.5 * error(merged(site, "lora").change_OI, true_OI)


def test_an_adapter_far_below_the_rounding_step_is_found() -> None:
    """Nine tenths of the entries do not change at all, and the difference is 70 % away from the product."""
    base = trained("2.mlp.down_proj")
    true_OI = product_of(4, base, 0.001)
    merge = merge_of(tuned_by(true_OI, base), base)
    assert float((merge.change_OI == 0).float().mean()) > 0.75
    assert error(merge.change_OI, true_OI) > 0.7
    left_OR, right_RI = LoRA().recovered(merge, "a.b")
    assert right_RI.shape[0] == 4
    assert error(left_OR @ right_RI, true_OI) < 0.06
    assert error(truncated(merge, 4), true_OI) > 0.4


def test_projections_come_nearer_with_every_few() -> None:
    base = trained("1.self_attn.k_proj")
    true_OI = product_of(4, base, 0.003)
    merge = merge_of(tuned_by(true_OI, base), base)
    start = least_rank(merge, 16)
    assert start is not None
    errors = [error(torch.matmul(*fitted(merge, *start, steps)), true_OI) for steps in (0, 10, 100)]
    assert errors[0] == pytest.approx(error(truncated(merge, 4), true_OI), rel=1e-3)
    assert errors[1] < errors[0] / 2 and errors[2] < errors[1] / 1.2


def test_a_strong_adapter_is_found_too() -> None:
    base = trained("1.self_attn.k_proj")
    true_OI = product_of(8, base, 1.0)
    site = site_of_merge(tuned_by(true_OI, base), base)
    found = LoRA().rewrite(site)
    assert site.ledger["rank"] == 8
    assert error(found.dense(), true_OI) < 2**-8  # the factors' own rounding to bfloat16


def test_two_adapters_in_one_matrix_are_one_of_the_rank_of_both() -> None:
    base = trained("1.self_attn.k_proj")
    both_OI = product_of(3, base, 0.02) + product_of(2, base, 0.005, seed=9)
    site = site_of_merge(tuned_by(both_OI, base), base)
    LoRA().rewrite(site)
    assert site.ledger["rank"] == 5


def test_factors_share_their_size_evenly() -> None:
    left_OR, right_RI = balanced(1e5 * normal(40, 3), normal(3, 70, seed=1))
    torch.testing.assert_close(left_OR @ right_RI, 1e5 * normal(40, 3) @ normal(3, 70, seed=1))
    torch.testing.assert_close(left_OR.T @ left_OR, right_RI @ right_RI.T)
    assert float(left_OR.abs().max()) < 65504 / 10 > float(right_RI.abs().max())


def test_the_dtype_of_the_factors_is_the_model_s() -> None:
    base = trained("1.self_attn.k_proj").half()
    match LoRA().rewrite(site_of_merge(tuned_by(product_of(2, base, 0.01), base), base)):
        case Product(Dense(left), Dense(right)):
            assert left.dtype == right.dtype == torch.float16
        case other:
            pytest.fail(other.describe())


def test_a_wider_file_of_narrower_values_is_judged_by_the_values() -> None:
    base = trained("1.self_attn.k_proj")
    own = tuned_by(product_of(4, base, 0.01), base)
    site = site_of_merge(own.float(), base.float())
    LoRA().rewrite(site)
    assert site.ledger["rank"] == 4
    assert grid_of(own.float()) == torch.bfloat16
    assert grid_of(own.half().float()) in (torch.bfloat16, torch.float16)
    assert grid_of(normal(4, 4).float()) == torch.float32


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_step_is_the_distance_to_the_next_number(dtype: str) -> None:
    kind = DTYPES[dtype]
    w = torch.cat([normal(200).abs(), torch.tensor([1.0, 2.0, 6e-5, 1e-6], dtype=torch.float64)]).to(kind)
    bits = {2: torch.int16, 4: torch.int32}[kind.itemsize]
    above = (w.view(bits) + 1).view(kind).double() - w.double()
    assert torch.equal(step_of(w.double(), kind), above)
    assert float(step_of(torch.zeros(1, dtype=torch.float64), torch.float16)) == 2**-24


def test_leading_directions_of_a_large_matrix_are_those_of_the_decomposition() -> None:
    w = product_of(5, normal(400, 500), 1.0) + 0.01 * normal(400, 500)
    left_OK, values_K, right_KI = leading(w, 6)
    want = torch.linalg.svdvals(w)
    torch.testing.assert_close(values_K[:5], want[:5], rtol=1e-9, atol=0)
    assert values_K[5] == pytest.approx(float(want[5]), rel=0.05)
    close = truncated(merge_of(w.float(), torch.zeros(400, 500)), 5)
    torch.testing.assert_close((left_OK[:, :5] * values_K[:5]) @ right_KI[:5], close, rtol=0, atol=1e-4)


def test_a_rank_suffices_where_rounding_explains_what_follows() -> None:
    base = trained("2.mlp.down_proj")
    merge = merge_of(tuned_by(product_of(6, base, 0.01), base), base)
    found = leading(merge.change_OI, 12)
    assert [suffices(merge, *found, rank) for rank in (1, 3, 5, 6, 8)] == [False, False, False, True, True]


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("share", [0.0003, 0.0005, 0.0007, 0.001, 0.003, 0.03])
def test_a_dense_change_is_refused(share: float, dtype: str) -> None:
    base = trained("1.self_attn.k_proj").to(DTYPES[dtype])
    change_OI = normal(*base.shape, seed=3) * (share * float(base.double().norm()) / base.numel() ** 0.5)
    with pytest.raises(RecipeError, match=r"^lora: a\.b: .*is not that of a merged adapter; use --method auto or low"):
        LoRA().rewrite(site_of_merge(tuned_by(change_OI, base), base))


@pytest.mark.parametrize("share", [0.001, 0.02, 0.2])
def test_changes_of_one_step_at_few_entries_are_refused(share: float) -> None:
    """A full fine-tune at a small rate in bfloat16: most entries stay, some move to the next number."""
    base = trained("1.self_attn.k_proj")
    chosen = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)) < share
    own = (base.view(torch.int16) + chosen.to(torch.int16)).view(torch.bfloat16)
    with pytest.raises(RecipeError, match="is not that of a merged adapter"):
        LoRA().rewrite(site_of_merge(own, base))


def test_a_change_that_a_high_rank_fits_by_chance_is_not_foretold() -> None:
    base = trained("1.self_attn.k_proj")
    change_OI = normal(*base.shape, seed=3) * (0.0007 * float(base.double().norm()) / base.numel() ** 0.5)
    chance = merge_of(tuned_by(change_OI, base), base)
    adapter = merge_of(tuned_by(product_of(16, base, 0.003), base), base)
    assert foretold(chance, 40) < 0.3
    assert foretold(adapter, 16) > 0.9
    left_OR, right_RI = fitted(chance, chance.change_OI @ torch.eye(256)[:, :42], torch.eye(256)[:42], 300)
    assert unexplained(chance, left_OR, right_RI)


def test_an_adapter_with_other_changes_beside_it_is_refused() -> None:
    base = trained("1.self_attn.k_proj")
    own = tuned_by(product_of(4, base, 0.01), base)
    scattered = torch.rand(base.shape, generator=torch.Generator().manual_seed(2)) < 0.1
    with pytest.raises(RecipeError, match="is not that of a merged adapter"):
        LoRA().rewrite(site_of_merge(torch.where(scattered, own * 1.05, own), base))


def test_a_rank_above_the_largest_is_refused() -> None:
    base = trained("2.mlp.down_proj")
    site = site_of_merge(tuned_by(product_of(12, base, 0.03), base), base)
    with pytest.raises(RecipeError, match="which no product of rank 8 or less explains"):
        LoRA(largest=8).rewrite(site)
    LoRA(largest=12).rewrite(site)
    assert site.ledger["rank"] == 12


def test_a_narrow_matrix_is_refused_before_any_work() -> None:
    with pytest.raises(RecipeError, match=r"lora: a\.b: 2x300 is too narrow"):
        LoRA().check("a.b", (2, 300))
    LoRA().check("a.b", (8, 300))


def test_it_must_come_first() -> None:
    base = trained("1.self_attn.k_proj")
    site = site_of_merge(tuned_by(product_of(4, base, 0.01), base), base)
    site.weight = Magnitude().rewrite(site)
    with pytest.raises(UnsupportedWeight, match=r"lora must be the first pass; a\.b was changed before it"):
        LoRA().rewrite(site)


def test_bad_options_are_refused() -> None:
    for options in ({"largest": 0}, {"steps": -1}, {"largest": 2.5}):
        with pytest.raises(RecipeError, match=r"^lora\."):
            LoRA(**options)  # type: ignore[arg-type]


# -- in a run --------------------------------------------------------------------------------------


def test_a_matrix_without_a_difference_becomes_one_of_rank_one_and_zero(site_of: Callable[..., Site]) -> None:
    found = LoRA().rewrite(site_of(torch.zeros(40, 60), torch.ones(3, 60)))
    assert found.describe() == "r1"
    assert not found.dense().any()


def test_a_plain_weight_is_its_own_difference_from_zero(site_of: Callable[..., Site]) -> None:
    w = product_of(3, normal(80, 120), 1.0).float()
    site = site_of(w, torch.ones(3, 120))
    found = LoRA().rewrite(site)
    assert site.ledger["rank"] == 3
    assert error(found.dense(), w.double()) < 1e-6


def test_the_outline_is_the_most_that_it_takes() -> None:
    base = trained("2.mlp.down_proj")
    site = site_of_merge(tuned_by(product_of(4, base, 0.01), base), base)
    outline = LoRA().outline(site)
    assert outline is not None and not LoRA().foreseen and modelled(LoRA)
    assert outline.describe() == f"r{most_rank((256, 768)) // 2}"
    assert LoRA().rewrite(site).nbytes() < outline.nbytes()
    assert replace(LoRA(), largest=7).outline(site).describe() == "r7"  # type: ignore[union-attr]


@pytest.fixture
def partly(tiny_llama: Path, tmp_path: Path) -> Path:
    """A fine-tune of which two kinds of matrices are merged adapters, and nothing else differs."""
    tuned = shutil.copytree(tiny_llama, tmp_path / "tuned")
    tensors = load_file(tuned / "model.safetensors")
    for name, w in tensors.items():
        if "q_proj" in name or "up_proj" in name:
            tensors[name] = tuned_by(product_of(2, w, 0.05), w)
    save_file(tensors, tuned / "model.safetensors", metadata={"format": "pt"})
    return tuned


@pytest.mark.slow
def test_matrices_that_were_not_adapted_take_no_bytes(partly: Path, tiny_llama: Path, tmp_path: Path) -> None:
    report = compress.extract(partly, tiny_llama, tmp_path / "delta", method="lora").report
    delta = Artifact(report.out, tiny_llama)
    assert {site.rpartition(".")[2] for site in delta.specs} == {"q_proj", "up_proj"}
    assert delta.changed() == []
    assert {row["rank"] for row in delta.provenance["sites"].values()} == {2}


@pytest.mark.slow
def test_the_same_run_gives_the_same_bytes(partly: Path, tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(LoRA(),), delta=Delta(base=str(tiny_llama)))
    one, other = (compress.run(partly, recipe, tmp_path / name).out for name in ("one", "other"))
    files = {path.name for path in one.glob("*.safetensors")}
    assert files and all((one / name).read_bytes() == (other / name).read_bytes() for name in files)
    assert json.loads((one / "compress.json").read_text())["sites"]
