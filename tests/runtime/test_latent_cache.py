"""The latent cache gives the tokens of the plain cache from fewer bytes, for the attention classes it was proved on."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache

import compress
from compress import RTN, ArtifactError, Calibration, Recipe, RecipeError
from compress.artifact import Artifact
from compress.passes.lowrank.svd_llm import SVDLLM
from compress.passes.lowrank.transmla import TransMLA
from compress.recipe import Limits
from compress.runtime.kv import QuantizedCache
from compress.runtime.latent import LatentCache, LatentLayer

SAME = 1e-4  # relative, of float32 logits
PLAIN: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    "initializer_range": 0.15,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {},  # with biases
    "qwen3": {"head_dim": 16},  # a norm on each head of keys
    "olmo2": {},  # a norm on all heads together
    "cohere": {"use_qk_norm": True},  # pairs of neighbours are rotated; a norm with a gain for each head
    "phi": {"num_key_value_heads": 4},  # half of each head is rotated
    "glm": {"head_dim": 12},  # the same, in pairs of neighbours
    "smollm3": {"no_rope_layers": [1, 0]},  # a layer whose keys are not rotated
    "gemma3_text": {"head_dim": 12, "layer_types": ["full_attention"] * 2},  # an embedding for each type of layer
    "opt": {"ffn_dim": 72, "word_embed_proj_dim": 48},  # nothing is
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
}
CALIBRATION = Calibration(samples=6, length=32)
TWO = SVDLLM(sites="*.[kv]_proj", removed=0.6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[..., Path]:
    """`folder(family, **config)`: a random float32 model with random norms and biases, and a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    tokenizer, made = AutoTokenizer.from_pretrained(tiny_llama), dict[str, Path]()

    def make(kind: str, **more: Any) -> Path:
        key = f"{kind} {more}"
        if key not in made:
            config = AutoConfig.for_model(kind, **{**PLAIN, **KINDS.get(kind, {}), **more})
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            with torch.no_grad():
                for parameter in model.parameters():
                    if parameter.ndim == 1:
                        parameter.add_(torch.randn_like(parameter), alpha=0.2)
            made[key] = tmp_path_factory.mktemp(kind)
            model.save_pretrained(made[key])
            tokenizer.save_pretrained(made[key])
        return made[key]

    return make


@pytest.fixture(scope="module")
def artifact(folder: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`artifact(family, step, **config)`: that model with factored keys and values and a recipe that caches latents."""
    made: dict[str, Path] = {}

    def make(kind: str, step: Any = None, **more: Any) -> Path:
        key = f"{kind} {step} {more}"
        if key not in made:
            limits = Limits(max_untouched=0.1)  # gains of norms as matrices
            recipe = Recipe(passes=(step or TransMLA(),), kv="latent", calibration=CALIBRATION, limits=limits)
            made[key] = compress.run(folder(kind, **more), recipe, tmp_path_factory.mktemp("latent") / "out").out
        return made[key]

    return make


@pytest.fixture(scope="module")
def both(artifact: Callable[..., Path]) -> tuple[Any, Any]:
    """A Llama of two latents a token, with the plain cache and with theirs: of one latent see the families."""
    return compress.load(artifact("llama", TWO), kv=None), compress.load(artifact("llama", TWO))


@pytest.fixture
def padded(ids: Tensor) -> dict[str, Tensor]:
    """Three prompts, two of which begin with padding."""
    mask = torch.ones_like(ids)
    mask[1, :4] = mask[2, :9] = 0
    return {"input_ids": ids.masked_fill(mask == 0, 3), "attention_mask": mask}


def generated(model: Any, prompt: dict[str, Tensor], **options: Any) -> Any:
    settings = {"max_new_tokens": 12, "min_new_tokens": 12, "do_sample": False, "output_logits": True}
    return model.generate(**prompt, **{**settings, **options}, return_dict_in_generate=True)


def streamed(model: Any, ids: Tensor, cache: Any, step: int = 1) -> Tensor:
    with torch.inference_mode():
        return torch.cat([model(input_ids=part, past_key_values=cache).logits for part in ids.split(step, 1)], 1)


def new_cache(model: Any, ids: Tensor) -> Any:
    """An empty latent cache of a model."""
    cache = model(ids[:, :1]).past_key_values
    assert isinstance(cache, LatentCache)
    cache.reset()
    return cache


# -- the same tokens ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_generation_after_padded_prompts_is_that_of_the_plain_cache(
    kind: str, artifact: Any, padded: dict[str, Tensor], assert_close: Any
) -> None:
    plain, latent = compress.load(artifact(kind), kv=None), compress.load(artifact(kind))
    want, got = generated(plain, padded), generated(latent, padded)
    assert isinstance(got.past_key_values, LatentCache)
    assert all(isinstance(layer, LatentLayer) for layer in got.past_key_values.layers)
    assert torch.equal(got.sequences, want.sequences)
    assert_close("logits", torch.stack(got.logits), torch.stack(want.logits), SAME)


@pytest.mark.parametrize("low_memory", [False, True])
@pytest.mark.parametrize("step", [1, 4])
def test_a_text_in_steps_gives_the_logits_of_one_forward(
    artifact: Any, ids: Tensor, assert_close: Any, step: int, low_memory: bool
) -> None:
    model = compress.load(artifact("llama"), low_memory=low_memory)
    with torch.inference_mode():
        want = model(ids, use_cache=False).logits
    assert_close("logits", streamed(model, ids, new_cache(model, ids), step), want, SAME)


def test_beams_are_those_of_the_plain_cache(both: tuple[Any, Any], padded: dict[str, Tensor]) -> None:
    plain, latent = (generated(model, padded, num_beams=3, output_logits=False) for model in both)
    assert torch.equal(latent.sequences, plain.sequences)
    assert latent.past_key_values.layers[0].keys.shape[:3] == (9, 1, 32)


def test_generation_goes_on_from_a_prompt_that_was_read_before(both: tuple[Any, Any], ids: Tensor) -> None:
    plain, latent = both
    want = generated(plain, {"input_ids": ids})
    cache = new_cache(latent, ids)
    with torch.inference_mode():
        latent(ids[:, :15], past_key_values=cache)
    got = generated(latent, {"input_ids": ids}, past_key_values=copy.deepcopy(cache))
    assert torch.equal(got.sequences, want.sequences)
    assert cache.get_seq_length() == 15


def test_tokens_can_be_taken_back_as_assisted_generation_does(both: tuple[Any, Any], ids: Tensor) -> None:
    prompt = {"input_ids": ids[:1, :12].repeat(1, 3)}
    plain = generated(both[0], prompt)
    looked_up = generated(both[1], prompt, prompt_lookup_num_tokens=3, output_logits=False)
    assert torch.equal(looked_up.sequences, plain.sequences)


def test_the_batch_can_be_cropped_reordered_repeated_and_thinned(
    both: tuple[Any, Any], padded: dict[str, Tensor], assert_close: Any
) -> None:
    model, ids = both[1], padded["input_ids"]
    positions = (padded["attention_mask"].cumsum(1) - 1).clamp(min=0)
    changes: list[tuple[Callable[[Any], None], Any]] = [
        (lambda c: c.crop(-3), (slice(None), slice(None, -3))),
        (lambda c: c.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
        (lambda c: c.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
        (lambda c: c.batch_select_indices(torch.tensor([1])), [1]),
    ]
    for change, rows in changes:
        found = []
        for kept, then in ((slice(None), change), (rows, lambda c: None)):
            cache = new_cache(model, ids)
            with torch.inference_mode():
                model(ids[kept], position_ids=positions[kept], past_key_values=cache)
                then(cache)
                step = torch.full((len(cache.layers[0].keys), 1), 7)
                found.append(model(step, position_ids=step + 20, past_key_values=cache).logits)
        assert_close("after", found[0], found[1], SAME)


def test_a_reset_cache_begins_anew(both: tuple[Any, Any], ids: Tensor) -> None:
    cache = new_cache(both[1], ids)
    first = streamed(both[1], ids, cache)
    cache.reset()
    assert cache.nbytes() == cache.get_seq_length() == 0
    assert torch.equal(streamed(both[1], ids, cache), first)


@pytest.mark.slow
def test_the_builtin_model_says_the_same_in_bfloat16(tmp_path: Path, assert_close: Any) -> None:
    recipe = Recipe(passes=(TransMLA(),), kv="latent", calibration=Calibration(samples=16, length=128))
    out = compress.run("builtin", recipe, tmp_path / "out").out
    plain, latent = compress.load(out, kv=None), compress.load(out)
    ids = torch.randint(4, 4000, (2, 60), generator=torch.Generator().manual_seed(0))
    got = streamed(latent, ids, new_cache(latent, ids), step=6)
    want = streamed(plain, ids, DynamicCache(config=plain.config), step=6)
    assert_close("logits", got, want, 0.02)  # a few roundings to 8 bits, through four blocks


# -- fewer bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("step", "rank"), [(None, 24), (TransMLA(kept=0.25), 12), (TWO, 2 * 6)])
def test_bytes_are_those_of_latents_and_positions(artifact: Any, ids: Tensor, step: Any, rank: int) -> None:
    model = compress.load(artifact("llama", step))
    plain, latent = DynamicCache(config=model.config), new_cache(model, ids)
    for cache in (plain, latent):
        streamed(model, ids, cache, step=5)
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in plain.layers)
    assert held == 2 * ids.numel() * 2 * 24 * 4
    assert latent.nbytes() == 2 * ids.numel() * rank * 4 + 21 * 4  # positions are alike in all rows


def test_windows_of_a_hybrid_stay_plain(model_folder: Any, tmp_path: Path, ids: Tensor, assert_close: Any) -> None:
    recipe = Recipe(passes=(TransMLA(),), kv="latent", calibration=CALIBRATION)
    out = compress.run(model_folder("hybrid"), recipe, tmp_path / "out").out
    model = compress.load(out)
    cache = new_cache(model, ids)
    want = streamed(model, ids, DynamicCache(config=model.config))
    assert_close("logits", streamed(model, ids, cache), want, SAME)
    assert [type(layer).__name__ for layer in cache.layers] == ["LatentLayer", "DynamicSlidingWindowLayer"]


def test_factors_that_are_rounded_too_are_read(folder: Any, tmp_path: Path, ids: Tensor, assert_close: Any) -> None:
    passes = (TransMLA(), RTN(bits=8, group=0, factors=True, sites="*.[kv]_proj"))
    out = compress.run(folder("llama"), Recipe(passes=passes, kv="latent", calibration=CALIBRATION), tmp_path / "o").out
    plain, latent = compress.load(out, kv=None), compress.load(out)
    want = streamed(plain, ids, DynamicCache(config=plain.config))
    assert_close("logits", streamed(latent, ids, new_cache(latent, ids)), want, SAME)


# -- refusals ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("latent", "kv: latent: no attention of LlamaForCausalLM has both k_proj and v_proj factored; use transmla "
                   "or svd-llm"),
        ("latnet", "kv: 'latnet' is not allowed; it must be latent, or options such as `bits: 4`"),
        ({"latent": True}, "kv: unknown option 'latent'; allowed: bits, group, keys, residual, sink"),
    ],
)  # fmt: skip
def test_a_dense_model_has_no_latents(tiny_llama: Path, given: Any, message: str) -> None:
    with pytest.raises(RecipeError) as error:
        compress.load(tiny_llama, kv=given)
    assert str(error.value) == message


@pytest.mark.parametrize(
    ("kind", "more", "message"),
    [
        ("mistral", {"sliding_window": 8}, "MistralForCausalLM has no full attention with a k_proj"),
        ("gpt_neox", {}, "GPTNeoXForCausalLM has no full attention with a k_proj and a v_proj of its own"),
        ("llama", {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
         "the rotary embedding of LlamaForCausalLM depends on more than the position: dynamic"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 2, 2]}},
         "the rotary embedding of LlamaForCausalLM depends on more than the position: positions of an image"),
        ("olmo", {"clip_qkv": 1.0}, "OlmoForCausalLM clips its keys"),
    ],
)  # fmt: skip
def test_a_run_refuses_a_family_whose_keys_cannot_be_made_again(
    folder: Any, tmp_path: Path, kind: str, more: dict[str, Any], message: str
) -> None:
    recipe = Recipe(passes=(SVDLLM(),), kv="latent", calibration=CALIBRATION)
    with pytest.raises(RecipeError, match=f"^kv: latent: {message}"):
        compress.run(folder(kind, **more), recipe, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("step", [SVDLLM(sites="*mlp*"), SVDLLM(sites="*.k_proj"), SVDLLM(removed=0.0)])
def test_a_run_refuses_latents_that_no_pass_makes(folder: Any, tmp_path: Path, step: Any) -> None:
    with pytest.raises(RecipeError, match="kv: latent: no attention of LlamaForCausalLM has both k_proj and v_proj"):
        compress.run(folder("llama"), Recipe(passes=(step,), kv="latent", calibration=CALIBRATION), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_recipe_without_a_factoring_pass_is_refused() -> None:
    with pytest.raises(RecipeError, match="kv: latent: needs a pass that factors keys and values, such as transmla"):
        Recipe(passes=(RTN(),), kv="latent")


def test_latents_larger_than_keys_and_values_are_refused(folder: Any, tmp_path: Path) -> None:
    wide = SVDLLM(sites="*.[qkv]_proj", shared=True, removed=0.05)  # one latent of 27 numbers, for 12 + 12
    out = compress.run(folder("llama", num_key_value_heads=1), [wide], tmp_path / "o", calibration=CALIBRATION).out
    with pytest.raises(RecipeError, match="kv: latent: the latents of LlamaForCausalLM are larger than its keys"):
        compress.load(out, kv="latent")


def test_an_attention_that_does_something_else_to_its_keys_is_found(artifact: Any, monkeypatch: Any) -> None:
    from transformers.models.llama import modeling_llama

    path, rotate, calls = artifact("llama"), modeling_llama.apply_rotary_pos_emb, []

    def other(q: Tensor, k: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
        calls.append(1)
        q, k = rotate(q, k, *rest)
        return q, k * (1.5 if q.numel() else 1)  # the family's call has queries

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    with pytest.raises(RecipeError) as error:
        compress.load(path)
    assert str(error.value) == (
        "kv: latent: LlamaAttention 0 computes its keys or values in an unsupported way; load with kv=None"
    )
    assert compress.load(path, kv=None) is not None


def test_an_attention_that_is_not_shown_positions_of_tokens_is_refused(folder: Any, tmp_path: Path) -> None:
    gptj = folder("gptj", n_embd=48, n_layer=2, n_head=4, n_positions=128, rotary_dim=8)
    out = compress.run(gptj, [TransMLA()], tmp_path / "out", calibration=CALIBRATION).out
    with pytest.raises(
        RecipeError, match=r"^kv: latent: this attention is not given hidden states and token positions"
    ):
        compress.load(out, kv="latent")


def test_the_cache_of_another_model_is_refused(both: tuple[Any, Any], ids: Tensor) -> None:
    with pytest.raises(RecipeError, match="kv: latent: this cache was made for another model"):
        both[0](ids, past_key_values=new_cache(both[1], ids))


# -- recipes and artifacts ---------------------------------------------------------------------------


def test_a_recipes_choice_is_recorded_and_used_unless_another_is_asked_for(artifact: Any, ids: Tensor) -> None:
    path = artifact("llama")
    assert json.loads((path / "config.json").read_text())["quantization_config"]["kv"] == "latent"
    assert "kv: latent" in Artifact(path).provenance["recipe"]
    assert type(compress.load(path)(ids).past_key_values) is LatentCache
    assert type(compress.load(path, kv=None)(ids).past_key_values) is DynamicCache
    quantized = compress.load(path, kv={"bits": 8, "group": 4, "residual": 8})
    assert type(quantized(ids).past_key_values) is QuantizedCache


def test_transformers_own_loader_uses_it_and_saves_it(artifact: Any, tmp_path: Path, ids: Tensor) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(artifact("llama"), local_files_only=True)
    assert type(model(ids).past_key_values) is LatentCache
    model.save_pretrained(tmp_path / "again")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", local_files_only=True)
    assert type(again(ids).past_key_values) is LatentCache
    assert torch.equal(again(ids).logits, model(ids).logits)


def test_a_recipe_reads_back_what_it_writes() -> None:
    from compress.recipe import from_dict, parse

    recipe = Recipe(passes=(TransMLA(kept=0.25),), kv="latent")
    assert from_dict(parse(recipe.to_yaml())) == recipe


def test_a_damaged_description_is_refused(artifact: Any, tmp_path: Path) -> None:
    import shutil

    path = Path(shutil.copytree(artifact("llama"), tmp_path / "copy"))
    config = json.loads((path / "config.json").read_text())
    config["quantization_config"]["kv"] = "patent"
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ArtifactError, match=r"quantization_config: kv: 'patent' is not allowed; it must be latent"):
        compress.load(path)


def test_a_copy_of_the_model_uses_its_own_weights(artifact: Any, ids: Tensor) -> None:
    model = compress.load(artifact("llama"))
    want, twin = model.generate(ids, max_new_tokens=3), copy.deepcopy(model)
    with torch.no_grad():
        for projection in (layer.self_attn.v_proj for layer in model.model.layers):
            for tensor in (*projection.buffers(),):
                tensor.zero_()
    assert torch.equal(twin.generate(ids, max_new_tokens=3), want)
