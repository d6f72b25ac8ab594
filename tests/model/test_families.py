"""Every family of docs/models.md: replay, coverage counted by hand, and one round trip through every way of loading.

Models are tiny and random, with unusual sizes; hybrids have sliding windows shorter than the text. The structure of
each family is written down here by hand, so that a change in transformers is noticed.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import GPTQ, RTN, Calibration, Limits, Magnitude, PassManager, Recipe, ShortGPT, Wanda
from compress.export.dense import export_dense
from compress.job import Report
from compress.model.anatomy import coverage
from compress.model.architecture import auto_class, run, skeleton
from compress.model.family import TESTED
from compress.model.memo import Memo
from compress.model.source import Checkpoint

SMALL: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
}  # fmt: skip
OLD: dict[str, Any] = {"vocab_size": 211, "bos_token_id": 1, "eos_token_id": 2}
GPT: dict[str, Any] = {**OLD, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
EQUAL: dict[str, Any] = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}
GEMMA: dict[str, Any] = {**SMALL, "head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12}
EXPERTS: dict[str, Any] = {**SMALL, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
SHARED: dict[str, Any] = {**EXPERTS, "num_experts": 4, "shared_expert_intermediate_size": 40, "decoder_sparse_step": 1}
LATENT: dict[str, Any] = {
    **EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 12,
    "topk_group": 1,
}  # fmt: skip
VISION: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4, "image_size": 16,
    "patch_size": 8,
}  # fmt: skip

SEPARATE = [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]
MIXTURE = [*SEPARATE[:2], *[["w1", "w3"]] * 4, *[["w2"]] * 4]
FINE = [*SEPARATE[:2], *[["gate_proj", "up_proj"]] * 4, *[["down_proj"]] * 4]
STACK = [*SEPARATE[:2], *[[f"gate_up_proj.{e}"] for e in range(4)], *[[f"down_proj.{e}"] for e in range(4)]]
ATTENTION = 48 * 48 + 2 * 24 * 48 + 48 * 48  # grouped heads: q, k and v, o
FULL = 4 * 48 * 48
GATED = 3 * 72 * 48
PLAIN = 2 * 4 * 48 * 48  # the classic: an inner layer four times as wide
LATENT_ATTENTION = 24 * 48 + 4 * 16 * 24 + (16 + 8) * 48 + 4 * 20 * 16 + 48 * 4 * 12


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family: its tiny config, the groups of the last block's sites, parameters of one block's sites by hand.

    `also` are the parameters of blocks that differ from the last; `routers` those of all routers.
    """

    config: dict[str, Any]
    groups: list[list[str]]
    block: int
    also: tuple[int, ...] = ()
    routers: int = 0

    @property
    def touched(self) -> int:
        """Parameters of all sites of the two blocks."""
        return self.block + (self.also[0] if self.also else self.block)


FAMILIES: dict[str, Family] = {
    "llama": Family(config=SMALL, groups=SEPARATE, block=ATTENTION + GATED),
    "mistral": Family(config={**SMALL, "sliding_window": 8}, groups=SEPARATE, block=ATTENTION + GATED),
    "qwen2": Family(  # a hybrid: full attention, then a sliding window
        config={**SMALL, "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1},
        groups=SEPARATE, block=ATTENTION + GATED,
    ),
    "qwen3": Family(config={**SMALL, "head_dim": 16}, groups=SEPARATE, block=2 * 64 * 48 + 2 * 32 * 48 + GATED),
    "gemma": Family(config={**SMALL, "head_dim": 12}, groups=SEPARATE, block=ATTENTION + GATED),
    "gemma2": Family(config=GEMMA, groups=SEPARATE, block=ATTENTION + GATED),
    "gemma3_text": Family(
        config={**GEMMA, "layer_types": ["sliding_attention", "full_attention"]},
        groups=SEPARATE, block=ATTENTION + GATED,
    ),
    "phi": Family(
        config={**SMALL, "num_key_value_heads": 4}, groups=[["q_proj", "k_proj", "v_proj", "fc1"], ["dense"], ["fc2"]],
        block=FULL + 2 * 72 * 48,
    ),
    "phi3": Family(
        config=SMALL, groups=[["qkv_proj"], ["o_proj"], ["gate_up_proj"], ["down_proj"]], block=ATTENTION + GATED
    ),
    "opt": Family(
        config={**OLD, "hidden_size": 48, "ffn_dim": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
                "pad_token_id": 3, "max_position_embeddings": 128, "word_embed_proj_dim": 48},
        groups=[["q_proj", "k_proj", "v_proj"], ["out_proj"], ["fc1"], ["fc2"]], block=FULL + 2 * 72 * 48,
    ),
    "gpt2": Family(config=GPT, groups=[["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]], block=FULL + PLAIN),
    "gptj": Family(
        config={**GPT, "rotary_dim": 8}, groups=[["q_proj", "k_proj", "v_proj", "fc_in"], ["out_proj"], ["fc_out"]],
        block=FULL + PLAIN,
    ),
    "gpt_bigcode": Family(  # one head of keys and values
        config=GPT, groups=[["c_attn"], ["c_proj"], ["c_fc"], ["c_proj"]],
        block=(48 + 2 * 12) * 48 + 48 * 48 + PLAIN,
    ),
    "gpt_neox": Family(  # its head has another name in the file
        config=EQUAL, groups=[["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]],
        block=FULL + 2 * 72 * 48,
    ),
    "falcon": Family(
        config={**OLD, "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4},
        groups=[["query_key_value", "dense_h_to_4h"], ["dense"], ["dense_4h_to_h"]],
        block=(48 + 2 * 12) * 48 + 48 * 48 + PLAIN,
    ),
    "bloom": Family(
        config={**OLD, "hidden_size": 48, "n_layer": 2, "n_head": 4, "pad_token_id": 3},
        groups=[["query_key_value"], ["dense"], ["dense_h_to_4h"], ["dense_4h_to_h"]], block=FULL + PLAIN,
    ),
    "olmo": Family(config=SMALL, groups=SEPARATE, block=ATTENTION + GATED),
    "olmo2": Family(config=SMALL, groups=SEPARATE, block=ATTENTION + GATED),
    "olmo3": Family(config={**SMALL, "sliding_window": 8}, groups=SEPARATE, block=ATTENTION + GATED),
    "stablelm": Family(config={**SMALL, "partial_rotary_factor": 0.5}, groups=SEPARATE, block=ATTENTION + GATED),
    "starcoder2": Family(
        config={**SMALL, "sliding_window": 8}, block=ATTENTION + 2 * 72 * 48,
        groups=[["q_proj", "k_proj", "v_proj"], ["o_proj"], ["c_fc"], ["c_proj"]],
    ),
    "cohere": Family(
        config=SMALL, groups=[["q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"], ["o_proj"], ["down_proj"]],
        block=ATTENTION + GATED,
    ),
    "granite": Family(config=SMALL, groups=SEPARATE, block=ATTENTION + GATED),
    "smollm3": Family(config=SMALL, groups=SEPARATE, block=ATTENTION + GATED),
    # -- mixtures of experts: in the file one by one, or as a stack
    "mixtral": Family(
        config={**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}, groups=MIXTURE,
        block=ATTENTION + 4 * GATED, routers=2 * 4 * 48,
    ),
    "phimoe": Family(
        config={**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}, groups=MIXTURE,
        block=ATTENTION + 4 * GATED, routers=2 * 4 * 48,
    ),
    "qwen2_moe": Family(  # a shared expert with a gate of its own, which is a router too
        config=SHARED, groups=[*SEPARATE[:2], *SEPARATE[2:], *FINE[2:]],
        block=ATTENTION + 3 * 40 * 48 + 4 * 3 * 24 * 48, routers=2 * (4 + 1) * 48,
    ),
    "qwen3_moe": Family(
        config={**SHARED, "head_dim": 12}, groups=FINE, block=ATTENTION + 4 * 3 * 24 * 48, routers=2 * 4 * 48
    ),
    "olmoe": Family(
        config={**SMALL, "num_experts": 4, "num_experts_per_tok": 2}, groups=FINE, block=ATTENTION + 4 * GATED,
        routers=2 * 4 * 48,
    ),
    "deepseek_v2": Family(  # latent attention; the first block is dense
        config={**LATENT, "n_group": 1, "topk_method": "greedy"},
        groups=[["q_a_proj", "kv_a_proj_with_mqa"], ["q_b_proj"], ["kv_b_proj"], ["o_proj"], *FINE[2:], *SEPARATE[2:]],
        block=LATENT_ATTENTION + 5 * 3 * 24 * 48, also=(LATENT_ATTENTION + GATED,), routers=4 * 48,
    ),
    "deepseek_v3": Family(
        config={**LATENT, "n_group": 2},
        groups=[["q_a_proj", "kv_a_proj_with_mqa"], ["q_b_proj"], ["kv_b_proj"], ["o_proj"], *FINE[2:], *SEPARATE[2:]],
        block=LATENT_ATTENTION + 5 * 3 * 24 * 48, also=(LATENT_ATTENTION + GATED,), routers=4 * 48,
    ),
    "granitemoe": Family(
        config={**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2}, block=ATTENTION + 4 * GATED,
        groups=[*SEPARATE[:2], *[[f"input_linear.{e}"] for e in range(4)], *[[f"output_linear.{e}"] for e in range(4)]],
        routers=2 * 4 * 48,
    ),
    "gpt_oss": Family(  # stacks as [experts, in, out], with biases
        config={**SMALL, "num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 12, "sliding_window": 8},
        groups=STACK, block=ATTENTION + 4 * GATED, routers=2 * 4 * 48,
    ),
    "llama4_text": Family(  # every expert is given every token, most of them as zeros
        config={**SMALL, "num_local_experts": 4, "num_experts_per_tok": 1, "head_dim": 12, "intermediate_size_mlp": 72,
                "interleave_moe_layer_step": 1, "attention_chunk_size": 64},
        groups=[*STACK, *SEPARATE[2:]], block=ATTENTION + 5 * GATED, routers=2 * 4 * 48,
    ),
    "glm4_moe": Family(
        config={**EXPERTS, "head_dim": 12, "n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1,
                "n_group": 1, "topk_group": 1},
        groups=[*FINE, *SEPARATE[2:]], block=ATTENTION + 5 * 3 * 24 * 48, also=(ATTENTION + GATED,), routers=4 * 48,
    ),
    # -- other mixers: a state-space block before one of attention
    "bamba": Family(
        config={**SMALL, "attn_layer_indices": [1], "mamba_n_heads": 4, "mamba_d_head": 24, "mamba_d_state": 8,
                "mamba_n_groups": 1, "mamba_expand": 2},
        groups=SEPARATE, block=ATTENTION + GATED, also=((2 * 96 + 2 * 8 + 4) * 48 + 48 * 96 + GATED,),
    ),
    # -- models that see: only what speaks is compressed
    "gemma3": Family(
        config={"text_config": {**GEMMA, "model_type": "gemma3_text"}, "mm_tokens_per_image": 4,
                "vision_config": {**VISION, "model_type": "siglip_vision_model"}, "image_token_index": 205,
                "boi_token_index": 206, "eoi_token_index": 207, "architectures": ["Gemma3ForConditionalGeneration"]},
        groups=SEPARATE, block=ATTENTION + GATED,
    ),
    "llava": Family(
        config={"text_config": {**SMALL, "model_type": "llama"}, "image_token_index": 205,
                "vision_config": {**VISION, "model_type": "clip_vision_model", "projection_dim": 32},
                "architectures": ["LlavaForConditionalGeneration"]},
        groups=SEPARATE, block=ATTENTION + GATED,
    ),
    "qwen3_vl_moe": Family(
        config={"text_config": {**SHARED, "model_type": "qwen3_vl_moe_text", "head_dim": 12, "rope_parameters": {
                    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
                "vision_config": {"depth": 2, "hidden_size": 32, "out_hidden_size": 48, "num_heads": 4,
                                  "patch_size": 8, "intermediate_size": 40, "deepstack_visual_indexes": [0]},
                "image_token_id": 205, "video_token_id": 206, "vision_start_token_id": 207,
                "vision_end_token_id": 208, "architectures": ["Qwen3VLMoeForConditionalGeneration"]},
        groups=STACK, block=ATTENTION + 4 * 3 * 24 * 48, routers=2 * 4 * 48,
    ),
    "qwen2_vl": Family(
        config={"text_config": {**SMALL, "model_type": "qwen2_vl_text", "rope_parameters": {
                    "rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
                "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 48, "num_heads": 4, "patch_size": 8},
                "image_token_id": 205, "video_token_id": 206, "vision_start_token_id": 207,
                "vision_end_token_id": 208, "architectures": ["Qwen2VLForConditionalGeneration"]},
        groups=SEPARATE, block=ATTENTION + GATED,
    ),
    # -- encoders
    "bert": Family(
        config={**EQUAL, "architectures": ["BertForMaskedLM"]},
        groups=[["query", "key", "value"], ["dense"], ["dense"], ["dense"]], block=FULL + 2 * 72 * 48,
    ),
    "roberta": Family(
        config={**EQUAL, "max_position_embeddings": 140, "architectures": ["RobertaForMaskedLM"]},
        groups=[["query", "key", "value"], ["dense"], ["dense"], ["dense"]], block=FULL + 2 * 72 * 48,
    ),
}  # fmt: skip
TIED = {"llama": True, "qwen2": True, "qwen3": True, "gemma2": False, "phi3": True, "olmo": True, "mixtral": True,
        "gpt2": False, "gpt_neox": True, "opt": False, "falcon": False, "bloom": False}  # fmt: skip
MIXTURES = [name for name, family in FAMILIES.items() if family.routers]
Folder = Callable[..., Path]
Rounded = Callable[[str], Report]


def config_of(name: str, **more: Any) -> Any:
    from transformers import AutoConfig

    return AutoConfig.for_model(name, **{**FAMILIES[name].config, **more})


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Folder:
    """`folder(family)`: a float32 model folder with the tokenizer of the other tests, as transformers saves it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    made: dict[str, Path] = {}

    def make(name: str, **more: Any) -> Path:
        key = f"{name} {more}"
        if key not in made:
            config = config_of(name, **more)
            torch.manual_seed(0)
            model = auto_class(config).from_config(config, dtype=torch.float32)
            made[key] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="module")
def rounded(folder: Folder, tmp_path_factory: pytest.TempPathFactory) -> Rounded:
    """`rounded(family)`: the report of a run that rounds every site to four bits; its folder is read-only."""
    made: dict[str, Report] = {}

    def make(name: str) -> Report:
        if name not in made:
            made[name] = compress.run(folder(name), [RTN(group=8)], tmp_path_factory.mktemp(name) / "rounded")
        return made[name]

    return make


def stock(path: Path) -> Any:
    """The model as stock transformers loads it."""
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(path, local_files_only=True)
    return auto_class(config).from_pretrained(path, local_files_only=True, dtype="auto").eval()


def logits_of(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids).logits)


def test_every_family_called_tested_is_tested() -> None:
    assert set(TESTED) == FAMILIES.keys()


# -- replay and coverage ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_without_weights_has_the_buffers_of_one_with_weights(name: str) -> None:
    config = config_of(name)
    empty = skeleton(json.loads(config.to_json_string()), torch.float32)
    torch.manual_seed(0)
    whole = auto_class(config).from_config(config, dtype=torch.float32)
    assert {name: (p.shape, p.dtype) for name, p in empty.named_parameters()} == {
        name: (p.shape, p.dtype) for name, p in whole.named_parameters()
    }
    assert all(parameter.is_meta for parameter in empty.parameters())
    buffers = dict(empty.named_buffers())
    for buffer, held in whole.named_buffers():
        assert torch.equal(buffers.pop(buffer), held), buffer
    assert not buffers
    assert not nn.Linear(2, 2).weight.is_meta  # built afterwards


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_replay_is_the_model_and_sites_are_grouped_by_input(
    name: str, folder: Folder, walk_of: Any, ids: Tensor, assert_close: Any
) -> None:
    walk = walk_of(folder(name))
    with torch.no_grad():
        probe = walk.enter(ids)
        for block in walk.visit([], probe):
            block.advance()
            groups = [[site.name.removeprefix(f"{block.name}.") for site in group] for group in block.groups]
        assert_close("logits", walk.leave(probe), logits_of(stock(folder(name)), ids), 1e-5)
    assert [[last_part(site) for site in group] for group in groups] == FAMILIES[name].groups


def last_part(site: str) -> str:
    """`q_proj`, or `gate_up_proj.3` of a stack."""
    parts = site.split(".")
    return ".".join(parts[-2:]) if parts[-1].isdigit() else parts[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_proves_its_own_replay(name: str, folder: Folder, walk_of: Any, ids: Tensor) -> None:
    with torch.no_grad():
        walk_of(folder(name)).prove(ids[:1])


@pytest.mark.parametrize("name", FAMILIES)
def test_coverage_is_what_was_counted_by_hand(name: str, folder: Folder, walk_of: Any) -> None:
    anatomy = walk_of(folder(name)).anatomy
    covered = coverage(anatomy, ["*"])
    assert sum(covered.touched.values()) == FAMILIES[name].touched
    assert covered.reasons().get("a router", 0) == FAMILIES[name].routers
    assert covered.missed == 0
    whole = sum(covered.touched.values()) + sum(size for size, _ in covered.untouched.values())
    assert whole == sum(tensor.numel() for tensor in map(Checkpoint(folder(name)).tensor, anatomy.layout.shapes))


# -- round trips -----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_all_ways_of_loading_agree_and_the_mask_lies_along_the_inputs(
    name: str, folder: Folder, tmp_path: Path, ids: Tensor, assert_close: Any
) -> None:
    calibration = Calibration(samples=4, length=32)
    both = [Wanda(sparsity="2:4", sites="*.0.*"), Magnitude(sparsity="2:4", sites="*.1.*")]
    passes = [Magnitude(sparsity="2:4")] if name in MIXTURES else both  # few tokens reach an expert here
    recipe = compress.Recipe(passes=tuple(passes), calibration=calibration)
    report = compress.run(folder(name), recipe, tmp_path / "o")
    export_dense(tmp_path / "o", tmp_path / "dense")
    ours, small = (compress.load(tmp_path / "o", low_memory=low) for low in (False, True))
    ours.save_pretrained(tmp_path / "again")
    logits = [logits_of(m, ids) for m in (ours, small, stock(tmp_path / "dense"), compress.load(tmp_path / "again"))]
    assert_close("low memory", logits[1], logits[0], 1e-5)
    assert_close("dense export", logits[2], logits[0], 1e-5)
    assert_close("saved again", logits[3], logits[0], 1e-5)
    assert report.coverage.missed == 0
    kept = {int(n) for m in ours.modules() if hasattr(m, "expression") for n in counts(m.expression.dense())}
    assert kept == {2}


def counts(w_OI: Tensor) -> Tensor:
    """Non-zeros of every four consecutive inputs."""
    return (w_OI.reshape(-1, 4) != 0).sum(1).unique()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", ["deepseek_v3", "gpt_oss", "mixtral", "gemma3_text", "qwen2_vl", "gpt2"])
def test_low_precision_is_computed_as_transformers_does(
    name: str, dtype: str, folder: Folder, walk_of: Any, tmp_path: Path, ids: Tensor, assert_close: Any
) -> None:
    stock(folder(name)).to(getattr(torch, dtype)).save_pretrained(tmp_path / "m")
    walk = walk_of(tmp_path / "m")
    with torch.no_grad():
        got, model = walk.replay(walk.enter(ids)), stock(tmp_path / "m")
    held = {name: str(parameter.dtype) for name, parameter in model.named_parameters()}
    assert {n: str(walk.tensor(s[0], n).dtype) for n, s in walk.anatomy.layout.sources.items() if n in held} == {
        n: kind for n, kind in held.items() if n in walk.anatomy.layout.sources
    }
    assert_close("logits", got.float(), logits_of(model, ids).float(), 2.0**-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_likelihoods_need_only_the_last_logits(name: str) -> None:
    from compress_evals.scorer import options, read

    config = config_of(name)
    torch.manual_seed(0)
    model = auto_class(config).from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(4, 200, (3, 20))
    ids[1, 15:] = ids[2, 17:] = 0  # padding, as lm-eval pads
    given, kept = options(model), read(ids, 2)
    assert (given is None) == (name in ("bert", "roberta"))  # no decoders
    if given is not None:
        with torch.no_grad():
            last = model(ids, logits_to_keep=kept, **given).logits
        torch.testing.assert_close(last, logits_of(model, ids)[:, -kept:], atol=1e-5, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_a_loaded_artifact_computes_what_the_model_in_memory_does(
    name: str, folder: Folder, rounded: Rounded, ids: Tensor, assert_close: Any
) -> None:
    model = stock(folder(name))
    PassManager([RTN(group=8)]).apply(model, ids)
    assert_close("logits", logits_of(compress.load(rounded(name).out), ids), logits_of(model, ids), 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(FAMILIES)[::3])  # all passed once; they take minutes
def test_a_model_of_one_block_is_the_other_block_alone(
    name: str, folder: Folder, walk_of: Any, tmp_path: Path, ids: Tensor, assert_close: Any
) -> None:
    calibration = Calibration(samples=4, length=32)
    compress.run(folder(name), [ShortGPT(blocks=1, protect=0)], tmp_path / "o", calibration=calibration)
    provenance = json.loads((tmp_path / "o" / "compress.json").read_text())
    walk = walk_of(folder(name))
    with torch.no_grad():
        want = walk.replay(walk.enter(ids), [1 - provenance["reshaped"][0]["blocks"][0]])
        got = run(stock(tmp_path / "o"), ids).logits  # without a cache: of a lone mamba block transformers makes none
    assert_close("logits", got, want, 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_what_no_pass_touches_passes_through_bit_by_bit(name: str, folder: Folder, rounded: Rounded) -> None:
    report = rounded(name)
    before, after = Checkpoint(folder(name)), Checkpoint(report.out)
    assert report.coverage.untouched
    for tensor in report.coverage.untouched:
        assert torch.equal(before.tensor(tensor), after.stored_tensor(tensor)), tensor


@pytest.mark.slow
@pytest.mark.parametrize("name", TIED)
def test_the_other_tie_of_embedding_and_head_round_trips(
    name: str, folder: Folder, tmp_path: Path, ids: Tensor, assert_close: Any
) -> None:
    path = folder(name, tie_word_embeddings=TIED[name])
    compress.run(path, [RTN(bits=8, group=8)], tmp_path / "o")
    assert bool({"lm_head.weight", "embed_out.weight"} & set(Checkpoint(path).names())) == (not TIED[name])
    assert_close("logits", logits_of(compress.load(tmp_path / "o"), ids), logits_of(stock(path), ids), 0.05)


# -- names in the file -----------------------------------------------------------------------------


def renamed(path: Path, target: Path, rename: Callable[[str], str]) -> Path:
    """A copy of a folder whose tensors have other names."""
    import shutil

    from safetensors.torch import load_file, save_file

    shutil.copytree(path, target)
    tensors = {rename(name): tensor for name, tensor in load_file(target / "model.safetensors").items()}
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt2", "bloom", "opt"])
def test_a_file_without_the_models_prefix_keeps_its_names(
    name: str, folder: Folder, rounded: Rounded, tmp_path: Path, ids: Tensor, assert_close: Any
) -> None:
    prefix = "model." if name == "opt" else "transformer."
    bare = renamed(folder(name), tmp_path / "bare", lambda tensor: tensor.removeprefix(prefix))
    compress.run(bare, [RTN(group=8)], tmp_path / "o")
    loaded, usual = compress.load(tmp_path / "o"), compress.load(rounded(name).out)
    assert set(compress.artifact.Artifact(tmp_path / "o").names()) == set(Checkpoint(bare).names())
    assert torch.equal(logits_of(loaded, ids), logits_of(usual, ids))


def test_a_file_that_holds_a_parameter_twice_is_refused(folder: Folder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = renamed(folder("gpt2"), tmp_path / "model", str)
    tensors = load_file(path / "model.safetensors")
    tensors["h.0.attn.c_attn.weight"] = tensors["transformer.h.0.attn.c_attn.weight"].clone()
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(compress.ArtifactError, match=r"both map to transformer\.h\.0\.attn\.c_attn\.weight"):
        compress.run(path, [RTN(group=8)], tmp_path / "o")


def test_a_tensor_nobody_knows_passes_through(folder: Folder, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    path = renamed(folder("llama"), tmp_path / "model", str)
    extra = torch.arange(6, dtype=torch.int64)
    tensors = load_file(path / "model.safetensors") | {"model.layers.0.self_attn.rotary_emb.inv_freq": extra}
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    report = compress.run(path, [RTN(group=8)], tmp_path / "o")
    assert report.coverage.reasons()["unknown to the architecture"] == 6
    kept = Checkpoint(tmp_path / "o").stored_tensor("model.layers.0.self_attn.rotary_emb.inv_freq")
    assert torch.equal(kept, extra)


def test_a_conv1d_is_written_back_transposed(folder: Folder, tmp_path: Path) -> None:
    compress.run(folder("gpt2"), [Magnitude(sparsity=0.0)], tmp_path / "o")
    export_dense(tmp_path / "o", tmp_path / "dense")
    source, dense = Checkpoint(folder("gpt2")), Checkpoint(tmp_path / "dense")
    assert all(torch.equal(source.tensor(name), dense.tensor(name)) for name in source.names())
    assert source.names() == dense.names()


# -- refusals --------------------------------------------------------------------------------------


def test_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    (tmp_path / "m").mkdir()
    config_text = '{"model_type": "t5", "is_encoder_decoder": true, "d_model": 48}'
    (tmp_path / "m" / "config.json").write_text(config_text)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "m" / "model.safetensors")
    with pytest.raises(compress.ArtifactError, match="t5 is an encoder-decoder"):
        compress.run(tmp_path / "m", [RTN()], tmp_path / "o")


def test_a_model_whose_blocks_depend_on_each_other_is_refused(
    folder: Folder, walk_of: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    walk = walk_of(folder("llama"))
    first, second = walk.blocks
    forward = type(second).forward

    def depends(self: Any, hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls[self is second] += 1
        return forward(self, hidden, *args, **kwargs) + (0.1 * calls[True] if self is second else 0)

    calls = {False: 0, True: 0}
    monkeypatch.setattr(type(first), "forward", depends)
    with (
        torch.no_grad(),
        pytest.raises(compress.UnsupportedWeight, match=r"layers\.1: called alone, its output differs by"),
    ):
        walk.prove(ids[:1])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["gpt_neox", "mixtral", "opt", "falcon"])
def test_what_done_parts_of_a_block_gave_is_what_they_would_give(
    name: str, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    steps = (Wanda(sparsity=0.5), GPTQ(bits=4, group=8))
    few = Calibration(samples=24, length=64)  # so that some experts are measured
    recipe = Recipe(passes=steps, calibration=few, limits=Limits(max_starved=1.0))
    kept = compress.run(folder(name), recipe, tmp_path / "kept" / "out").out
    never = property(lambda self: False, lambda self, value: None)
    monkeypatch.setattr(Memo, "active", never, raising=False)
    again = compress.run(folder(name), recipe, tmp_path / "again" / "out").out
    files = [{path.name: path.read_bytes() for path in out.iterdir()} for out in (kept, again)]
    assert files[0] == files[1]
