"""FlexRound and LRQ on a matrix, a block and whole models: initialization, gradients, what is stored and kept."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import compress
from compress import (
    RTN,
    Calibration,
    CalibrationError,
    Codebook,
    Dense,
    Grid,
    Hadamard,
    Limits,
    Magnitude,
    Masked,
    PassManager,
    Permutation,
    Quantized,
    Recipe,
    RecipeError,
    UnsupportedWeight,
    Wanda,
    pattern,
)
from compress.artifact import Artifact, verify
from compress.events import Event, Starved, StatisticsCollected, WeightRewritten
from compress.passes import LRQ, FlexRound
from compress.passes.learned import EDGE, Learned, Rounder, Snapped, aim, in_cells, refilled
from compress.passes.quantization.flexround import Full
from compress.passes.quantization.lrq import LowRank
from compress.weights import rounded_inputs

BlockMaker = Callable[..., Any]
SHORT = Calibration(samples=24, length=32)
QUICK: dict[str, Any] = {"steps": 40, "held_out": 4, "batch": 2, "lr": 0.01}
TWO_BITS = RTN(bits=2, group=8)
GRIDS = [{"group": 8}, {"group": 0}, {"group": -1}, {"group": 8, "symmetric": True}, {"bits": 2}, {"bits": 8}]


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def gridded(options: dict[str, Any], search: bool = False) -> Quantized:
    return Grid(**{"bits": 3, "group": 8, **options}).quantize(normal(17, 48), search=search)


def restless(now: Quantized, seed: int = 5) -> Rounder:
    """A rounder whose steps and D have moved far."""
    rounder = Rounder(now, normal(17, 48), Full(17, 48))
    with torch.no_grad():
        rounder.log_step += 0.3 * normal(*rounder.log_step.shape, seed=seed)
        rounder.d.each += 0.5 * normal(17, 48, seed=seed + 1)
    return rounder


class Gated(nn.Module):
    """A block of three matrices that depend on each other, and a residual path."""

    def __init__(self, width: int = 48, inner: int = 40, seed: int = 0) -> None:
        super().__init__()
        for i, (name, shape) in enumerate((("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner)))):
            linear = nn.Linear(shape[1], shape[0], bias=False)
            linear.weight.data = normal(*shape, seed=seed + i) / shape[1] ** 0.5
            self.add_module(name, linear)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.down(nn.functional.silu(self.gate(x)) * self.up(x))
        return x + hidden


def hidden_states(windows: int = 40) -> Tensor:
    mixing = torch.eye(48) + normal(48, 48, seed=2) / 48**0.5
    return normal(windows, 10, 48, seed=1) @ mixing


def rounded_block(block_of: BlockMaker, step: Any = TWO_BITS, drift: float = 0.1) -> Any:
    """A block whose matrices `step` has rounded; what enters it has drifted."""
    x = hidden_states()
    block = block_of(Gated(), x + drift * normal(*x.shape, seed=3), x, batch=2)
    for site in block.sites.values():
        site.weight = step.rewrite(site)
    return block


def error_of(block: Any) -> float:
    """The mean squared distance of all its outputs from the dense ones, as it now is."""
    with torch.no_grad():
        targets = block.targets()
        outs = [batch.through(block.module, 0) for batch in block.batches]
    return float((torch.cat(outs) - torch.cat(targets)).square().mean())


def learn(step: Learned, block: Any) -> dict[str, compress.Weight]:
    """What the pass makes of every site, which is then there."""
    made = dict(step.rewrite(block, list(block.sites.values())))
    for name, weight in made.items():
        block.sites[name].weight = weight
    return made


def without_data(weight: compress.Weight) -> bytes:
    return b"".join(t.contiguous().view(torch.uint8).numpy().tobytes() for t in compress.weights.pack(weight).values())


# -- one matrix ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_the_start_is_what_the_quantizer_made(options: dict[str, Any]) -> None:
    now = gridded(options)
    again = Rounder(now, normal(17, 48), Full(17, 48)).quantized()
    assert torch.equal(again.codes, now.codes)
    assert torch.equal(again.dense(), Rounder(now, normal(17, 48), Full(17, 48))())
    torch.testing.assert_close(again.dense(), now.dense(), rtol=2**-10, atol=0)  # a step may go to its neighbour


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_the_start_may_be_any_codes(options: dict[str, Any]) -> None:
    now = gridded(options)
    codes = torch.randint(2**now.bits, (17, 48), generator=torch.Generator().manual_seed(7)).to(torch.uint8)
    assert torch.equal(Rounder(replace(now, codes=codes), normal(17, 48), Full(17, 48)).quantized().codes, codes)


def test_a_zero_between_codes_starts_right() -> None:
    now = replace(gridded({"group": 8}), zero=(3.3 + normal(17, 6)).half())
    assert torch.equal(Rounder(now, normal(17, 48), Full(17, 48)).quantized().codes, now.codes)


def test_what_is_divided_is_the_original_where_it_was_rounded_to_nearest(assert_close: Any) -> None:
    now = gridded({"group": 8})
    moved = (in_cells(now, normal(17, 48)) * now.scale.float()[..., None]).flatten(1) - normal(17, 48)
    assert float((moved.unflatten(1, (6, 8)) / now.scale.float()[..., None]).abs().max()) <= 1.01 * EDGE
    assert float((moved.abs() > 1e-5).float().mean()) < 10 * EDGE  # only next to ties


@pytest.mark.parametrize("options", GRIDS, ids=str)
def test_what_is_stored_denotes_exactly_what_was_computed(options: dict[str, Any]) -> None:
    rounder = restless(gridded(options))
    quantized = rounder.quantized()
    assert torch.equal(quantized.dense(), rounder())
    assert not torch.equal(quantized.codes, gridded(options).codes)
    assert quantized.scale.dtype == torch.float16


def test_values_follow_the_paper(assert_close: Any) -> None:
    """exp(d1) * clip(round(W / exp(d1 + D)), -z, top - z), written out."""
    rounder = restless(gridded({"group": 0}))
    step = rounder.quantized().scale.double()
    zero = rounder.now.zero.double()
    inside = (normal(17, 48).double() / (step * rounder.d().double().exp())).round()
    assert_close("W'", rounder(), step * torch.maximum(torch.minimum(inside, 7 - zero), -zero), 1e-3)


def test_gradients_are_those_of_a_frozen_rounding() -> None:
    """Finite differences, in float64, of the function in which each rounding error stays what it is now."""
    w, step, d, zero = (
        normal(5, 3, 4).double(),
        normal(5, 3, seed=1).double().exp() / 3,
        normal(5, 3, 4, seed=2) / 4,
        3.0,
    )
    d, g = d.double(), normal(5, 3, 4, seed=3).double()
    at = w / step[..., None] * (-d).exp() + zero
    error = at.round() - at
    clipped = (at.round() < 0) | (at.round() > 7)
    assert 0 < int(clipped.sum()) < 30

    def frozen(step: Tensor, d: Tensor) -> Tensor:
        codes = w / step[..., None] * (-d).exp() + zero + error
        return (torch.where(clipped, at.round().clamp(0, 7), codes) - zero) * step[..., None]

    def slope(towards_step: Tensor, towards_d: Tensor) -> float:
        ends = [frozen(step + s * towards_step, d + s * towards_d) for s in (1e-6, -1e-6)]
        return float(((ends[0] - ends[1]) * g).sum()) / 2e-6

    learned = [step.clone().requires_grad_(True), d.clone().requires_grad_(True)]
    values = Snapped.apply(w, *learned, zero, 7)
    torch.testing.assert_close(values.detach(), frozen(step, d))
    (values * g).sum().backward()
    still = torch.zeros_like(step), torch.zeros_like(d)
    for row in range(5):
        for group in range(3):
            one = still[0].clone()
            one[row, group] = 1
            assert float(learned[0].grad[row, group]) == pytest.approx(slope(one, still[1]), rel=1e-5, abs=1e-8)
            one = still[1].clone()
            one[row, group, row % 4] = 1
            assert float(learned[1].grad[row, group, row % 4]) == pytest.approx(
                slope(still[0], one), rel=1e-5, abs=1e-8
            )


def test_one_grid_for_the_matrix_gathers_every_gradient() -> None:
    rounder = restless(gridded({"group": -1}))
    rounder().square().sum().backward()
    assert rounder.log_step.grad.shape == (1, 1)
    assert float(rounder.log_step.grad.abs()) > 0


@pytest.mark.parametrize("shape", [(7, 24), (24, 7)])
def test_a_full_rank_can_be_any_divisor(shape: tuple[int, int], assert_close: Any) -> None:
    want = normal(*shape)
    found = LowRank(*shape, min(shape), torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(want, full_matrices=False)
    found.left.data, found.right.data = u * s, v
    assert_close("D", found(), want, 1e-5)


def test_low_rank_learns_fewer_numbers() -> None:
    counts = [sum(p.numel() for p in d.parameters()) for d in (Full(60, 40), LowRank(60, 40, 5, torch.Generator()))]
    assert counts == [60 * 40 + 60, 60 * 5 + 5 * 40 + 60 + 40]


def test_divisors_start_at_one() -> None:
    for d in (Full(6, 4), LowRank(6, 4, 2, torch.Generator())):
        assert int(d().count_nonzero()) == 0


def test_rounded_inputs_hand_their_gradient_on() -> None:
    x = normal(3, 8).requires_grad_(True)
    rounded = rounded_inputs(x, "int8")
    assert torch.equal(rounded.detach(), rounded_inputs(x.detach(), "int8"))
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones(3, 8))


# -- expressions -----------------------------------------------------------------------------------


@pytest.mark.parametrize("transform", [Hadamard(normal(48, seed=4) > 0), Permutation(normal(48, seed=4).argsort())])
def test_a_grid_behind_a_transform_aims_at_the_transformed_weight(
    transform: compress.Weight, assert_close: Any
) -> None:
    weight = compress.Product(gridded({}), transform)
    now, w_OI = aim(weight, normal(17, 48), "site")
    assert now is weight.left
    assert_close("W", Dense(w_OI).dense() @ transform.dense(), normal(17, 48), 1e-5)
    assert torch.equal(refilled(weight, now).dense(), weight.dense())


def test_a_codebook_has_no_rounding_to_learn() -> None:
    book = Codebook(torch.zeros(5, 3, dtype=torch.int64), normal(16, 8), Dense(torch.ones(1, 1)))
    with pytest.raises(UnsupportedWeight, match="the rounding of here cannot be learned: it is vq4x8"):
        aim(book, normal(5, 24), "here")


# -- one block -------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [FlexRound(**QUICK), LRQ(**QUICK, rank=8)], ids=str)
@pytest.mark.parametrize("first", [RTN(bits=2, group=8), RTN(bits=3, group=0, symmetric=True)], ids=str)
def test_learning_brings_the_block_nearer_to_the_dense_one(first: RTN, step: Learned, block_of: BlockMaker) -> None:
    block = rounded_block(block_of, first)
    before = error_of(block)
    made = learn(step, block)
    assert error_of(block) < 0.9 * before
    assert all(weight.describe() == first.grid.quantize(normal(4, 48)).describe() for weight in made.values())
    row = block.sites["blocks.0.up"].ledger["learned"]
    assert row["after"] < 0.95 * row["before"]


def test_what_is_worse_on_windows_held_out_is_not_kept(block_of: BlockMaker) -> None:
    block = rounded_block(block_of)
    before = error_of(block)
    learn(FlexRound(**{**QUICK, "steps": 2, "lr": 1.0}), block)
    row = block.sites["blocks.0.up"].ledger["learned"]
    assert row["after"] == row["before"]
    assert error_of(block) == pytest.approx(before, rel=1e-2)


def test_what_is_nearly_right_stays_so(block_of: BlockMaker) -> None:
    """As with 8 bits and no drift."""
    block = rounded_block(block_of, RTN(bits=8, group=8), drift=0.0)
    before = error_of(block)
    learn(FlexRound(**QUICK), block)
    assert error_of(block) <= 1.05 * before


def test_the_same_seed_learns_the_same(block_of: BlockMaker) -> None:
    made = [learn(LRQ(**QUICK, seed=seed), rounded_block(block_of)) for seed in (0, 0, 1)]
    one, same, other = (without_data(found["blocks.0.gate"]) for found in made)
    assert one == same != other


def test_the_module_and_the_weights_are_left_alone(block_of: BlockMaker) -> None:
    block = rounded_block(block_of)
    state = {name: value.clone() for name, value in block.module.state_dict().items()}
    FlexRound(**QUICK).rewrite(block, list(block.sites.values()))
    assert all(torch.equal(value, state[name]) for name, value in block.module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in block.module.parameters())


def test_other_sites_keep_their_weights(block_of: BlockMaker) -> None:
    block = rounded_block(block_of)
    assert set(FlexRound(**QUICK).rewrite(block, [block.sites["blocks.0.up"]])) == {"blocks.0.up"}


@pytest.mark.parametrize("step", [FlexRound(**QUICK), LRQ(**QUICK)], ids=str)
@pytest.mark.parametrize("sparsity", ["2:4", 0.5], ids=["2:4", "50%"])
def test_a_mask_survives_learning(step: Learned, sparsity: float | str, block_of: BlockMaker) -> None:
    block = rounded_block(block_of, Magnitude(sparsity=sparsity))
    masks = {}
    for site in block.sites.values():
        masks[site.name] = site.weight.mask_OI
        site.weight = RTN(bits=2, group=8).rewrite(site)
    before, rounded = error_of(block), {site.name: site.weight.describe() for site in block.sites.values()}
    for name, weight in learn(step, block).items():
        assert isinstance(weight, Masked)
        assert torch.equal(weight.mask_OI, masks[name])
        assert int(weight.values.dense()[~masks[name]].count_nonzero()) == 0
        assert weight.describe() == rounded[name]
    assert error_of(block) < before


def test_a_divisor_has_no_effect_where_a_mask_cuts() -> None:
    mask_OI = pattern("2:4").keep(normal(17, 48).abs())
    now, w_OI = aim(Masked(gridded({}), mask_OI, "2:4"), normal(17, 48), "site")
    rounder = Rounder(now, w_OI, Full(17, 48))
    refilled(Masked(now, mask_OI, "2:4"), Dense(rounder())).dense().square().sum().backward()
    assert int(rounder.d.each.grad[~mask_OI].count_nonzero()) == 0
    assert int(rounder.d.each.grad[mask_OI].count_nonzero()) > 0


def test_too_many_windows_held_out_leave_none_to_learn_from(block_of: BlockMaker) -> None:
    with pytest.raises(
        CalibrationError, match="flexround: held_out: 39 of 20 batches of 2 windows leave none to learn"
    ):
        learn(FlexRound(batch=2, held_out=39), rounded_block(block_of))


# -- whole models ----------------------------------------------------------------------------------


def recipe(*steps: Any, **options: Any) -> Recipe:
    return Recipe(passes=steps, calibration=SHORT, **options)


@pytest.mark.slow
@pytest.mark.parametrize("ordering", ["site", "block", "dense"])
def test_a_learned_model_is_nearer_to_the_dense_one(ordering: str, tiny_llama: Path, tmp_path: Path) -> None:
    first = RTN(bits=2, group=8)
    plain = compress.run(tiny_llama, recipe(first, ordering=ordering), tmp_path / "plain").kl
    learned = compress.run(tiny_llama, recipe(first, FlexRound(**QUICK), ordering=ordering), tmp_path / "learned")
    assert learned.kl < plain
    verify(learned.out)


@pytest.mark.slow
def test_every_family_learns(family: str, model_folder: Any, tmp_path: Path) -> None:
    steps = RTN(bits=3, group=8), LRQ(**QUICK, rank=8)
    out = compress.run(model_folder(family), recipe(*steps), tmp_path / "out").out
    rows = Artifact(out).provenance["sites"]
    assert all(row["learned"]["after"] < row["learned"]["before"] for row in rows.values())
    verify(out)


@pytest.mark.slow
def test_a_model_in_bfloat16_learns(model_folder: Any, tmp_path: Path) -> None:
    out = compress.run(
        model_folder("llama", "bfloat16"), recipe(RTN(bits=2, group=8), FlexRound(**QUICK)), tmp_path / "o"
    ).out
    rows = Artifact(out).provenance["sites"]
    assert all(row["learned"]["after"] < row["learned"]["before"] for row in rows.values())


@pytest.mark.slow
def test_hidden_states_on_disk_change_nothing(tiny_llama: Path, tmp_path: Path) -> None:
    steps = recipe(RTN(bits=2, group=8), FlexRound(**QUICK))
    memory, disk = (compress.run(tiny_llama, steps, tmp_path / str(o), offload=o).kl for o in (False, True))
    assert memory == disk


@pytest.mark.slow
def test_a_model_in_memory_learns_like_its_file(
    tiny_llama: Path, hugging_face: Any, walk_of: Any, assert_close: Any
) -> None:
    ids = torch.randint(4, 200, (24, 21), generator=torch.Generator().manual_seed(5))
    steps = [RTN(bits=3, group=8), FlexRound(**QUICK)]
    model, walk = hugging_face(tiny_llama), walk_of(tiny_llama)
    found = PassManager(steps).apply(model, ids)
    assert {weight.describe() for weight in found.values()} == {"int3g8"}
    with torch.no_grad():
        batches, twins = ([walk.enter(part) for part in ids.split(2)] for _ in range(2))
        probe = walk.enter(ids[:3])
        list(PassManager(steps).run(walk.visit(batches, probe, twins=twins)))
        assert_close("logits", model(input_ids=ids[:3]).logits, walk.leave(probe), 1e-4)


@pytest.mark.slow
def test_passes_before_and_after_go_site_by_site(tiny_llama: Path, tmp_path: Path) -> None:
    told: list[Event] = []
    steps = (Wanda(sparsity="2:4"), RTN(group=8), FlexRound(**QUICK, sites="*.mlp.*"))
    compress.run(tiny_llama, recipe(*steps), tmp_path / "out", emit=told.append)
    done = [(e.site.split(".")[2], e.step) for e in told if isinstance(e, WeightRewritten)]
    assert done == [(block, name) for block in "01" for name in [*["wanda", "rtn"] * 7, *["flexround"] * 3]]
    looked = [e.statistics for e in told if isinstance(e, StatisticsCollected)]
    assert looked[:4] == [("ColumnNorm",)] * 4  # of four inputs, for the pruner


@pytest.mark.slow
def test_experts_of_a_stack_learn_and_hungry_ones_stay(tmp_path: Path, tiny_llama: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.for_model(
        "mixtral", vocab_size=211, hidden_size=48, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=12, num_local_experts=4, num_experts_per_tok=2, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(tiny_llama).save_pretrained(tmp_path / "model")
    told: list[Event] = []
    steps = (RTN(bits=2, group=8), FlexRound(**QUICK))
    for samples in (24, 8):
        calibration = Calibration(samples=samples, length=64)
        again = Recipe(passes=steps, calibration=calibration, limits=Limits(max_starved=1.0))
        compress.run(tmp_path / "model", again, tmp_path / str(samples), emit=told.append)
    rows = Artifact(tmp_path / "24").provenance["sites"]
    assert all("learned" in row for row in rows.values())
    hungry = {site: row for site, row in Artifact(tmp_path / "8").provenance["sites"].items() if row["starved"]}
    assert all(row["starved"] == ["flexround: left as it was"] for row in hungry.values())
    assert {event.site for event in told if isinstance(event, Starved)} == set(hungry) != set()
    rounded, learned = (Artifact(tmp_path / "8").expression(next(iter(hungry))), Artifact(tmp_path / "24"))
    source = compress.artifact.Checkpoint(tmp_path / "model").tensor(f"{next(iter(hungry))}.weight")
    assert torch.equal(rounded.dense(), Grid(bits=2, group=8).quantize(source).dense())
    assert not torch.equal(rounded.dense(), learned.expression(next(iter(hungry))).dense())


@pytest.mark.slow
def test_a_layer_that_rounds_its_inputs_learns(tiny_llama: Path, tmp_path: Path) -> None:
    steps = (RTN(bits=3, group=8, inputs="int8"), FlexRound(**QUICK))
    rows = Artifact(compress.run(tiny_llama, recipe(*steps), tmp_path / "out").out).provenance["sites"]
    assert all(row["inputs"] == "int8" and row["learned"]["after"] < row["learned"]["before"] for row in rows.values())


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "value"),
    [
        (FlexRound, "steps", 0), (FlexRound, "lr", 0.0), (FlexRound, "batch", 0), (FlexRound, "held_out", 0),
        (FlexRound, "lr", -1.0), (LRQ, "rank", 0), (LRQ, "seed", -1), (LRQ, "lr", "fast"),
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused(kind: type[Learned], name: str, value: Any) -> None:
    with pytest.raises(RecipeError, match=rf"^{kind.name}\.{name}: .* is not allowed; it must be "):
        kind(**{name: value})


def test_a_weight_that_is_not_quantized_is_refused_before_any_work(tiny_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"passes\[0\]\.lrq: takes a quantized weight; .* is dense by then"):
        compress.run(tiny_llama, recipe(LRQ()), tmp_path / "out")


def test_two_passes_that_disagree_on_the_batch_are_refused() -> None:
    with pytest.raises(RecipeError, match=r"lrq\.batch is 2 and flexround\.batch is 4; make them equal"):
        recipe(RTN(group=8), FlexRound(batch=4), LRQ(batch=2))


def test_a_block_without_its_dense_twin_is_refused(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    walk = walk_of(tiny_llama)
    with torch.no_grad(), pytest.raises(CalibrationError, match=r"flexround: .* a twin of each"):
        list(PassManager([RTN(group=8), FlexRound(**QUICK)]).run(walk.visit([walk.enter(ids)], walk.enter(ids))))
