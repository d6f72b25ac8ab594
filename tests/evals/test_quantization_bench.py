"""The quantization table: rows are identified by their recipes, checks name methods that are worse than expected."""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from compress.errors import RecipeError
from compress_evals import quantization
from compress_evals.quantization import METHODS, Measured, Wanted, recipe_of
from compress_evals.table import read, recipe_key, recipe_key_of

DENSE = Measured(
    method="dense", source="m", kl=[0.0] * 8, loss=[8.0] * 8, dense_loss=[8.0] * 8, tokens=8, seconds=0.0,
    right=dict.fromkeys(quantization.TASKS, "1" * 200),
    clusters={task: [str(i) for i in range(200)] for task in quantization.TASKS},
    intervals=dict.fromkeys(quantization.TASKS, (0.9, 1.0)), bits=16, group=0, recipe={}, bits_per_weight=16.0,
    degradation=0.0, error=0.0, text_bytes=64,
)  # fmt: skip
REPO = Path(__file__).parents[2]


def row(method: str, bits: int, group: int, kl: float, right: str = "1" * 200, **changes: Any) -> Measured:
    return replace(
        DENSE, method=method, bits=bits, group=group, kl=[kl * (1 + i / 8) for i in range(8)],
        right=dict.fromkeys(quantization.TASKS, right), bits_per_weight=bits + 20 / (group or 1000),
        recipe=recipe_of(method, bits, group).to_dict(), **changes,
    )  # fmt: skip


class Stub(quantization.LayerBench):
    """Measures nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.dense = None

    def run(self, recipe: Any, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
        self.ran.append(method)
        return {"sizes": {"bits_per_weight": 4.5}}, self.scored(None, method, 1.0)

    def scored(self, model: Any, method: str, seconds: float) -> dict[str, Any]:
        own = ("bits", "group", "recipe", "bits_per_weight")
        return {k: v for k, v in asdict(DENSE).items() if k not in own} | {"method": method, "seconds": seconds}


def test_every_pipeline_gives_plain_passes_and_the_ladder_names_only_pipelines() -> None:
    names = {name for step in quantization.LADDER for name in step}
    steps = [m.steps(b, g) for m in METHODS.values() for b in m.bits for g in m.groups]
    assert names <= set(METHODS) | {"dense"}
    assert all(json.loads(json.dumps(each)) == each and each for each in steps)


@pytest.mark.slow
def test_no_two_rows_of_the_table_have_one_recipe() -> None:
    here = [name for name in METHODS if quantization.missing(name) is None]
    places = quantization.wanted(here, quantization.BITS, quantization.GROUPS)
    assert len({recipe_key(place.recipe) for place in places}) == len(places)
    assert {"rtn", "gptq", "gptq act", "int8 w8a8"} <= set(here)


@pytest.mark.slow
def test_a_method_without_its_pass_is_refused_only_if_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(METHODS, "novel", quantization.grid(by="novel"))
    assert "novel" not in quantization.selected(None)
    assert "left out: novel: passes[0]: unknown pass 'novel'" in capsys.readouterr().err
    with pytest.raises(RecipeError, match="unknown pass 'novel'"):
        quantization.wanted(quantization.selected(["novel"]), (4,), (64,))


def test_a_wrong_option_is_never_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "wrong", quantization.grid(bitz=4))
    with pytest.raises(RecipeError, match="unknown option 'bitz'"):
        quantization.selected(None)


def test_methods_come_in_the_order_of_the_list() -> None:
    assert quantization.selected(["gptq", "rtn"]) == ["rtn", "gptq"]


def test_a_row_is_measured_once_and_again_when_its_recipe_changes(tmp_path: Path) -> None:
    path, places = tmp_path / "rows.jsonl", quantization.wanted(["rtn", "gptq"], (4,), (64,))
    bench = Stub()
    quantization.fill(bench, path, places[:1])
    quantization.fill(bench, path, places)
    assert bench.ran == ["rtn", "gptq"]
    changed = Wanted("rtn", 4, 64, recipe_of("rtn search", 4, 64))
    quantization.fill(bench, path, [changed])
    assert bench.ran == ["rtn", "gptq", "rtn"]
    assert [r.method for r in read(path, Measured)] == ["dense", "rtn", "gptq", "rtn"]
    assert [r.recipe for r in quantization.chosen(read(path, Measured), [changed])] == [{}, changed.recipe.to_dict()]


def test_an_option_newer_than_a_row_takes_its_default() -> None:
    old = row("gptq", 4, 64, 0.1)
    del old.recipe["passes"][0]["gptq"]["order"]
    assert recipe_key_of(old.recipe) == recipe_key(recipe_of("gptq", 4, 64))
    assert recipe_key_of(old.recipe) != recipe_key(recipe_of("gptq act", 4, 64))


def test_rows_of_a_recipe_that_is_no_more_are_left_alone() -> None:
    gone = replace(DENSE, recipe={"passes": [{"gone": {}}]})
    assert recipe_key_of(gone.recipe) == ""
    assert quantization.chosen([DENSE, gone], quantization.wanted(["rtn"], (4,), (64,))) == [DENSE]


def test_a_compact_table_has_a_line_a_method_and_a_column_a_group() -> None:
    rows = [row("rtn", 4, 64, 0.2), row("rtn", 4, 0, 0.4), row("gptq", 4, 64, 0.1), row("gptq", 3, 64, 0.5)]
    assert quantization.compact(rows, 4).splitlines() == [
        "| method | group 64 | row |",
        "|---|---|---|",
        "| rtn | 4.31: 0.2875, 100.0, 100.0 | 4.02: **0.5750**, 100.0, 100.0 |",
        "| gptq | 4.31: **0.1437**, 100.0, 100.0 |  |",
    ]


def test_all_figures_hold_flips_and_bits_per_byte() -> None:
    one = row("gptq", 4, 64, 0.0, "0" * 3 + "1" * 197, degradation=0.25, error=0.125)
    line = quantization.full([one], DENSE).splitlines()[2]
    assert "| 0.00000 | 0.25000 | 2980.96 | 1.4427 | 98.5 (90.0-100.0) | -3 +0 |" in line  # e**8; 64 / ln 2 / 64
    assert line.endswith("| 0.12500 | 0 |")


def test_a_better_method_that_is_worse_is_marked() -> None:
    rows = [row("rtn", 4, 64, 0.2), row("gptq", 4, 64, 0.1), row("rtn", 3, 64, 0.1), row("gptq", 3, 64, 0.2)]
    same = [row("rtn", 2, 64, 0.2), row("gptq", 2, 64, 0.2)]
    verdicts = [line.rpartition(": ")[2] for line in quantization.ladder([*rows, *same])]
    assert verdicts == ["holds", "VIOLATED", "tie"]


def test_steps_of_the_ladder_without_rows_are_skipped() -> None:
    (line,) = quantization.ladder([row("rtn", 4, 0, 0.3), row("gptq", 4, 0, 0.1)])
    assert line.startswith("4 bits, row: rtn 0.43125 >= gptq 0.14375 (p = 0.00")  # 2 of the 256 signs: .0078


def test_knowledge_at_two_bits_is_three_times_that_of_rounding_at_as_many_stored_bits() -> None:
    plain, better = row("rtn", 2, 64, 1.0, "1" * 20 + "0" * 180), row("gptq", 2, 64, 0.5, "1" * 60 + "0" * 140)
    larger = row("gptq", 2, 32, 0.4)
    (line,) = quantization.knowledge([plain, better, larger])
    assert line.startswith("2 bits, group 64, 2.31 bits a weight: gptq keeps 30.0 % closed book, rtn 10.0 %")
    assert line.endswith("holds")
    (line,) = quantization.knowledge([plain, row("gptq", 2, 64, 0.5, "1" * 59 + "0" * 141)])
    assert line.endswith("VIOLATED")
    (line,) = quantization.knowledge([row("rtn", 2, 64, 1.0, "1" * 67 + "0" * 133), better])
    assert line.endswith("out of reach, since rtn keeps more than a third")


def test_gptq_in_four_bits_must_match() -> None:
    good, bad = row("gptq", 4, 64, 0.1), row("gptq", 4, 64, 0.1, "0" * 40 + "1" * 160)
    assert all(line.endswith("holds") for line in quantization.lossless([good], DENSE))
    assert ["is fails" in line and line.endswith("VIOLATED") for line in quantization.lossless([bad], DENSE)] == [
        True, True,
    ]  # fmt: skip


def test_the_error_of_layers_is_relative_and_zero_for_the_same_model(model: Any) -> None:
    windows = [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert quantization.layer_error(model, model, windows) == 0
    assert quantization.layer_error(model, Doubled(model), windows) == pytest.approx(1)


class Doubled:
    """A model with twice the hidden states."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, **options: Any) -> Any:
        found = self.model(**options)
        found.hidden_states = tuple(2 * h for h in found.hidden_states)
        return found


def test_the_document_of_the_repository_names_methods_of_the_list() -> None:
    lines = (REPO / "recipes" / "quantization.md").read_text(encoding="utf-8").splitlines()
    tables = lines[lines.index("## All figures") :]
    names = {line.split(" | ")[0].removeprefix("| ") for line in tables if line.startswith("| ")} - {"method"}
    assert names
    assert names <= set(METHODS) | {"dense"}
