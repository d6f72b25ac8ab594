"""The pass manager: passes run in order on the sites they select, report events, and fail if values are not finite."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import RTN, Dense, Magnitude, Masked, PassManager, Site, Wanda, Weight, WeightPass
from compress.errors import CalibrationError, CompressError, RecipeError, UnsupportedWeight
from compress.events import Event, Fallback, StatisticsCollected, WeightRewritten
from compress.model.block import Block
from compress.passes import BlockPass
from compress.passes.manager import parts

FIRST = "model.layers.0.self_attn.q_proj"


def events_of(walk: Any, steps: Sequence[WeightPass], ids: Tensor) -> list[Event]:
    events: list[Event] = []
    with torch.inference_mode():
        list(PassManager(steps, events.append).run(walk.visit([walk.enter(ids)], walk.enter(ids))))
    return events


def test_passes_run_in_order_on_each_site(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    events = events_of(walk_of(tiny_llama), [Wanda(sparsity="2:4"), RTN(group=8)], ids)
    rewritten = [event for event in events if isinstance(event, WeightRewritten)]
    assert [(e.site, e.step, e.weight) for e in rewritten[:2]] == [
        (FIRST, "wanda", "2:4"),
        (FIRST, "rtn", "2:4·int4g8"),
    ]
    assert len(rewritten) == 2 * 14
    assert [e.site for e in rewritten[::2]] == [e.site for e in rewritten[1::2]]


def test_an_input_is_measured_before_its_sites_are_rewritten(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    events = events_of(walk_of(tiny_llama), [Wanda()], ids)
    kinds = [type(event) for event in events]
    assert kinds[:5] == [StatisticsCollected, WeightRewritten, WeightRewritten, WeightRewritten, StatisticsCollected]


def test_data_free_passes_measure_nothing(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    events = events_of(walk_of(tiny_llama), [Magnitude()], ids)
    assert not any(isinstance(event, StatisticsCollected) for event in events)


def test_a_glob_selects_sites_by_their_full_name(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    steps = [Magnitude(sites="model.layers.0.*"), RTN(group=8, sites="*.down_proj")]
    events = events_of(walk_of(tiny_llama), steps, ids)
    found = {(e.site.removeprefix("model.layers."), e.step) for e in events if isinstance(e, WeightRewritten)}
    assert ("0.mlp.down_proj", "rtn") in found
    assert ("1.mlp.down_proj", "rtn") in found
    assert {step for site, step in found if site.startswith("1.")} == {"rtn"}
    assert len(found) == 7 + 2


def test_a_site_knows_its_error_after_each_pass(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    walk, events = walk_of(tiny_llama), []
    manager = PassManager([Magnitude(), RTN(group=8)], emit=events.append)
    block = next(iter(manager.run(walk.visit([walk.enter(ids)], walk.enter(ids[:1])))))
    site = block.sites["model.layers.0.mlp.up_proj"]
    rewritten = [event for event in events if isinstance(event, WeightRewritten) and event.site == site.name]
    assert site.errors == [(event.step, event.weight_error) for event in rewritten]
    assert [step for step, _ in site.errors] == ["magnitude", "rtn"]
    assert site.errors[0][1] < site.errors[1][1] == site.weight_error
    assert all(event.seconds > 0 and event.peak_bytes > 2**20 for event in rewritten)


def test_a_weight_is_decoded_once_to_be_measured(site_of: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    site, decoded = site_of(torch.randn(4, 8), torch.randn(16, 8)), []
    site.weight = Masked(Dense(torch.randn(4, 8)), torch.ones(4, 8, dtype=torch.bool), "100%")
    whole = Masked.dense
    monkeypatch.setattr(Masked, "dense", lambda weight: decoded.append(weight) or whole(weight))
    site.measure()
    assert len(decoded) == 1
    change = site.weight.dense() - site.original.data
    assert site.weight_error == pytest.approx(float(change.norm() / site.original.data.norm()))
    assert site.output_error is not None


def test_the_event_reports_the_size_that_is_stored(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    event = next(e for e in events_of(walk_of(tiny_llama), [RTN(group=8)], ids) if isinstance(e, WeightRewritten))
    assert event.nbytes == 48 * 48 // 2 + 48 * 6 * 2 + 48 * 6 // 2  # codes, float16 scales, zeros
    assert 0 < event.weight_error < 0.2
    assert event.output_error is None


@dataclass(frozen=True, kw_only=True)
class Weaker(WeightPass):
    """Falls back on one site."""

    name = "weaker"

    def rewrite(self, site: Site) -> Weight:
        if site.name == FIRST:
            site.fall_back(self.name, "on purpose")
        return Dense(site.original.data * 0.5)


def test_a_fallback_is_an_event(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    events = events_of(walk_of(tiny_llama), [Weaker(), Weaker(sites="*.mlp.*")], ids)
    fallbacks = [event for event in events if isinstance(event, Fallback)]
    assert fallbacks == [Fallback(site=FIRST, step="weaker", reason="on purpose")]


@dataclass(frozen=True, kw_only=True)
class Broken(WeightPass):
    """Gives what is not a number."""

    name = "broken"

    def rewrite(self, site: Site) -> Weight:
        return Dense(site.original.data * float("nan"))


def test_a_result_that_is_not_finite_is_refused(tiny_llama: Path, walk_of: Any, ids: Tensor) -> None:
    with pytest.raises(CompressError, match=rf"broken: {FIRST}: the rewritten weight is not finite"):
        events_of(walk_of(tiny_llama), [Broken()], ids)


def test_an_overflow_of_the_model_dtype_is_refused(model_folder: Any, walk_of: Any, ids: Tensor) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Loud(WeightPass):
        """Finite in float32, not in float16."""

        name = "loud"

        def rewrite(self, site: Site) -> Weight:
            return Dense(site.original.data.float() + 1e6)

    with pytest.raises(CompressError, match=r"loud: .* is not finite"):
        events_of(walk_of(model_folder("llama", "float16")), [Loud()], ids)


# -- passes that take a block whole ----------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Seeing(BlockPass):
    """Keeps what it is given, and changes nothing."""

    name = "seeing"

    def rewrite(self, block: Block, sites: Sequence[Site]) -> dict[str, Weight]:
        inputs, targets = torch.cat([batch.hidden_BTD for batch in block.batches]), torch.cat(block.targets())
        SEEN.append((inputs.clone(), targets.clone(), [type(site.weight) for site in sites]))
        return {site.name: site.weight for site in sites}


SEEN: list[tuple[Tensor, Tensor, list[type[Weight]]]] = []


@pytest.mark.parametrize("ordering", ["site", "block", "dense"])
def test_a_block_is_given_with_what_enters_it_and_what_should_leave_it(
    ordering: str, tiny_llama: Path, hugging_face: Any, ids: Tensor, assert_close: Any
) -> None:
    SEEN.clear()
    model, dense = hugging_face(tiny_llama), hugging_face(tiny_llama)
    PassManager([Magnitude(), Seeing(batch=2), RTN(group=8)], ordering=ordering).apply(model, ids)
    hidden = []
    layers = (dense if ordering == "dense" else model).model.layers[1], dense.model.layers[0]
    layers[0].register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
    layers[1].register_forward_hook(lambda _, args, out: hidden.append(out[0] if isinstance(out, tuple) else out))
    with torch.no_grad():
        dense(ids)
        if ordering != "dense":
            model(ids)
    leaving, entering = hidden[0], hidden[-1]
    assert_close("entering the second block", SEEN[1][0], entering, 1e-5)
    assert_close("leaving the first", SEEN[0][1], leaving, 1e-5)
    assert SEEN[0][2] == [Masked] * 7


def test_a_block_pass_parts_what_goes_site_by_site() -> None:
    steps = [Magnitude(), RTN(), Seeing(), Wanda(), Seeing()]
    assert parts(steps) == [range(2), range(2, 3), range(3, 4), range(4, 5)]
    assert parts(steps[:2]) == [range(2)]
    assert parts(steps[2:3]) == [range(1)]


def test_padding_may_be_a_token_that_the_model_does_not_know(tiny_llama: Path, hugging_face: Any, ids: Tensor) -> None:
    padded, mask = torch.full((len(ids), ids.shape[1] + 2), 10**6), torch.zeros(len(ids), ids.shape[1] + 2)
    padded[:, : ids.shape[1]], mask[:, : ids.shape[1]] = ids, 1
    found, want = (PassManager([Wanda()]).apply(hugging_face(tiny_llama), *given) for given in ((padded, mask), (ids,)))
    assert torch.equal(found[FIRST].dense(), want[FIRST].dense())


@pytest.mark.parametrize("wrong", [torch.tensor([[1, -100]]), torch.tensor([[1, 10**6]]), torch.zeros(2, 0).long()])
def test_tokens_that_the_model_does_not_know_are_refused(wrong: Tensor, tiny_llama: Path, hugging_face: Any) -> None:
    with pytest.raises(CalibrationError, match=r"unknown to this model|not empty"):
        PassManager([RTN(group=8)]).apply(hugging_face(tiny_llama), wrong)


def test_each_module_is_in_the_mode_it_was_in_whatever_happens(
    tiny_llama: Path, hugging_face: Any, ids: Tensor
) -> None:
    model = hugging_face(tiny_llama).train()
    model.model.layers[0].eval()
    before = {name: module.training for name, module in model.named_modules()}
    PassManager([RTN(group=8)]).apply(model, ids)
    assert {name: module.training for name, module in model.named_modules()} == before
    with pytest.raises(UnsupportedWeight):
        PassManager([RTN(group=8), Magnitude()]).apply(model, ids)
    assert {name: module.training for name, module in model.named_modules()} == before


def test_an_unknown_ordering_is_refused() -> None:
    with pytest.raises(RecipeError, match="ordering 'sites' is unknown; allowed: site, block, dense"):
        PassManager([Magnitude()], ordering="sites")
