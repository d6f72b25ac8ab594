"""Experts of a mixture: the tokens that each receives, the fallback if they are too few, and that the parts add up."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import (
    GPTQ,
    Calibration,
    Limits,
    Masked,
    PassManager,
    PlanError,
    Quantized,
    Recipe,
    UnsupportedWeight,
    Wanda,
    WeightPass,
)
from compress.artifact import Artifact
from compress.events import Event, Starved
from compress.model import block as blocks
from compress.model.site import FEWEST
from compress.stats import ColumnNorm, Gram

SMALL: dict[str, Any] = {
    "vocab_size": 211, "hidden_size": 48, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "bos_token_id": 1, "eos_token_id": 2, "head_dim": 12,
    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 512, "tie_word_embeddings": False,
}  # fmt: skip
MANY = Calibration(samples=24, length=64)  # about 768 tokens an expert


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_llama: Path) -> Callable[[str], Path]:
    """A tiny mixture with a tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            torch.manual_seed(0)
            model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **SMALL), dtype=torch.float32)
            made[name] = tmp_path_factory.mktemp(name)
            model.save_pretrained(made[name])
            AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(made[name])
        return made[name]

    return make


# -- what an expert is given -----------------------------------------------------------------------


def given(model: Any, ids: Tensor, layer: int = 0) -> tuple[Tensor, Tensor]:
    """The tokens [T, hidden] that enter the experts of a Mixtral's layer, and the experts [T, 2] they are sent to."""
    seen: list[tuple[Tensor, Tensor]] = []
    experts = model.model.layers[layer].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: seen.append((args[0], args[1])))
    with torch.no_grad():
        model(input_ids=ids)
    hook.remove()
    return seen[0]


def test_an_expert_is_measured_on_the_tokens_its_router_sends(
    folder: Any, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    x_TD, chosen_TK = given(hugging_face(folder("mixtral")), ids)
    walk = walk_of(folder("mixtral"))
    with torch.no_grad():
        block = next(iter(walk.visit([walk.enter(ids)], walk.enter(ids[:1]))))
        block.collect(block.groups, (Gram, ColumnNorm))
    for expert in range(4):
        own_TD = x_TD[(chosen_TK == expert).any(1)]
        for name in ("w1", "w3"):
            site = block.sites[f"model.layers.0.block_sparse_moe.experts.{expert}.{name}"]
            assert site.stats.tokens == len(own_TD)
            assert_close("gram", site.stats[Gram], own_TD.T @ own_TD / len(own_TD), 1e-5)
            assert_close("norm", site.stats[ColumnNorm], own_TD.norm(dim=0), 1e-5)


def test_gate_and_up_of_an_expert_share_one_statistic(folder: Any, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(folder("mixtral"))
    with torch.no_grad():
        block = next(iter(walk.visit([walk.enter(ids)], walk.enter(ids[:1]))))
        block.collect(block.groups, (Gram,))
    stats = [block.sites[f"model.layers.0.block_sparse_moe.experts.2.{name}"].stats for name in ("w1", "w3")]
    assert stats[0] is stats[1]


def test_zeros_that_an_expert_is_given_are_no_tokens(walk_of: Any, folder: Any, ids: Tensor) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    options = {**SMALL, "intermediate_size_mlp": 24, "interleave_moe_layer_step": 1, "num_experts_per_tok": 1}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama4_text", **options), dtype=torch.float32).eval()
    told: list[int] = []

    class Counting(WeightPass):
        requires = (ColumnNorm,)

        def rewrite(self, site: compress.Site) -> compress.Weight:
            told.append(site.stats.tokens)
            return site.weight

        rewrite_unfed = rewrite

    PassManager([Counting(sites="*gate_up_proj.?")]).apply(model, ids)
    assert sum(told[:4]) == ids.numel()
    assert min(told) < ids.numel()


@pytest.mark.slow
def test_a_small_budget_measures_in_several_walks_and_changes_nothing(
    folder: Any, hugging_face: Any, ids: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    windows = ids.repeat(30, 1)
    steps = [Wanda(), GPTQ(group=8)]
    one, many = hugging_face(folder("mixtral")), hugging_face(folder("mixtral"))
    PassManager(steps).apply(one, windows)
    monkeypatch.setattr(blocks, "TOGETHER", 4 * 48 * 48)  # one Gram at a time
    PassManager(steps).apply(many, windows)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), many.parameters(), strict=True))


@pytest.mark.parametrize("budget", [1, 4 * 48 * 48 * 2, 1 << 30])
def test_stages_keep_the_order_and_the_budget(
    budget: int, folder: Any, walk_of: Any, ids: Tensor, monkeypatch: Any
) -> None:
    monkeypatch.setattr(blocks, "TOGETHER", budget)
    walk = walk_of(folder("mixtral"))
    with torch.no_grad():
        block = next(iter(walk.visit([], walk.enter(ids))))
    stages = block.stages(block.groups, lambda group: 4 * group[0].shape[1] ** 2)
    assert [group for stage in stages for group in stage] == block.groups
    sizes = [sum(4 * group[0].shape[1] ** 2 for group in stage) for stage in stages]
    assert all(len(stage) == 1 or size <= budget for stage, size in zip(stages, sizes, strict=True))
    assert len(stages) == {1: 10, 4 * 48 * 48 * 2: 5, 1 << 30: 4}[budget]


# -- whole runs ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_prune_and_quantize_a_mixture_and_load_it(
    name: str, folder: Any, hugging_face: Any, tmp_path: Path, ids: Tensor, assert_close: Any
) -> None:
    steps = (Wanda(sparsity="2:4"), GPTQ(group=8, target="original"))
    report = compress.run(folder(name), Recipe(passes=steps, calibration=MANY), tmp_path / "o")
    assert report.starved == report.fallbacks == 0
    loaded = compress.load(tmp_path / "o")
    artifact = Artifact(tmp_path / "o")
    for site in artifact.specs:
        weight = artifact.expression(site)
        assert isinstance(weight, Masked)
        assert isinstance(weight.values, Quantized)
        assert weight.mask_OI.unflatten(1, (-1, 4)).sum(2).unique().tolist() == [2]
    with torch.no_grad():
        change = loaded(input_ids=ids).logits - hugging_face(folder(name))(input_ids=ids).logits
    assert bool(torch.isfinite(change).all())
    assert float(change.norm()) > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_mixture_in_memory_is_rewritten_like_its_file(
    name: str, folder: Any, walk_of: Any, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    model, steps, windows = hugging_face(folder(name)), [Wanda(), GPTQ(group=8)], ids.repeat(30, 1)
    before = model.get_experts_implementation()
    found = PassManager(steps).apply(model, windows)
    assert model.get_experts_implementation() == before
    walk = walk_of(folder(name))
    with torch.no_grad():
        probe = walk.enter(ids)
        list(PassManager(steps).run(walk.visit([walk.enter(windows)], probe)))
        assert_close("logits", model(input_ids=ids).logits, walk.leave(probe), 1e-4)
    assert len(found) == 2 * (4 + 8)  # in memory every stack is one: gate and up together


def test_experts_that_a_recipe_leaves_out_stay_as_they_were(folder: Any, hugging_face: Any, tmp_path: Path) -> None:
    steps = [Wanda(sparsity="2:4", sites="*experts.1.*")]
    compress.run(folder("mixtral"), Recipe(passes=tuple(steps), calibration=MANY), tmp_path / "o")
    loaded, source = compress.load(tmp_path / "o"), hugging_face(folder("mixtral"))
    for layer in range(2):
        for stack in ("gate_up_proj", "down_proj"):
            ours, theirs = (getattr(m.model.layers[layer].mlp.experts, stack) for m in (loaded, source))
            assert [torch.equal(a, b) for a, b in zip(ours, theirs, strict=True)] == [True, False, True, True]


# -- starved experts -------------------------------------------------------------------------------


@pytest.fixture
def hungry(folder: Any, tmp_path: Path) -> tuple[Path, list[Event]]:
    """A mixture compressed on so few tokens that every expert starves, and what was told."""
    told: list[Event] = []
    recipe = Recipe(
        passes=(Wanda(sparsity="2:4"), GPTQ(group=8)),
        calibration=Calibration(samples=2, length=32),
        limits=Limits(max_starved=1.0),
    )
    return compress.run(folder("mixtral"), recipe, tmp_path / "o", emit=told.append).out, told


@pytest.mark.slow
def test_starved_experts_are_pruned_by_magnitude_and_rounded(hungry: Any, folder: Any, naive: Any) -> None:
    artifact, source = Artifact(hungry[0]), compress.artifact.Checkpoint(folder("mixtral"))
    for site in (site for site in artifact.specs if ".experts." in site):
        w_OI, weight = source.tensor(f"{site}.weight"), artifact.expression(site)
        assert isinstance(weight, Masked)
        kept = w_OI.abs().unflatten(1, (-1, 4)).topk(2).indices.sort().values
        assert torch.equal(weight.mask_OI.unflatten(1, (-1, 4)).nonzero()[:, 2].view(*kept.shape), kept)
        expected = compress.Grid(bits=4, group=8).quantize(w_OI * weight.mask_OI).dense() * weight.mask_OI
        assert torch.equal(weight.dense(), expected)


def test_what_was_done_to_starved_experts_is_told_and_kept(hungry: Any) -> None:
    path, told = hungry
    starved = [event for event in told if isinstance(event, Starved)]
    assert len(starved) == 2 * 4 * 3 * 2  # blocks, experts, matrices, passes
    assert all(event.tokens < event.needed == FEWEST for event in starved)
    rows = Artifact(path).provenance["sites"]
    said = {tuple(row["starved"]) for site, row in rows.items() if ".experts." in site}
    assert said == {("wanda: pruned by magnitude", "gptq: rounded to nearest")}
    assert {tuple(row["starved"]) for site, row in rows.items() if "self_attn" in site} == {()}
    assert "reached 24 of the experts' matrices; they were treated" in (path / "README.md").read_text()


def test_more_starved_experts_than_allowed_stop_the_run_early(folder: Any, tmp_path: Path) -> None:
    told: list[Event] = []
    recipe = Recipe(passes=(Wanda(),), calibration=Calibration(samples=2, length=32), limits=Limits(max_starved=0.2))
    with pytest.raises(PlanError, match=r"too few calibration tokens reach 12 of the experts' 24 matrices, limits"):
        compress.run(folder("mixtral"), recipe, tmp_path / "o", emit=told.append)
    assert list(tmp_path.iterdir()) == []
    assert {event.site.split(".")[2] for event in told if isinstance(event, Starved)} == {"0"}  # the first block only


def test_a_pass_that_knows_no_other_way_says_so(folder: Any, tmp_path: Path) -> None:
    class Needy(WeightPass):
        requires = (Gram,)

        def rewrite(self, site: compress.Site) -> compress.Weight:
            return site.weight

    recipe = Recipe(passes=(Needy(sites="*experts*"),), calibration=Calibration(samples=2, length=32))
    with pytest.raises(UnsupportedWeight, match=r"only \d+ tokens reach model.*; give more calibration samples"):
        compress.run(folder("mixtral"), recipe, tmp_path / "o")


def test_a_router_is_never_a_site(folder: Any, walk_of: Any) -> None:
    for name in ("mixtral", "gpt_oss"):
        assert not [site for site in walk_of(folder(name)).anatomy.places if "gate." in site or "router" in site]
