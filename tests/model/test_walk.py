"""Walking a model block by block gives the results of the whole model: logits, sites, groups, and models in memory."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import GPTQ, Magnitude, PassManager, UnsupportedWeight, Wanda
from compress.errors import ArtifactError, CalibrationError
from compress.model.family import find_blocks
from compress.model.site import Site
from compress.model.walk import Walk

# the same modules run on the same tensors: what is left is at most the order of one sum
RATIOS = {"float32": 1e-6, "bfloat16": 2.0**-8, "float16": 2.0**-11}


def replay(walk: Walk, ids: Tensor) -> Tensor:
    """The logits of an uncompressed model, one block after the other."""
    with torch.inference_mode():
        probe = walk.enter(ids)
        for block in walk.visit([], probe):
            block.advance()
        return walk.leave(probe)


def whole(model: Any, ids: Tensor) -> Tensor:
    with torch.inference_mode():
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)


# -- logits ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", RATIOS)
def test_replaying_the_blocks_gives_the_logits_of_the_model(
    family: str, dtype: str, model_folder: Any, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    folder = model_folder(family, dtype)
    got, want = replay(walk_of(folder), ids), whole(hugging_face(folder), ids)
    assert got.dtype == want.dtype == getattr(torch, dtype)
    assert_close("logits", got, want, RATIOS[dtype])


def test_shards_read_like_one_file(family: str, model_folder: Any, walk_of: Any, ids: Tensor) -> None:
    sharded, single = model_folder(family, sharded=True), model_folder(family)
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert torch.equal(replay(walk_of(sharded), ids), replay(walk_of(single), ids))


def test_a_window_of_a_batch_goes_the_way_of_a_window_alone(
    family: str, model_folder: Any, walk_of: Any, ids: Tensor, assert_close: Any
) -> None:
    folder = model_folder(family)
    together, alone = replay(walk_of(folder), ids), replay(walk_of(folder), ids[1:2])
    assert_close("second window", together[1:2], alone, 1e-6)


def test_a_window_longer_than_the_sliding_window_is_masked(
    model_folder: Any, walk_of: Any, hugging_face: Any, assert_close: Any
) -> None:
    folder = model_folder("mistral")
    ids = torch.randint(4, 200, (2, 64), generator=torch.Generator().manual_seed(6))
    assert_close("logits", replay(walk_of(folder), ids), whole(hugging_face(folder), ids), 1e-6)
    assert walk_of(folder).model.config.sliding_window == 16


def test_blocks_that_are_called_differently_are_replayed_differently(
    model_folder: Any, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    folder = model_folder("hybrid")
    assert walk_of(folder).model.config.layer_types == ["full_attention", "sliding_attention"]
    assert_close("logits", replay(walk_of(folder), ids), whole(hugging_face(folder), ids), 1e-6)


def test_the_dense_logits_are_kept_for_the_verdict(
    tiny_llama: Path, walk_of: Any, hugging_face: Any, ids: Tensor
) -> None:
    walk = walk_of(tiny_llama)
    with torch.inference_mode():
        probe = walk.enter(ids)
        list(PassManager([Magnitude(sparsity=0.9)]).run(walk.visit([], probe)))
    assert torch.allclose(walk.dense_logits, whole(hugging_face(tiny_llama), ids), atol=1e-5)
    assert not torch.allclose(walk.leave(probe), walk.dense_logits, atol=1e-2)


def test_drift_is_zero_until_something_changes(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(tiny_llama)
    steps = [Magnitude(sites="*.1.mlp.*")]
    with torch.inference_mode():
        drifts = [block.drift for block in PassManager(steps).run(walk.visit([], walk.enter(ids)))]
    assert drifts[0] == 0 < drifts[1]


# -- memory ----------------------------------------------------------------------------------------


def test_only_the_present_block_is_in_memory(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(tiny_llama)
    with torch.inference_mode():
        loaded = []
        for block in walk.visit([], walk.enter(ids)):
            loaded.append([not next(b.parameters()).is_meta for b in walk.blocks])
            block.advance()
    assert loaded == [[True, False], [False, True]]
    assert all(p.is_meta for block in walk.blocks for p in block.parameters())


# -- sites -----------------------------------------------------------------------------------------

GROUPS = [["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"], ["self_attn.o_proj"],
          ["mlp.gate_proj", "mlp.up_proj"], ["mlp.down_proj"]]  # fmt: skip


def test_sites_are_grouped_by_the_input_they_share(family: str, model_folder: Any, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(model_folder(family))
    names = []
    with torch.inference_mode():
        for block in walk.visit([], walk.enter(ids)):
            names.append([[site.name.removeprefix(f"{block.name}.") for site in group] for group in block.groups])
            block.advance()
    assert names == [GROUPS, GROUPS]


def test_a_rewritten_site_computes_with_its_new_weight(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(tiny_llama)
    block = next(iter(walk.visit([], walk.enter(ids))))
    site = block.sites["model.layers.0.mlp.down_proj"]
    site.weight = Magnitude(sparsity=1.0).rewrite(site)
    assert torch.equal(site.module(torch.ones(1, 72)), torch.zeros(1, 48))
    assert int(site.original.data.count_nonzero()) > 0


def test_a_rewrite_that_changes_the_shape_is_refused(site_of: Callable[..., Site]) -> None:
    site = site_of(torch.ones(4, 6))
    with pytest.raises(
        UnsupportedWeight, match=r"blocks\.0\.proj: a rewrite changed its shape from \(4, 6\) to \(6, 4\)"
    ):
        site.weight = type(site.original)(torch.ones(6, 4))


def test_blocks_are_the_list_as_long_as_the_config_says(tiny_llama: Path, hugging_face: Any) -> None:
    name, blocks = find_blocks(hugging_face(tiny_llama), 2)
    assert name == "model.layers"
    assert len(blocks) == 2


def test_a_model_without_such_a_list_is_refused(tiny_llama: Path, hugging_face: Any) -> None:
    with pytest.raises(UnsupportedWeight, match="no list of 7 blocks in LlamaForCausalLM"):
        find_blocks(hugging_face(tiny_llama), 7)


# -- refusals on the way ---------------------------------------------------------------------------


def test_an_output_that_is_not_finite_stops_the_walk(model_folder: Any, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(model_folder("llama", "float16"))
    with torch.inference_mode():
        block = next(iter(walk.visit([], walk.enter(ids))))
        block.sites["model.layers.0.mlp.down_proj"].module.weight.data.fill_(6e4)
        with pytest.raises(CalibrationError, match=r"model\.layers\.0: its output is not finite"):
            block.advance()


def test_a_statistic_without_calibration_tokens_is_refused(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(tiny_llama)
    with torch.inference_mode(), pytest.raises(CalibrationError, match="needs calibration data, but none was given"):
        list(PassManager([Wanda()]).run(walk.visit([], walk.enter(ids))))


def test_a_config_nobody_knows_is_refused() -> None:
    with pytest.raises(ArtifactError, match="transformers cannot build this model"):
        Walk({"model_type": "no_such_family"}, SimpleNamespace(shapes=dict), torch.float32, torch.device("cpu"))  # type: ignore[arg-type]


# -- models in memory ------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_model_in_memory_is_rewritten_in_place(
    family: str, model_folder: Any, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    folder = model_folder(family)
    model, steps = hugging_face(folder), [Wanda(), GPTQ(group=8)]
    found = PassManager(steps).apply(model, ids)
    walk = walk_of(folder)
    with torch.inference_mode():
        probe = walk.enter(ids)
        list(PassManager(steps).run(walk.visit([walk.enter(ids)], probe)))
    assert len(found) == 14
    assert_close("logits", whole(model, ids), walk.leave(probe), 1e-5)
