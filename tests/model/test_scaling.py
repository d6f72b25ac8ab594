"""Scales moved between the writer of an activation and its readers: where allowed, and with unchanged model output."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress.model.block import Block
from compress.model.scaling import Pair, Scale, channels_of, pairs_of, proved, scaled_model
from compress.model.walk import Walk

WalkOf = Callable[[Path], Walk]
WRITERS = ["input_layernorm", "post_attention_layernorm", "self_attn.v_proj", "mlp.up_proj"]


def first_block(walk: Walk, ids: Tensor) -> Iterator[Block]:
    with torch.no_grad():
        yield next(walk.visit([], walk.enter(ids)))


def writers(block: Block, pairs: list[Pair]) -> list[str]:
    return [pair.writer.removeprefix(f"{block.name}.") for pair in pairs]


def test_every_input_of_a_llama_like_block_has_a_writer(
    family: str, model_folder: Any, walk_of: WalkOf, ids: Tensor
) -> None:
    walk = walk_of(model_folder(family))
    for block in first_block(walk, ids):
        pairs = pairs_of(block, walk.model.config)
        assert writers(block, pairs) == WRITERS
        assert [len(pair.readers) for pair in pairs] == [3, 2, 1, 1]
        assert [pair.shifted for pair in pairs] == [family == "gemma"] * 2 + [False] * 2


@pytest.mark.parametrize(
    ("kind", "config", "want"),
    [
        # relu passes scales on, a gelu between fc1 and fc2 does not; a norm after attention feeds the residual in BERT
        ("opt", {"ffn_dim": 72, "word_embed_proj_dim": 48, "do_layer_norm_before": True},
         ["self_attn_layer_norm", "final_layer_norm", "fc1", "self_attn.v_proj"]),
        ("gpt_neox", {}, ["input_layernorm", "post_attention_layernorm"]),
        ("mixtral", {"num_local_experts": 4, "num_experts_per_tok": 2, "num_key_value_heads": 2},
         ["input_layernorm", "self_attn.v_proj"]),
        ("bert", {}, []),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_only_what_can_take_a_scale_is_found(
    kind: str, config: dict[str, Any], want: list[str], tmp_path: Path, walk_of: WalkOf, ids: Tensor
) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 211, "hidden_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    others = {"max_position_embeddings": 64, "intermediate_size": 72, "is_decoder": True}
    torch.manual_seed(0)
    made = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **others, **config))
    made.float().save_pretrained(tmp_path)
    walk = walk_of(tmp_path)
    for block in first_block(walk, ids):
        assert writers(block, pairs_of(block, walk.model.config)) == want


def test_a_pair_that_changes_the_block_is_none(tiny_llama: Path, walk_of: WalkOf, ids: Tensor) -> None:
    walk = walk_of(tiny_llama)
    for block in first_block(walk, ids):
        before = block.probe.through(block.module, block.index)
        # gate goes through an activation that is not linear
        gate, down = (block.sites[f"{block.name}.mlp.{name}"] for name in ("gate_proj", "down_proj"))
        pair = Pair(writer=gate.name, module=gate.module, readers=(down,), channel_I=torch.arange(down.shape[1]))
        assert not proved(block, pair, before)
        assert torch.equal(block.probe.through(block.module, block.index), before)  # and it is left as it was


@pytest.mark.parametrize(("written", "read"), [(24, 48), (12, 48), (48, 48)])
def test_values_are_repeated_for_their_queries(written: int, read: int) -> None:
    class Config:
        head_dim = 12

    heads = torch.arange(written).view(-1, 12)
    want = heads.repeat_interleave(read // written, 0).flatten()  # as attention repeats them
    channel_I = channels_of(written, read, Config())
    assert channel_I is not None
    assert torch.equal(channel_I, want)


def test_sizes_that_no_heads_explain_are_no_pair() -> None:
    class Config:
        head_dim = 12

    assert channels_of(30, 48, Config()) is None


def test_scales_along_both_sides_and_of_a_shifted_gain() -> None:
    w, rows, columns = torch.randn(3, 4), torch.rand(3) + 1, torch.rand(4) + 1
    want = rows[:, None] * w * columns
    both = Scale(rows).then(Scale(None, columns))
    torch.testing.assert_close(both.of(w), want)
    torch.testing.assert_close(Scale(rows, columns, transposed=True).of(w.T.contiguous()), want.T)
    torch.testing.assert_close(1 + Scale(columns, shifted=True).of(w[0]), (1 + w[0]) * columns)


def test_a_model_of_moved_scales_computes_the_same(
    family: str, model_folder: Any, walk_of: WalkOf, ids: Tensor
) -> None:
    walk = walk_of(model_folder(family))
    scales: dict[str, Scale] = {}
    with torch.no_grad():
        want = walk.replay(walk.enter(ids))
        for block in walk.visit([], walk.enter(ids)):
            for i, pair in enumerate(pairs_of(block, walk.model.config)):
                scale_C = torch.rand(pair.channels, generator=torch.Generator().manual_seed(i)) * 3 + 0.2
                for name, scale in pair.scales(scale_C).items():
                    scales[name] = scales[name].then(scale) if name in scales else scale
            block.advance()
        made = scaled_model(walk.source, walk.anatomy, scales, "with scales")
        again = Walk(made.config, made, walk.dtype, walk.device)
        torch.testing.assert_close(again.replay(again.enter(ids)), want, rtol=1e-3, atol=1e-4)
    assert not torch.equal(made.tensor("model.layers.0.mlp.up_proj.weight"),
                           walk.source.tensor("model.layers.0.mlp.up_proj.weight"))  # fmt: skip
