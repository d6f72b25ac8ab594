"""Statistics equal those of the full model's activations for any batches; orderings differ as documented."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from compress import CalibrationError, Magnitude, PassManager, Site, Weight, WeightPass
from compress.events import Event, StatisticsCollected
from compress.stats import Collector, ColumnNorm, Gram, Statistics, finite, products_of

Close = Callable[[str, Tensor, Tensor, float], None]
# a float32 activation carries about 1e-6 of relative error through a block; squares double it
RATIO = 1e-5


@dataclass(frozen=True, kw_only=True)
class Look(WeightPass):
    """Measures and changes nothing; not registered, because it has no name."""

    requires = (ColumnNorm, Gram)

    def rewrite(self, site: Site) -> Weight:
        return site.weight


def measured(
    walk: Any, steps: Sequence[WeightPass], batches: Sequence[Tensor], ordering: str = "site"
) -> dict[str, Statistics]:
    """The statistics every site had when its passes ran."""
    found: dict[str, Statistics] = {}

    class Recording(PassManager):
        def rewrite(self, index: int, step: WeightPass, sites: Sequence[Site]) -> None:
            found.update((site.name, Statistics(dict(site.stats.values), site.stats.tokens)) for site in sites)
            super().rewrite(index, step, sites)

    with torch.inference_mode():
        travellers = [walk.enter(ids) for ids in batches]
        probe = walk.enter(batches[0])
        list(Recording(steps, ordering=ordering).run(walk.visit(travellers, probe)))
    return found


def inputs_of(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """Every linear map's input [tokens, in], float64, by hooks on the whole model."""
    seen: dict[str, Tensor] = {}

    def listen(name: str) -> Callable[..., None]:
        return lambda module, args: seen.__setitem__(name, args[0].double().flatten(0, 1))

    hooks = [m.register_forward_pre_hook(listen(n)) for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)]
    with torch.inference_mode():
        model(input_ids=ids, use_cache=False)
    [hook.remove() for hook in hooks]
    return seen


# -- truth -----------------------------------------------------------------------------------------


@pytest.mark.slow
def test_statistics_are_those_of_the_full_model(
    family: str, model_folder: Any, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Close
) -> None:
    folder = model_folder(family)
    found, inputs = measured(walk_of(folder), [Look()], [ids]), inputs_of(hugging_face(folder), ids)
    for block, site in product(
        (0, 1), ("self_attn.q_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.up_proj", "mlp.down_proj")
    ):
        name = f"model.layers.{block}.{site}"
        stats, x_TI = found[name], inputs[name]
        assert stats.tokens == ids.numel()
        assert_close(f"{name} norm", stats[ColumnNorm], x_TI.norm(dim=0), RATIO)
        assert_close(f"{name} gram", stats[Gram], x_TI.T @ x_TI / len(x_TI), RATIO)


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 1), (1, 2)])
def test_any_split_into_batches_measures_the_same(
    sizes: tuple[int, ...], tiny_llama: Path, walk_of: Any, ids: Tensor, assert_close: Close
) -> None:
    name = "model.layers.1.mlp.down_proj"
    once = measured(walk_of(tiny_llama), [Look()], [ids])[name]
    split = measured(walk_of(tiny_llama), [Look()], ids.split(sizes))[name]
    assert split.tokens == once.tokens
    assert_close("norm", split[ColumnNorm], once[ColumnNorm], 1e-6)
    assert_close("gram", split[Gram], once[Gram], 1e-6)


@given(cuts=st.sets(st.integers(1, 96), max_size=6), width=st.sampled_from([1, 3, 17]))
def test_streaming_is_one_shot(cuts: set[int], width: int) -> None:
    x_TI = torch.randn(97, width, generator=torch.Generator().manual_seed(width)) * 100
    collector = Collector((ColumnNorm, Gram), width, x_TI.device)
    edges = [0, *sorted(cuts), 97]
    for start, end in pairwise(edges):
        collector.update(x_TI[start:end])
    stats = collector.finish("here")
    torch.testing.assert_close(stats[ColumnNorm].double(), x_TI.double().norm(dim=0), rtol=1e-6, atol=0)
    torch.testing.assert_close(stats[Gram].double(), x_TI.double().T @ x_TI.double() / 97, rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_inputs_are_squared_in_float32(dtype: torch.dtype, assert_close: Close) -> None:
    x_TI = (torch.randn(64, 5, generator=torch.Generator().manual_seed(0)) * 1000).to(dtype)  # squares overflow fp16
    collector = Collector((ColumnNorm, Gram), 5, x_TI.device)
    collector.update(x_TI)
    stats = collector.finish("here")
    assert_close("norm", stats[ColumnNorm], x_TI.double().norm(dim=0), 1e-6)
    assert_close("gram", stats[Gram], x_TI.double().T @ x_TI.double() / 64, 1e-6)


def test_leading_dimensions_do_not_matter(assert_close: Close) -> None:
    x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    flat, batched = (Collector((Gram,), 7, x.device) for _ in range(2))
    flat.update(x.flatten(0, 1))
    batched.update(x)
    assert_close("gram", batched.finish("here")[Gram], flat.finish("here")[Gram], 1e-6)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e30])
def test_a_statistic_that_is_not_finite_names_its_site(value: float) -> None:
    collector = Collector((Gram,), 3, torch.device("cpu"))
    collector.update(torch.full((2, 3), value))
    with pytest.raises(CalibrationError, match=r"blocks\.7\.proj: the Gram of its input is not finite"):
        collector.finish("blocks.7.proj")


# -- orderings -------------------------------------------------------------------------------------

ATTENTION = Magnitude(sparsity=0.7, sites="*[qkv]_proj")


def test_a_site_sees_the_compressed_prefix(
    tiny_llama: Path, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Close
) -> None:
    model = hugging_face(tiny_llama)
    PassManager([ATTENTION]).apply(model, ids)
    stats = measured(walk_of(tiny_llama), [ATTENTION, Look()], [ids])
    seen = inputs_of(model, ids)
    later = ["model.layers.0.self_attn.o_proj", "model.layers.0.mlp.down_proj", "model.layers.1.self_attn.q_proj"]
    got = torch.cat([stats[name][ColumnNorm] for name in later])
    assert_close("later sites", got, torch.cat([seen[name].norm(dim=0) for name in later]), RATIO)


def test_a_model_with_the_rewritten_weights_is_the_compressed_prefix(
    tiny_llama: Path, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Close
) -> None:
    name = "model.layers.0.self_attn.o_proj"
    model = hugging_face(tiny_llama)
    for projection in ("q_proj", "k_proj", "v_proj"):
        weight = model.get_submodule(f"model.layers.0.self_attn.{projection}").weight.data
        drop = weight.abs().flatten().kthvalue(round(0.7 * weight.numel())).values
        weight.masked_fill_(weight.abs() <= drop, 0)
    stats = measured(walk_of(tiny_llama), [ATTENTION, Look()], [ids])[name]
    x_TI = inputs_of(model, ids)[name]
    assert_close("gram", stats[Gram], x_TI.T @ x_TI / len(x_TI), RATIO)


def test_block_ordering_measures_the_dense_block(
    tiny_llama: Path, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Close
) -> None:
    name = "model.layers.0.self_attn.o_proj"
    dense = inputs_of(hugging_face(tiny_llama), ids)[name].norm(dim=0)
    by_block = measured(walk_of(tiny_llama), [ATTENTION, Look()], [ids], "block")[name][ColumnNorm]
    by_site = measured(walk_of(tiny_llama), [ATTENTION, Look()], [ids], "site")[name][ColumnNorm]
    assert_close("block ordering", by_block, dense, RATIO)
    assert float((by_site - by_block).norm() / by_block.norm()) > 0.05


def test_block_ordering_still_sees_the_blocks_before(
    tiny_llama: Path, walk_of: Any, hugging_face: Any, ids: Tensor
) -> None:
    name = "model.layers.1.self_attn.q_proj"
    dense = inputs_of(hugging_face(tiny_llama), ids)[name].norm(dim=0)
    stats = measured(walk_of(tiny_llama), [ATTENTION, Look()], [ids], "block")[name]
    assert float((stats[ColumnNorm] - dense).norm() / dense.norm()) > 0.01


def test_each_input_is_measured_once(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    events: list[Event] = []
    walk = walk_of(tiny_llama)
    with torch.inference_mode():
        list(PassManager([Look(), Look()], events.append).run(walk.visit([walk.enter(ids)], walk.enter(ids))))
    collected = [event for event in events if isinstance(event, StatisticsCollected)]
    assert [len(event.sites) for event in collected] == [3, 1, 2, 1] * 2
    assert {event.statistics for event in collected} == {("ColumnNorm", "Gram")}
    assert {event.tokens for event in collected} == {ids.numel()}


def test_only_selected_sites_are_measured(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    stats = measured(walk_of(tiny_llama), [Look(sites="*.1.mlp.down_proj")], [ids])
    assert [name for name, found in stats.items() if Gram in found] == ["model.layers.1.mlp.down_proj"]


def test_dense_ordering_sees_the_dense_model_throughout(
    tiny_llama: Path, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Close
) -> None:
    seen = inputs_of(hugging_face(tiny_llama), ids)
    stats = measured(walk_of(tiny_llama), [ATTENTION, Look()], [ids], "dense")
    for name in ("model.layers.0.self_attn.o_proj", "model.layers.1.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert_close(name, stats[name][ColumnNorm], seen[name].norm(dim=0), RATIO)


def test_the_probe_of_a_dense_ordering_still_walks_the_rewritten_model(tiny_llama: Path, walk_of: Any) -> None:
    ids = torch.arange(4, 40)[None]
    walk = walk_of(tiny_llama)
    with torch.inference_mode():
        probe = walk.enter(ids)
        list(PassManager([ATTENTION, Look()], ordering="dense").run(walk.visit([walk.enter(ids)], probe)))
        assert not torch.allclose(walk.leave(probe), walk.dense_logits, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gram_loses_nothing_to_how_this_machine_multiplies(dtype: torch.dtype) -> None:
    """Products of bf16 inputs are exact, those of float32 stay float32; either way only sums are rounded."""
    x_TI = torch.randn(1000, 96, generator=torch.Generator().manual_seed(1)).to(dtype)
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    before = setting and setting.fp32_precision
    collector = Collector([Gram], 96, x_TI.device)
    for some_TI in x_TI.split(100):  # the sum so far is not rounded to bf16 either
        collector.update(some_TI)
    want_II = (x_TI.double().T @ x_TI.double() / len(x_TI)).float()
    assert float((collector.finish("x")[Gram] - want_II).norm() / want_II.norm()) < 2e-6
    assert (setting and setting.fp32_precision) == before


def test_how_products_are_made_is_put_back_after_a_failure() -> None:
    setting = getattr(torch.backends.mkldnn, "matmul", None)
    before = setting and setting.fp32_precision
    with pytest.raises(ZeroDivisionError), products_of(torch.zeros(1, dtype=torch.bfloat16)):
        _ = 1 / 0
    assert (setting and setting.fp32_precision) == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.float8_e5m2])
def test_one_value_that_is_not_finite_is_found_wherever_it_is(dtype: torch.dtype) -> None:
    for size in (1, 7, 100):
        for at in range(size):
            for value in (torch.nan, torch.inf, -torch.inf):
                x_I = torch.ones(size)
                assert finite(x_I.to(dtype))
                x_I[at] = value
                assert not finite(x_I.to(dtype)), (size, at, value)
