"""The weights that passes will change are counted by name; a model that they mostly cannot reach is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress import Limits, Magnitude, PlanError, Recipe, RecipeError
from compress.model.anatomy import coverage

# width 48, inner 72, 4 heads and 2 key-value heads of 12; by hand
LLAMA_BLOCK = {"q_proj": 48 * 48, "k_proj": 24 * 48, "v_proj": 24 * 48, "o_proj": 48 * 48, "gate_proj": 72 * 48,
               "up_proj": 72 * 48, "down_proj": 48 * 72}  # fmt: skip
# 4 heads of 16 and norms over one head
QWEN3_BLOCK = {**LLAMA_BLOCK, "q_proj": 64 * 48, "k_proj": 32 * 48, "v_proj": 32 * 48, "o_proj": 48 * 64}
GEMMA_BLOCK = {**LLAMA_BLOCK, "k_proj": 12 * 48, "v_proj": 12 * 48}
BLOCKS = {
    "llama": LLAMA_BLOCK, "llama_tied": LLAMA_BLOCK, "mistral": LLAMA_BLOCK, "qwen2": LLAMA_BLOCK,
    "qwen3": QWEN3_BLOCK, "gemma": GEMMA_BLOCK,
}  # fmt: skip
VECTORS = {"llama": 5, "llama_tied": 5, "mistral": 5, "qwen2": 5 + 6, "qwen3": 5 + 4, "gemma": 5}  # norms and biases


def test_what_is_touched_is_the_count_by_hand(family: str, model_folder: Any, walk_of: Any) -> None:
    walk = walk_of(model_folder(family))
    covered = coverage(walk.anatomy, ["*"])
    by_hand = {name: size for _ in range(2) for name, size in BLOCKS[family].items()}
    found = {name.split(".")[-2]: size for name, size in covered.touched.items()}
    assert len(covered.touched) == 14
    assert found == by_hand
    assert covered.missed == 0


def test_everything_else_is_listed_with_its_reason(family: str, model_folder: Any, walk_of: Any) -> None:
    walk = walk_of(model_folder(family))
    covered = coverage(walk.anatomy, ["*"])
    reasons = [reason for _, reason in covered.untouched.values()]
    assert reasons.count("a vector: norm or bias") == VECTORS[family]
    assert covered.untouched["model.embed_tokens.weight"][0] == 211 * 48
    assert sum(covered.touched.values()) + sum(n for n, _ in covered.untouched.values()) == sum(
        p.numel() for p in walk.model.parameters()
    )


def test_an_embedding_that_is_also_the_head_says_so(model_folder: Any, walk_of: Any) -> None:
    tied, untied = walk_of(model_folder("llama_tied")), walk_of(model_folder("llama"))
    covered = [coverage(walk.anatomy, ["*"]).untouched for walk in (tied, untied)]
    assert covered[0]["model.embed_tokens.weight"][1] == "the output head, or an embedding tied to it"
    assert covered[1]["model.embed_tokens.weight"][1] == "an embedding"
    assert covered[1]["lm_head.weight"][1] == "the output head, or an embedding tied to it"


def test_what_a_recipe_deselects_is_not_missed(tiny_llama: Path, walk_of: Any) -> None:
    walk = walk_of(tiny_llama)
    covered = coverage(walk.anatomy, ["*.mlp.*"])
    assert len(covered.touched) == 6
    assert sum(reason == "deselected by the recipe" for _, reason in covered.untouched.values()) == 8
    assert covered.missed_share == 0


def test_globs_of_several_passes_add_up(tiny_llama: Path, walk_of: Any) -> None:
    walk = walk_of(tiny_llama)
    assert len(coverage(walk.anatomy, ["*.mlp.*", "*q_proj"]).touched) == 8


# -- refusals --------------------------------------------------------------------------------------


def built(kind: str, **options: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(kind, vocab_size=211, bos_token_id=1, eos_token_id=2, **options)
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config)


def mixtral() -> Any:
    return built(
        "mixtral", hidden_size=48, intermediate_size=72, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=3, num_experts_per_tok=1,
    )  # fmt: skip


def gpt2() -> Any:
    return built("gpt2", n_embd=48, n_layer=2, n_head=4, n_positions=128)


@pytest.fixture
def experts(tmp_path: Path) -> Path:
    """A Mixtral whose file names its tensors as its modules do: three experts in one 3-D tensor, and a router."""
    from safetensors.torch import save_file

    model, folder = mixtral(), tmp_path / "model"
    model.config.save_pretrained(folder)
    save_file({name: t.contiguous() for name, t in model.state_dict().items()}, folder / "model.safetensors")
    return folder


EXPERTS = 3 * (2 * 72 * 48 + 48 * 72)  # of a block: gate and up, down, for each expert
ATTENTION = 2 * (48 * 48 + 24 * 48)


def test_a_mixture_of_experts_in_stacks_is_covered_but_for_its_router(experts: Path, tmp_path: Path) -> None:
    report = compress.run(experts, [Magnitude()], tmp_path / "out")
    assert report.coverage.missed == 0
    assert sum(report.coverage.touched.values()) == 2 * (EXPERTS + ATTENTION)
    assert report.coverage.reasons()["a router"] == 2 * 3 * 48
    assert "model.layers.1.mlp.experts.gate_up_proj.2" in report.coverage.touched


def test_a_mixture_of_experts_as_transformers_saves_it_is_covered(tmp_path: Path) -> None:
    mixtral().save_pretrained(tmp_path / "model")
    report = compress.run(tmp_path / "model", [Magnitude()], tmp_path / "out")
    assert sum(report.coverage.touched.values()) == 2 * (EXPERTS + ATTENTION)
    assert "model.layers.1.block_sparse_moe.experts.2.w3.weight" in report.coverage.touched


# a state-space block: in_proj 192 x 48, x_proj 19 x 96, dt_proj 96 x 3, out_proj 48 x 96 are linear maps,
# its recurrence 96 x 8 is none
MISSED, REACHED = 96 * 8, 192 * 48 + 19 * 96 + 96 * 3 + 48 * 96


@pytest.fixture
def recurrent(tmp_path: Path) -> Path:
    built("mamba", hidden_size=48, num_hidden_layers=2, state_size=8).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def test_a_model_that_passes_cannot_reach_is_refused_with_its_share(recurrent: Path, tmp_path: Path) -> None:
    share = f"{MISSED / (MISSED + REACHED):.0%}"
    with pytest.raises(
        PlanError, match=rf"no pass can reach {share} of the block parameters, such as .*A_log; limits\.max_"
    ):
        compress.run(recurrent, [Magnitude()], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_limit_may_be_raised_on_purpose(recurrent: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(Magnitude(),), limits=Limits(max_untouched=0.9))
    report = compress.run(recurrent, recipe, tmp_path / "out")
    assert report.coverage.missed_share == pytest.approx(MISSED / (MISSED + REACHED))


def test_a_model_of_conv1d_is_covered(tmp_path: Path) -> None:
    gpt2().save_pretrained(tmp_path / "model")
    report = compress.run(tmp_path / "model", [Magnitude()], tmp_path / "out")
    assert report.coverage.missed == 0
    assert sum("c_attn" in name or "c_proj" in name or "c_fc" in name for name in report.coverage.touched) == 8


def test_globs_that_select_nothing_are_refused(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"passes\[0\]\.magnitude\.sites: '\*no_such_site' selects no site"):
        compress.run(tiny_llama, [Magnitude(sites="*no_such_site")], tmp_path / "out")


def test_globs_that_select_nothing_are_refused_whatever_the_limit(tiny_llama: Path, tmp_path: Path) -> None:
    recipe = Recipe(passes=(Magnitude(sites="*no_such_site"),), limits=Limits(max_untouched=1.0))
    with pytest.raises(compress.CompressError):
        compress.run(tiny_llama, recipe, tmp_path / "out")
