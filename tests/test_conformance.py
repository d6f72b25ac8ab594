"""Every weight node and every registered pass has the properties defined in `conformance.py`."""

from __future__ import annotations

import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import compress.passes
import compress.weights.expr
import compress.weights.leaves
from compress.passes import (
    PASSES,
    RTN,
    BlockPass,
    BlockQuantizer,
    Budget,
    Codec,
    Corrector,
    Equalizer,
    Factorizer,
    GridQuantizer,
    Pass,
    Pruner,
    Quantizer,
    Refiner,
    Repair,
    Reshape,
    SitePass,
    StructuredPruner,
    WeightPass,
)
from compress.passes.factor_pruner import FactorPruner
from compress.passes.learned import Learned, Trainer
from compress.weights import Dense, Masked, Weight, pack, pattern

spec = importlib.util.spec_from_file_location("compress_tests_conformance", Path(__file__).parent / "conformance.py")
assert spec is not None and spec.loader is not None
suite: Any = importlib.util.module_from_spec(spec)
sys.modules[spec.name] = suite  # dataclasses look their module up
spec.loader.exec_module(suite)

rows = pytest.mark.parametrize("row", suite.ROWS, ids=lambda r: r.name)


@rows
def test_a_node_keeps_its_shape(row: Any) -> None:
    suite.keeps_its_shape(row.make())


@rows
def test_linear_applies_the_dense_matrix(row: Any, assert_close: Callable[..., None]) -> None:
    weight = row.make()
    for dtype in suite.DTYPES:
        suite.applies_its_matrix(weight, suite.normal(5, weight.shape[1], seed=7).to(dtype), assert_close)


@rows
def test_packing_is_lossless(row: Any) -> None:
    suite.survives_packing(row.make())


@pytest.mark.parametrize("row", suite.MIXED, ids=lambda r: r.name)
def test_the_factors_of_a_product_may_have_two_dtypes(row: Any, assert_close: Callable[..., None]) -> None:
    weight = row.make()
    suite.applies_its_matrix(weight, suite.normal(5, weight.shape[1], seed=7).bfloat16(), assert_close)


@rows
def test_nbytes_is_the_size_on_disk(row: Any, tmp_path: Path) -> None:
    suite.weighs_what_its_file_weighs(row.make(), tmp_path)


@rows
def test_a_node_describes_itself(row: Any) -> None:
    suite.has_a_name(row.make())


@pytest.mark.parametrize("tokens", [3, 9], ids=["decoding", "prefill"])
@rows
def test_lowering_computes_linear(row: Any, tokens: int, assert_close: Callable[..., None]) -> None:
    weight = row.make()
    for dtype in suite.DTYPES:
        suite.lowers_to_itself(weight, suite.normal(tokens, weight.shape[1], seed=8).to(dtype), assert_close)


@rows
def test_a_gpu_keeps_a_weight_packed_or_says_why(row: Any, assert_close: Callable[..., None]) -> None:
    suite.stays_packed_or_says_why(row.make(), assert_close)


def node_classes() -> set[type[Weight]]:
    modules = (compress.weights.expr, compress.weights.leaves)
    classes = {c for module in modules for _, c in inspect.getmembers(module, inspect.isclass)}
    return {c for c in classes if issubclass(c, Weight) and c is not Weight}


def test_every_node_has_a_row() -> None:
    covered = {type(node) for row in suite.ROWS for node in suite.nodes(row.make())}
    assert node_classes() - covered == set(), "add a row to tests/conformance.py"


def test_every_pass_module_registers_a_pass() -> None:
    prefix = "compress.passes."
    modules = {m.name for m in pkgutil.walk_packages(compress.passes.__path__, prefix) if m.name.count(".") == 3}
    assert modules - {kind.__module__ for kind in PASSES.values()} == set(), "import it in compress/passes/__init__.py"


def test_every_concrete_pass_class_is_registered() -> None:
    def below(kind: type) -> set[type]:
        return {kind}.union(*map(below, kind.__subclasses__()))

    ours = {kind for kind in below(Pass) if kind.__module__.startswith("compress.passes.")}
    abstract = {Pass, SitePass, WeightPass, BlockPass, Budget, Reshape, Equalizer, Factorizer, Corrector, Codec}
    abstract |= {
        Pruner,
        FactorPruner,
        Quantizer,
        BlockQuantizer,
        GridQuantizer,
        Refiner,
        Trainer,
        Learned,
        StructuredPruner,
    }
    assert ours - set(PASSES.values()) == abstract


# -- passes ----------------------------------------------------------------------------------------


@pytest.fixture(params=sorted(name for name, kind in PASSES.items() if issubclass(kind, SitePass)))
def step(request: pytest.FixtureRequest) -> Any:
    return PASSES[request.param]()


@dataclass
class Start:
    """A site as a pass may find it, and what the pass makes of its weight."""

    site: Any
    rewrite: Callable[[], Weight]


@pytest.fixture
def start(step: Any, site_of: Callable[..., Any], block_of: Callable[..., Any]) -> Callable[..., Start]:
    """`start(dtype)`: what refines a mask finds that of magnitude, what corrects or learns a rounded one.

    RPCA finds what it can split, LoRA what it can find a rank in.
    """

    def make(dtype: torch.dtype = torch.float32) -> Start:
        if isinstance(step, BlockPass):
            return learner(dtype)
        x_TI = suite.pass_tokens()
        drifted_TI = x_TI + 0.1 * suite.normal(*x_TI.shape, seed=4)
        w_OI = suite.weight_for(step)
        site = site_of(w_OI.to(dtype), drifted_TI.to(dtype), dense_TI=x_TI.to(dtype))
        if isinstance(step, Refiner):
            kept = pattern(0.5).keep(suite.pass_weight().abs())
            site.weight = Masked(site.original, kept, "50%")
        if isinstance(step, Repair):
            site.weight = RTN(bits=2).rewrite(site)
        return Start(site, lambda: step.rewrite(site))

    def learner(dtype: torch.dtype) -> Start:
        x_NTD = suite.pass_tokens(480).to(dtype).unflatten(0, (24, -1))
        module = torch.nn.Sequential()
        module.add_module("proj", torch.nn.Linear(suite.WIDTH, 33, bias=False, dtype=dtype))
        module.proj.weight.data = suite.pass_weight().to(dtype)
        block = block_of(module, x_NTD)
        site = block.sites["blocks.0.proj"]
        site.weight = RTN().rewrite(site)
        return Start(site, lambda: step.rewrite(block, [site])[site.name])

    return make


@pytest.fixture
def rewritten(start: Callable[..., Start]) -> Callable[[], Weight]:
    return lambda: start().rewrite()


def test_a_pass_accepts_the_shape_it_is_checked_on(step: Any) -> None:
    step.check("blocks.0.proj", (33, suite.WIDTH))


def test_a_pass_keeps_the_shape(rewritten: Callable[[], Weight]) -> None:
    assert rewritten().shape == (33, suite.WIDTH)


@pytest.mark.slow
def test_a_pass_gives_the_same_bytes_for_the_same_seed(rewritten: Callable[[], Weight]) -> None:
    assert suite.as_bytes(pack(rewritten())) == suite.as_bytes(pack(rewritten()))


def test_a_pass_makes_the_weight_smaller(step: Any, rewritten: Callable[[], Weight]) -> None:
    only_moves = step.gives in ("dense", "rotated")  # a target, or outliers; what follows makes it smaller
    assert rewritten().nbytes() < suite.pass_weight().nbytes or only_moves


def test_the_result_of_a_pass_is_lossless_on_disk(rewritten: Callable[[], Weight], tmp_path: Path) -> None:
    weight = rewritten()
    suite.survives_packing(weight)
    suite.weighs_what_its_file_weighs(weight, tmp_path)


def test_a_gpu_keeps_the_result_of_a_pass_packed_or_says_why(
    rewritten: Callable[[], Weight], assert_close: Callable[..., None]
) -> None:
    suite.stays_packed_or_says_why(rewritten(), assert_close)


def test_a_pass_leaves_the_original_alone(start: Callable[..., Start]) -> None:
    begun = start()
    before = begun.site.original.data.clone()
    begun.site.weight = begun.rewrite()
    assert torch.equal(begun.site.original.data, before)


@pytest.mark.slow
def test_a_pass_reads_low_precision_weights(step: Any, start: Callable[..., Start]) -> None:
    begun = start(torch.bfloat16)
    site = begun.site
    site.weight = begun.rewrite()
    assert site.module.weight.dtype == torch.bfloat16
    site.measure()
    unbiased = step.name == "dare"  # then what is lost is noise: sqrt((1 - q) / q) = 3 with a tenth kept
    assert 0 < site.weight_error < (4 if unbiased else 1)


@pytest.mark.parametrize("sparsity", ["2:4", 0.5], ids=["2:4", "50%"])
@pytest.mark.parametrize("name", suite.MASKED)
def test_a_mask_survives_every_quantizer(name: str, sparsity: float | str, site_of: Callable[..., Any]) -> None:
    site = site_of(suite.pass_weight(), suite.pass_tokens())
    chosen = pattern(sparsity)
    site.weight = Masked(Dense(suite.pass_weight()), chosen.keep(suite.pass_weight().abs()), chosen.name)
    mask_OI = site.weight.mask_OI
    site.weight = PASSES[name]().rewrite(site)
    assert torch.equal(site.weight.mask_OI, mask_OI)
    assert int(site.module.weight[~mask_OI].count_nonzero()) == 0
    assert site.weight.describe().startswith(chosen.name)


@pytest.mark.parametrize("name", suite.EXACT_ZERO)
def test_the_grid_itself_holds_zero_where_the_mask_cuts(name: str, site_of: Callable[..., Any]) -> None:
    site = site_of(suite.pass_weight(), suite.pass_tokens())
    mask_OI = pattern("2:4").keep(suite.pass_weight().abs())
    site.weight = Masked(Dense(suite.pass_weight()), mask_OI, "2:4")
    values = PASSES[name]().rewrite(site).values
    assert int(values.dense()[~mask_OI].count_nonzero()) == 0


@pytest.mark.parametrize("name", suite.QUANTIZERS)
def test_a_quantizer_leaves_low_rank_terms_alone(name: str, site_of: Callable[..., Any]) -> None:
    site = site_of(suite.pass_weight(), suite.pass_tokens())
    factors = suite.low_rank(33, suite.WIDTH)
    site.weight = Dense(suite.pass_weight()) + factors
    assert PASSES[name]().rewrite(site).terms[1] is factors


@pytest.mark.parametrize("name", suite.QUANTIZERS)
def test_a_quantizer_refuses_what_is_quantized(name: str, site_of: Callable[..., Any]) -> None:
    site = site_of(suite.pass_weight(), suite.pass_tokens())
    site.weight = PASSES[name]().rewrite(site)
    done = site.weight.describe().partition("@")[0]
    with pytest.raises(compress.UnsupportedWeight, match=rf"{name} cannot quantize blocks\.0\.proj: it is {done}"):
        PASSES[name]().rewrite(site)
