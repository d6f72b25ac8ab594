"""The runtime benchmark: what is compared, how it is grouped and reported; speed itself is not tested."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import compress
from compress import RTN, SVD, Calibration, Magnitude
from compress.artifact import Artifact
from compress.errors import ArtifactError, RecipeError
from compress.runtime import bench
from compress.runtime.bench import LOW_MEMORY, PREPARED, GenerationTiming, Layer, LayerTiming, Spread
from compress.runtime.experts import CompressedExperts
from compress.runtime.generation import WARM

Close = Callable[[str, torch.Tensor, torch.Tensor, float], None]
SHORT = Calibration(samples=4, length=32)


def artifact(model: str | Path, passes: list[Any], out: Path) -> Path:
    return compress.run(model, passes, out, calibration=SHORT).out


@pytest.fixture(scope="module")
def int4(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model in bf16, large enough for packed products."""
    return artifact("builtin", [RTN(bits=4, group=64)], tmp_path_factory.mktemp("bench") / "int4")


@pytest.fixture(scope="module")
def timings(llama_artifact: Path) -> list[LayerTiming]:
    return bench.measure_layers(llama_artifact, (1, 3), low_memory=True, seconds=0)


def spread(median: float, around: float = 0.0) -> Spread:
    return Spread(median=median, low=median - around, high=median + around)


def timed(path: str, rows: int, speedup: Spread, names: tuple[str, ...] = ("up_proj",)) -> LayerTiming:
    layer = Layer(
        sites=("a.up_proj",), names=names, weight="int4g64", shape=(96, 32), rule="cpu_int4", dense_bytes=1,
        stored_bytes=1,
    )  # fmt: skip
    return LayerTiming(
        layer=layer, rows=rows, mode=PREPARED, path=path, why="", held_bytes=1, rounds=9, dense=spread(1),
        compressed=spread(1), speedup=speedup,
    )  # fmt: skip


def test_sites_that_compute_alike_are_one_layer(llama_artifact: Path) -> None:
    found = bench.layers(Artifact(llama_artifact))
    assert {layer.names: (layer.shape, len(layer.sites)) for layer in found} == {
        ("q_proj", "o_proj"): ((48, 48), 4), ("k_proj", "v_proj"): ((24, 48), 4),
        ("gate_proj", "up_proj"): ((72, 48), 4), ("down_proj",): ((48, 72), 2),
    }  # fmt: skip
    assert {layer.weight for layer in found} == {"2:4·int4g8"}


def test_rows_of_unequal_counts_are_alike_and_other_forms_are_not(tiny_llama: Path, tmp_path: Path) -> None:
    made = artifact(tiny_llama, [Magnitude(scope="matrix", sites="*.0.*.q_proj")], tmp_path / "o")
    assert [layer.sites for layer in bench.layers(Artifact(made))] == [("model.layers.0.self_attn.q_proj",)]
    tree = {"kind": "masked", "shape": [4, 4], "kept": 5, "values": {"kind": "dense", "shape": [4, 4]}}
    assert bench.structure(tree) == bench.structure(tree | {"kept": 6, "mask": 3})
    assert bench.structure(tree | {"pattern": "rand0.1@3"}) == bench.structure(tree | {"pattern": "rand0.1@4"})
    assert bench.structure(tree | {"pattern": "rand0.1@3"}) != bench.structure(tree | {"pattern": "50%"})
    assert bench.structure(tree) != bench.structure(tree | {"pattern": "2:4"})


def test_bytes_are_those_of_the_file(llama_artifact: Path) -> None:
    found, source = bench.layers(Artifact(llama_artifact)), Artifact(llama_artifact)
    assert sum(layer.stored_bytes for layer in found) == sum(source.stored_headers[k].nbytes for k in source.payloads)
    assert sum(layer.dense_bytes for layer in found) == 2 * 4 * (2 * 48 * 48 + 2 * 24 * 48 + 3 * 72 * 48)


def test_every_layer_is_timed_at_every_count_in_every_mode(timings: list[LayerTiming]) -> None:
    found = [(t.layer.names[0], t.rows, t.mode) for t in timings]
    names = ("q_proj", "k_proj", "gate_proj", "down_proj")
    assert found == [(name, rows, mode) for name in names for rows in (1, 3) for mode in (PREPARED, LOW_MEMORY)]
    assert {(t.mode, t.path) for t in timings} == {(PREPARED, "decoded"), (LOW_MEMORY, "decoded at each call")}
    assert {t.rounds for t in timings} == {bench.FEWEST}


def test_low_memory_holds_the_stored_bits_and_prepared_the_matrix_too(timings: list[LayerTiming]) -> None:
    for prepared, low in zip(timings[::2], timings[1::2], strict=True):
        out, inputs = prepared.layer.shape
        assert low.held_bytes == low.layer.stored_bytes // len(low.layer.sites)
        assert prepared.held_bytes == low.held_bytes + 4 * out * inputs


@pytest.mark.slow
@pytest.mark.parametrize("mode", [PREPARED, LOW_MEMORY])
@pytest.mark.parametrize("site", ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"])
def test_what_is_timed_computes_what_the_loaded_model_computes(
    site: str, mode: str, int4: Path, assert_close: Close
) -> None:
    source = Artifact(int4)
    dense, ours = bench.dense_module(source, site), bench.site_module(source, site, mode)
    loaded = compress.load(int4, low_memory=mode == LOW_MEMORY).get_submodule(site)
    for rows in (1, 9):
        x = torch.randn(rows, dense.in_features, generator=torch.Generator().manual_seed(1)).bfloat16()
        assert torch.equal(ours(x), loaded(x))
        assert_close("timed", ours(x), dense(x), 2**-7)  # bf16 scales of the packed form


def test_a_bias_is_part_of_both(model_folder: Callable[..., Path], tmp_path: Path, assert_close: Close) -> None:
    source = Artifact(artifact(model_folder("qwen2"), [RTN(bits=8, group=0)], tmp_path / "o"))
    site = "model.layers.0.self_attn.k_proj"
    dense, ours = bench.dense_module(source, site), bench.site_module(source, site, PREPARED)
    zero = torch.zeros(1, dense.in_features)
    assert_close("bias", ours(zero)[0], source.tensor(f"{site}.bias"), 0)
    assert_close("bias", dense(zero)[0], source.tensor(f"{site}.bias"), 0)


def test_the_packed_product_answers_for_few_rows_only(int4: Path) -> None:
    module = bench.site_module(Artifact(int4), "model.layers.0.self_attn.q_proj", PREPARED)
    assert [bench.path_of(module, rows) for rows in (1, 8, 9)] == ["packed", "packed", "decoded"]
    assert bench.layers(Artifact(int4))[0].rule == "cpu_int4"


def test_each_timing_says_why_its_path_was_taken(timings: list[LayerTiming]) -> None:
    assert {(t.mode, t.why.partition(":")[0]) for t in timings} == {
        (PREPARED, "the decoded fp32 matrix"), (LOW_MEMORY, "decoded at each call")
    }  # fmt: skip


def test_packed_copies_count_as_memory(int4: Path) -> None:
    module = bench.site_module(Artifact(int4), "model.layers.0.self_attn.q_proj", PREPARED)
    stored, matrix, packed = 256 * 256 // 2 + 256 * 4 * 2 + 256 * 4 // 2, 2 * 256 * 256, 256 * 256 // 2 + 256 * 4 * 4
    assert bench.held_bytes(module) == stored + matrix + packed


def test_bytes_of_one_device_leave_out_the_others() -> None:
    module = nn.Linear(4, 4, bias=False)
    module.register_buffer("elsewhere", torch.empty(100, device="meta"))
    assert bench.held_bytes(module, torch.device("cpu")) == 4 * 4 * 4
    assert bench.held_bytes(module) == 4 * (4 * 4 + 100)


def test_factors_are_named_as_the_expression_is(tiny_llama: Path, tmp_path: Path) -> None:
    made = artifact(tiny_llama, [SVD(removed=0.5, sites="*.up_proj")], tmp_path / "o")
    (found,) = bench.measure_layers(made, [2], seconds=0)
    assert (found.layer.rule, found.path) == ("factored", "decoded @ decoded")


def test_an_expert_is_timed_as_the_matrix_its_family_slices(tiny_llama: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = {"vocab_size": 211, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1,
              "num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 4}  # fmt: skip
    AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **config)).save_pretrained(tmp_path / "m")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "m")
    made = artifact(tmp_path / "m", [RTN(bits=4, group=16, sites="*experts*")], tmp_path / "o")
    found = bench.measure_layers(made, [2], low_memory=True, seconds=0)
    assert {(t.layer.rule, t.mode, t.path) for t in found} == {
        ("experts", PREPARED, "decoded"), ("experts", LOW_MEMORY, "decoded at each call")
    }  # fmt: skip
    assert sum(len(t.layer.sites) for t in found) == 2 * 4 * 3
    model = compress.load(made)
    experts = next(m for m in model.modules() if isinstance(m, CompressedExperts))
    stacks = sum(stack.nbytes for stack in experts.decoded.values())
    assert stacks == 4 * 4 * 3 * 32 * 48
    assert bench.held_bytes(model) == stacks + sum(t.nbytes for t in [*model.parameters(), *model.buffers()])


def test_a_folder_that_is_not_ours_is_refused(tiny_llama: Path) -> None:
    with pytest.raises(ArtifactError, match="not a Compress artifact"):
        bench.measure_layers(tiny_llama)


# -- the clock ----------------------------------------------------------------------------------------


def test_runners_take_turns_and_every_other_round_goes_backwards() -> None:
    said: list[str] = []
    times = bench.race([lambda: said.append("a"), lambda: said.append("b")], warm=1, fewest=3, most=3)
    assert "".join(said) == "ab" + "ab" + "ba" + "ab"
    assert [len(taken) for taken in times] == [3, 3]


@pytest.mark.parametrize(("seconds", "rounds"), [(0, 2), (10, 4), (10**9, 7)])
def test_rounds_follow_the_budget_within_bounds(seconds: float, rounds: int) -> None:
    """A clock that ticks at every look: two rounds of two looks, then rounds of three, one to ask for the time."""
    ticks = count()
    (times,) = bench.race(
        [lambda: None], seconds=seconds, fewest=2, most=7, clock=lambda: float(next(ticks))
    )  # fmt: skip
    assert times == [1.0] * rounds


def test_a_spread_is_the_middle_half_or_the_range() -> None:
    values = [5.0, 1.0, 3.0, 2.0, 4.0]
    assert bench.quartiles(values) == Spread(median=3, low=2, high=4)
    assert bench.extent(values) == Spread(median=3, low=1, high=5)


def test_different_sites_take_turns() -> None:
    seen: list[int] = []
    maps = [nn.Identity() for _ in range(3)]
    for i, module in enumerate(maps):
        module.register_forward_hook(lambda *_, i=i: seen.append(i))
    run = bench.rotating(maps, torch.zeros(1))
    for _ in range(4):
        run()
    assert seen == [0, 1, 2, 0]


# -- what is said -------------------------------------------------------------------------------------


def test_a_slower_layer_is_told_once_for_each_reason() -> None:
    told = bench.layer_sentences(
        [timed("packed", 1, spread(1.5)), timed("packed", 8, spread(0.8)), timed("decoded", 16, spread(0.5)),
         timed("decoded", 64, spread(0.8))]
    )  # fmt: skip
    assert told == [
        f"up_proj (int4g64, 96 x 32): slower than dense at 8 (1.25x) rows: {bench.REASONS['packed']}",
        "up_proj (int4g64, 96 x 32): slower than dense at 16 (2.00x), 64 (1.25x) rows: "
        f"{bench.REASONS['decoded']}",
    ]  # fmt: skip


def test_one_row_is_singular_and_parts_have_their_own_reason() -> None:
    (told,) = bench.layer_sentences([timed("decoded @ decoded", 1, spread(0.5))])
    assert "at 1 (2.00x) row: its parts are multiplied one by one" in told


def test_a_difference_inside_the_spread_is_none() -> None:
    assert bench.layer_sentences([timed("decoded", 1, spread(0.95, 0.1))]) == []


def generated(name: str, speed: float, speedup: Spread, held: int) -> GenerationTiming:
    return GenerationTiming(
        name=name, tokens_per_second=spread(speed), speedup=speedup, prefill=spread(1), decode=spread(speed),
        held_bytes=held, cache_bytes=1, captured=False,
    )  # fmt: skip


def test_slower_generation_and_more_memory_are_told() -> None:
    dense, ours = generated("dense", 8, spread(1), 100), generated("ours", 4, spread(0.5, 0.1), 120)
    even = generated("even", 8, spread(0.95, 0.1), 60)
    slow, large = bench.generation_sentences([dense, ours, even])
    assert slow == "ours: slower than dense in every pair of runs, 2.00x"
    assert large.startswith("ours: holds 1.20x the memory of dense")


# -- generation ---------------------------------------------------------------------------------------


def test_every_model_generates_as_many_tokens_as_asked(llama_artifact: Path, tiny_llama: Path) -> None:
    models = {"dense": compress.load(tiny_llama), "compressed": compress.load(llama_artifact)}
    dense, ours = bench.measure_generation(models, prompt=5, new=7, runs=2)
    assert (dense.name, ours.name) == ("dense", "compressed")
    assert dense.speedup == spread(1)
    assert dense.held_bytes == sum(p.nbytes for p in models["dense"].parameters()) + sum(
        b.nbytes for b in models["dense"].buffers()
    )
    assert ours.held_bytes > dense.held_bytes
    assert not dense.captured
    assert (
        dense.cache_bytes - 2 * 8 == 2 * 2 * (12 + WARM + 1) * 2 * 12 * 4
    )  # two layers, k and v, 2 heads of 12; lengths
    assert dense.tokens_per_second.median > 0


def test_more_tokens_than_the_model_takes_are_refused(tiny_llama: Path) -> None:
    with pytest.raises(RecipeError, match="130 tokens of prompt and answer; dense allows at most 128"):
        bench.measure_generation({"dense": compress.load(tiny_llama)}, prompt=100, new=30)
