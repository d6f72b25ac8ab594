"""Removed blocks, heads, neurons and directions: stock transformers loads the dense model without these parts.

The oracle is always the dense model with those parts switched off by hand, in float32, so that sums differ only by
their order.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import (
    FLAP,
    RTN,
    Calibration,
    CompressError,
    Pass,
    PassManager,
    PlanError,
    Recipe,
    RecipeError,
    ShortGPT,
    SliceGPT,
    UnsupportedWeight,
    Wanda,
    WandaSP,
)  # fmt: skip
from compress.model.anatomy import MISSED, Coverage
from compress.model.divergence import mean_kl
from compress.model.source import Checkpoint
from compress.model.whole import Whole
from compress.passes import OWL
from compress.passes.pruning.shortgpt import influence
from compress.plan import tokens_for
from compress.stats import Moments

RATIO = 1e-5  # float32 sums in another order
CALIBRATION = Calibration(samples=6, length=32)
SIZES: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 128, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 3,
    "initializer_range": 0.15,
}  # fmt: skip
MODELS: dict[str, dict[str, Any]] = {
    "llama": {},
    "tied": {"model_type": "llama", "tie_word_embeddings": True},
    "biased": {"model_type": "llama", "attention_bias": True, "mlp_bias": True},
    "many_heads": {"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 8},
    "mistral": {"sliding_window": 8},
    "qwen2": {
        "use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "qwen3": {"head_dim": 16},
    "smollm3": {"no_rope_layers": [1, 0, 1, 0], "use_sliding_window": False},
    "gemma": {"head_dim": 12, "num_key_value_heads": 1},
    "gemma2": {"head_dim": 12, "sliding_window": 8, "query_pre_attn_scalar": 12},
    "olmo": {},
    "olmo2": {},
    "cohere": {},
    "granite": {},
    "gpt2": {
        "vocab_size": 211, "n_embd": 48, "n_layer": 4, "n_head": 4, "n_positions": 128, "bos_token_id": 1,
        "eos_token_id": 2, "scale_attn_by_inverse_layer_idx": True, "initializer_range": 0.3,
    },
}  # fmt: skip


def families(*names: str, slow: tuple[str, ...]) -> Any:
    """One case a family; those that add little are left out of the quick check."""
    return pytest.mark.parametrize("name", [*names, *(pytest.param(name, marks=pytest.mark.slow) for name in slow)])


Change = Callable[[Any], None]
Folder = Callable[..., Path]


@pytest.fixture(scope="module")
def folder(model_folder: Any, tmp_path_factory: pytest.TempPathFactory) -> Folder:
    """`folder(name, change)`: a random model of four blocks, changed in memory before it is saved; read-only."""
    from transformers import AutoConfig, AutoModelForCausalLM

    made: dict[str, Path] = {}

    def make(name: str, change: Change | None = None) -> Path:
        if change is None and name in made:
            return made[name]
        torch.manual_seed(0)
        sizes = {} if name == "gpt2" else {**SIZES, "tie_word_embeddings": False}
        config = AutoConfig.for_model(**{"model_type": name, **sizes, **MODELS[name]})
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim == 1:
                    parameter.add_(torch.randn_like(parameter), alpha=0.2)
            if change is not None:
                change(model)
        path = tmp_path_factory.mktemp(name)
        for file in model_folder("llama").glob("token*"):
            shutil.copy(file, path)
        model.save_pretrained(path)
        if change is None:
            made[name] = path
        return path

    return make


@pytest.fixture
def shaped(folder: Folder, tmp_path: Path) -> Callable[..., Path]:
    """`shaped(name or folder, step, ...)`: the folder that a recipe of these passes makes."""

    def make(model: str | Path, *steps: Pass, out: str = "out") -> Path:
        source = folder(model) if isinstance(model, str) else model
        return compress.run(source, steps, tmp_path / out, calibration=CALIBRATION).out

    return make


def logits(model: Any, ids: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(input_ids=ids, use_cache=False).logits)


def told(path: Path) -> dict[str, Any]:
    """What the first pass of a folder says that it did."""
    found: dict[str, Any] = json.loads((path / "compress.json").read_text())["reshaped"][0]
    return found


def numbers(spans: str) -> list[int]:
    """`0-2,5` as numbers."""
    ends = [list(map(int, span.split("-"))) for span in spans.split(",")]
    return [n for end in ends for n in range(end[0], end[-1] + 1)]


def switched_off(model: Any, kept: dict[str, str], channels: dict[str, int]) -> Any:
    """A dense model whose o_proj and down_proj no longer read what a pass did not keep."""
    for name, spans in kept.items():
        weight_OI = model.get_submodule(name).weight.data
        width = channels[name.rpartition(".")[2]]
        gone_G = torch.ones(weight_OI.shape[1] // width, dtype=torch.bool)
        gone_G[numbers(spans)] = False
        weight_OI[:, gone_G.repeat_interleave(width)] = 0
    return model


# -- heads and neurons -----------------------------------------------------------------------------


@pytest.mark.slow
@families(
    "tied", "qwen2", "qwen3", slow=("llama", "biased", "mistral", "smollm3", "olmo", "cohere", "granite", "gemma2")
)
def test_what_loads_is_the_dense_model_without_those_heads_and_neurons(
    name: str, folder: Folder, shaped: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    path = shaped(name, WandaSP(heads=0.5, neurons=0.25))
    model, dense = hugging_face(path), hugging_face(folder(name))
    head = dense.model.layers[0].self_attn.head_dim
    want = switched_off(dense, told(path)["kept"], {"o_proj": 2 * head, "down_proj": 1})
    assert_close("logits", logits(model, ids), logits(want, ids), RATIO)


def test_whole_groups_of_heads_go_and_the_config_says_so(shaped: Any, hugging_face: Any) -> None:
    model = hugging_face(shaped("qwen3", WandaSP(heads=0.5, neurons=0.25)))
    config, block = model.config, model.model.layers[3]
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (2, 1, 16)
    assert config.intermediate_size == 56  # 54 in steps of 8
    assert block.self_attn.q_proj.weight.shape == (32, 48)
    assert block.self_attn.k_proj.weight.shape == block.self_attn.v_proj.weight.shape == (16, 48)
    assert block.self_attn.o_proj.weight.shape == (48, 32)
    assert block.mlp.gate_proj.weight.shape == block.mlp.up_proj.weight.shape == (56, 48)


def quiet_parts(model: Any) -> None:
    """The second pair of heads and every fourth neuron of each block are read with weight zero."""
    for block in model.model.layers:
        block.self_attn.o_proj.weight[:, 24:] = 0
        block.mlp.down_proj.weight[:, ::4] = 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", [WandaSP, FLAP])
def test_removing_what_nothing_reads_leaves_the_logits(
    kind: Any, folder: Folder, shaped: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    dense = folder("llama", quiet_parts)
    path = shaped(dense, kind(heads=0.5, neurons=0.25, multiple=6))
    assert told(path)["kept"]["model.layers.2.self_attn.o_proj"] == "0"
    assert told(path)["kept"]["model.layers.2.mlp.down_proj"].startswith("1-3,5-7,9-11")
    assert_close("logits", logits(hugging_face(path), ids), logits(hugging_face(dense), ids), RATIO)


@pytest.mark.parametrize("size", [1, 7, 100])
def test_fluctuation_is_the_two_pass_mean_and_variance(size: int, assert_close: Any) -> None:
    x_TI = torch.randn(100, 13, generator=torch.Generator().manual_seed(0)) + 50  # far from zero: squares would cancel
    merged = Moments(13, torch.device("cpu"))
    for part_TI in x_TI.split(size):
        merged.update(part_TI)
    mean_I, variance_I, _ = merged.value()
    assert_close("mean", mean_I, x_TI.double().mean(0), 1e-6)
    assert_close("variance", variance_I, x_TI.double().var(0, correction=0), 1e-6)


@pytest.mark.slow
def test_the_bias_takes_over_the_mean_of_what_is_removed(
    folder: Folder, shaped: Any, hugging_face: Any, walk_of: Any, assert_close: Any
) -> None:
    path = shaped("biased", FLAP())
    dense, heard = hugging_face(folder("biased")), []
    first = dense.model.layers[0].mlp.down_proj  # nothing is removed before it
    first.register_forward_pre_hook(lambda _, args: heard.append(args[0].reshape(-1, 72).double()))
    recipe = Recipe(passes=(FLAP(),), calibration=CALIBRATION)
    for windows in tokens_for(walk_of(folder("biased")), folder("biased"), recipe).windows:
        logits(dense, windows)
    gone_I = torch.ones(72, dtype=torch.bool)
    gone_I[numbers(told(path)["kept"]["model.layers.0.mlp.down_proj"])] = False
    want = first.bias.double() + first.weight.double() @ torch.cat(heard).mean(0).masked_fill(~gone_I, 0)
    assert_close("bias", hugging_face(path).model.layers[0].mlp.down_proj.bias, want, RATIO)


@pytest.mark.slow
def test_a_model_without_biases_gets_those_that_its_config_can_name(shaped: Any) -> None:
    plain, biased = shaped("llama", FLAP(compensate=False), out="plain"), shaped("llama", FLAP(), out="biased")
    added = set(Checkpoint(biased).names()) - set(Checkpoint(plain).names())
    assert {name.rpartition("mlp.")[2] for name in added} == {"gate_proj.bias", "up_proj.bias", "down_proj.bias"}
    assert not Checkpoint(biased).tensor("model.layers.3.mlp.up_proj.bias").any()


def steady(model: Any) -> None:
    """Neurons that are far from zero and hardly move."""
    for block in model.model.layers:
        block.mlp.gate_proj.bias.add_(3)
        block.mlp.up_proj.bias.add_(3)


@pytest.mark.slow
def test_steady_neurons_cost_less_when_their_mean_stays(folder: Folder, tmp_path: Path) -> None:
    dense = folder("biased", steady)
    steps = {"flap": FLAP(), "bare": FLAP(compensate=False), "wanda-sp": WandaSP()}
    kl = {
        name: compress.run(dense, [step], tmp_path / name, calibration=CALIBRATION).kl for name, step in steps.items()
    }
    assert kl["flap"] < 0.5 * min(kl["bare"], kl["wanda-sp"])


# -- blocks ----------------------------------------------------------------------------------------


@families("tied", "qwen2", "smollm3", slow=("llama", "mistral", "gemma", "gemma2", "olmo2", "cohere", "granite"))
def test_what_loads_is_the_dense_model_without_those_blocks(
    name: str, folder: Folder, shaped: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    path = shaped(name, ShortGPT(blocks=1, protect=0))
    model, want = hugging_face(path), hugging_face(folder(name))
    (gone,) = told(path)["blocks"]
    del want.model.layers[gone]
    types = getattr(want.config, "layer_types", None)
    want.config.layer_types = types and [kind for i, kind in enumerate(types) if i != gone]
    want.config.num_hidden_layers = 3
    assert_close("logits", logits(model, ids), logits(want, ids), RATIO)
    assert [block.self_attn.layer_idx for block in model.model.layers] == [0, 1, 2]
    assert model.config.layer_types == want.config.layer_types if types else True


@pytest.mark.slow
@pytest.mark.parametrize("step", [ShortGPT(blocks=2), WandaSP(heads=0.5), SliceGPT(fraction=0.25)], ids=str)
def test_generation_with_a_cache_is_generation_without(step: Pass, shaped: Any, hugging_face: Any, ids: Tensor) -> None:
    model = hugging_face(shaped("qwen2", step))
    tokens = [model.generate(ids[:1], max_new_tokens=12, do_sample=False, use_cache=cached) for cached in (True, False)]
    assert torch.equal(*tokens)


def idle(*blocks: int) -> Change:
    """Blocks that add nothing to the hidden state."""

    def change(model: Any) -> None:
        for block in blocks:
            model.model.layers[block].self_attn.o_proj.weight.zero_()
            model.model.layers[block].mlp.down_proj.weight.zero_()

    return change


def test_an_idle_block_has_no_influence(folder: Folder, walk_of: Any, ids: Tensor) -> None:
    with torch.no_grad():
        found, _ = influence(Whole(walk_of(folder("llama", idle(2))), [ids], ids))
    assert abs(found[2]) < 1e-6
    assert min(found[0], found[1], found[3]) > 1e-3


@pytest.mark.parametrize("choose", ["lowest", "contiguous"])
def test_idle_blocks_go_first_and_are_not_missed(
    choose: Any, folder: Folder, shaped: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    dense = folder("llama", idle(1, 2))
    path = shaped(dense, ShortGPT(blocks=0.5, choose=choose, protect=0))
    assert told(path)["blocks"] == [1, 2]
    assert_close("logits", logits(hugging_face(path), ids), logits(hugging_face(dense), ids), RATIO)


def test_the_protected_ends_stay(folder: Folder, shaped: Any) -> None:
    assert told(shaped(folder("llama", idle(0, 3)), ShortGPT(blocks=2)))["blocks"] == [1, 2]


# -- the hidden state ------------------------------------------------------------------------------


@families("tied", "biased", "qwen3", slow=("llama", "mistral", "qwen2", "smollm3"))
def test_rotating_alone_changes_nothing(
    name: str, folder: Folder, shaped: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    model = hugging_face(shaped(name, SliceGPT(fraction=0.0)))
    assert_close("logits", logits(model, ids), logits(hugging_face(folder(name)), ids), RATIO)
    assert not model.config.tie_word_embeddings


def flat(model: Any) -> None:
    """A hidden state that stays within 32 of its 48 dimensions."""
    basis, _ = torch.linalg.qr(torch.randn(48, 32))
    onto = basis @ basis.T
    model.model.embed_tokens.weight.copy_(model.model.embed_tokens.weight @ onto)
    for block in model.model.layers:
        for writer in (block.self_attn.o_proj, block.mlp.down_proj):
            writer.weight.copy_(onto @ writer.weight)


def test_directions_that_are_never_used_are_not_missed(
    folder: Folder, shaped: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    dense = folder("llama", flat)
    model = hugging_face(shaped(dense, SliceGPT(fraction=0.33, multiple=4)))
    assert model.config.hidden_size == 32
    assert_close("logits", logits(model, ids), logits(hugging_face(dense), ids), RATIO)


@pytest.mark.slow
def test_principal_axes_beat_arbitrary_ones(folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    best = compress.run(folder("llama"), [SliceGPT()], tmp_path / "best", calibration=CALIBRATION)
    monkeypatch.setattr("compress.passes.pruning.slicegpt.covariance", lambda model: torch.eye(48).double())
    other = compress.run(folder("llama"), [SliceGPT()], tmp_path / "other", calibration=CALIBRATION)
    assert best.kl < other.kl


# -- every pass of this kind -----------------------------------------------------------------------

EACH = pytest.mark.parametrize(
    "step",
    [ShortGPT(), SliceGPT(), FLAP(), pytest.param(WandaSP(heads=0.5), marks=pytest.mark.slow)],
    ids=lambda s: s.name,
)


@pytest.mark.slow
@EACH
def test_the_reported_divergence_is_from_the_dense_model(
    step: Pass, folder: Folder, hugging_face: Any, walk_of: Any, tmp_path: Path
) -> None:
    report = compress.run(folder("llama"), [step], tmp_path / "out", calibration=CALIBRATION)
    recipe = Recipe(passes=(step,), calibration=CALIBRATION)
    probe = tokens_for(walk_of(folder("llama")), folder("llama"), recipe).probe_NT
    dense, made = logits(hugging_face(folder("llama")), probe), logits(hugging_face(report.out), probe)
    assert report.kl == pytest.approx(mean_kl(dense, made), rel=1e-3)
    assert report.kl > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("step", [FLAP(heads=0.5), SliceGPT()], ids=lambda s: s.name)
def test_the_same_run_writes_the_same_bytes(step: Pass, shaped: Any) -> None:
    one, other = (shaped("llama", step, out=out) for out in ("one", "other"))
    files = sorted(file.name for file in one.iterdir())
    assert files == sorted(file.name for file in other.iterdir())
    assert [(one / name).read_bytes() for name in files] == [(other / name).read_bytes() for name in files]


@pytest.mark.slow
@EACH
def test_what_follows_works_on_the_smaller_model(step: Pass, shaped: Any, ids: Tensor) -> None:
    path = shaped("llama", step, OWL(), Wanda(sparsity=0.5), RTN(group=8))
    model = compress.load(path)
    provenance = json.loads((path / "compress.json").read_text())
    assert [row["step"] for row in provenance["reshaped"]] == [step.name]
    assert len(provenance["sites"]) == 7 * model.config.num_hidden_layers
    assert torch.isfinite(logits(model, ids)).all()
    assert compress.artifact.verify(path)


@pytest.mark.slow
def test_each_pass_is_measured_on_what_the_one_before_it_made(
    shaped: Any, folder: Folder, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    both = shaped("llama", ShortGPT(blocks=2), FLAP(heads=0.5))
    second = shaped(shaped("llama", ShortGPT(blocks=2), out="first"), FLAP(heads=0.5), out="second")
    assert_close("logits", logits(hugging_face(both), ids), logits(hugging_face(second), ids), RATIO)


@pytest.mark.parametrize(
    ("name", "step", "message"),
    [
        ("gemma", WandaSP(heads=0.5), r"wanda-sp\.heads: all query heads of gemma share one key-value head"),
        ("gpt2", WandaSP(), r"wanda-sp\.neurons: transformer\.h\.0 of gpt2 has no mlp\.gate_proj"),
        ("olmo2", FLAP(heads=0.5), r"flap\.heads: .*q_norm\.weight of olmo2 is shared by all heads"),
        ("many_heads", WandaSP(heads=0.375), r"transformers has no such model: .*\(48\) is not a multiple of .* \(5\)"),
        (
            "llama",
            WandaSP(heads=0.1),
            r"wanda-sp\.heads: removing 0\.1 of 2 key-value groups leaves 2; at least 1 must be removed",
        ),
        (
            "llama",
            WandaSP(neurons=0.01),
            r"wanda-sp\.neurons: removing 0\.01 of 72 neurons leaves 72; at least 1 must be removed",
        ),
        ("llama", FLAP(neurons=0.0), "flap: nothing would be removed"),
        ("mistral", FLAP(), r"flap\.compensate: mistral has no bias in mlp\.down_proj .*; set compensate: false"),
        ("qwen2", FLAP(heads=0.5, neurons=0.0), r"qwen2 has no bias in self_attn\.o_proj"),
        ("gemma", SliceGPT(), "slicegpt: gemma is not supported; allowed: llama, mistral"),
        (
            "llama",
            SliceGPT(fraction=0.01),
            r"slicegpt\.fraction: 0\.01 of a hidden size of 48 leaves 48, as a multiple of 8; .*",
        ),
        ("llama", ShortGPT(blocks=3), "3 of 4 blocks are 3; with 1 protected at each end, 1 to 2 can be removed"),
        ("llama", ShortGPT(blocks=0.1), "0.1 of 4 blocks are 0"),
        ("gpt2", ShortGPT(blocks=1), "GPT2LMHeadModel without 1 of 4 blocks: 2 computes other outputs"),
    ],
    ids=str,
)
def test_what_a_pass_cannot_do_is_refused_in_one_line(
    name: str, step: Pass, message: str, folder: Folder, tmp_path: Path
) -> None:
    with pytest.raises((RecipeError, UnsupportedWeight), match=message) as caught:
        compress.run(folder(name), [step], tmp_path / "out", calibration=CALIBRATION)
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_a_head_is_not_sliced(folder: Folder, tmp_path: Path) -> None:
    from transformers import AutoModel

    AutoModel.from_pretrained(folder("llama")).save_pretrained(tmp_path / "body")
    with pytest.raises(UnsupportedWeight, match=r"LlamaModel has no head to take over the last norm's gain"):
        compress.run(tmp_path / "body", [SliceGPT()], tmp_path / "out", calibration=CALIBRATION)


def test_a_share_above_one_is_no_count() -> None:
    with pytest.raises(RecipeError, match=r"shortgpt\.blocks: 2\.0 is neither a whole number nor a share"):
        ShortGPT(blocks=2.0)


def test_a_pass_that_changes_the_shape_comes_first() -> None:
    with pytest.raises(RecipeError, match=r"passes\[1\]\.shortgpt: .* must come before passes\[0\]\.wanda"):
        Recipe(passes=(Wanda(), ShortGPT()))


def test_a_model_in_memory_keeps_its_shape(folder: Folder, hugging_face: Any, ids: Tensor) -> None:
    with pytest.raises(RecipeError, match=r"shortgpt changes the shape of the model .*; use compress\.run"):
        PassManager([ShortGPT()]).apply(hugging_face(folder("llama")), ids)


def test_the_limit_of_what_passes_miss_binds_only_where_one_rewrites(
    folder: Folder, shaped: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    missed = Coverage(touched={}, untouched={"x": (5, MISSED)}, missed=5)
    monkeypatch.setattr("compress.plan.coverage", lambda *_: missed)
    shaped("llama", ShortGPT())
    with pytest.raises(PlanError, match=r"limits\.max_untouched allows 2%"):
        shaped("llama", ShortGPT(), RTN(group=8), out="other")


@pytest.mark.parametrize("step", [Wanda(sites="*nothing*"), RTN(group=48)], ids=["no such site", "no such width"])
def test_what_follows_is_planned_on_the_new_shape_before_anything_is_measured(
    step: Pass, folder: Folder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(WandaSP, "reshape", None)  # never reached
    with pytest.raises(CompressError, match=r"selects no site|group 48 does not divide its width"):
        compress.run(folder("llama"), [WandaSP(), step], tmp_path / "out", calibration=CALIBRATION)
