"""The pruning benches: naive loops compute what passes compute, rows survive an interruption, tables are complete."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.passes.feedback import Chosen, Unrounded, feed_back
from compress.passes.hessian import damp, inverse_factor
from compress.passes.hybrid.oats import by_turns
from compress.passes.pruning.dsnot import dsnot
from compress.passes.pruning.reconstruct import least_squares
from compress.passes.pruning.swaps import swap
from compress.passes.quantization.gptq import gptq
from compress.stats import Collector, ColumnNorm, Gram, Moments
from compress.weights import Grid, pattern
from compress_evals import pruning, speed

ROW = pruning.Measured(
    method="wanda", sparsity="0.5", calibration="mixed", source="m", kl=[1.0, 3.0], loss=[8.0, 8.0],
    dense_loss=[7.0, 7.0], tokens=8, right=dict.fromkeys(pruning.TASKS, "1101"),
    clusters={task: ["a", "b", "c", "d"] for task in pruning.TASKS},
    intervals=dict.fromkeys(pruning.TASKS, (0.5, 0.9)), errors={}, seconds=2.0,
)  # fmt: skip


@pytest.fixture(scope="module")
def parts() -> dict[str, Any]:
    """A weight with the statistics of correlated inputs."""
    collector = Collector((ColumnNorm, Gram, Moments), 64, torch.device("cpu"))
    collector.update(speed.tokens(512, 64, seed=0)[None])
    stats = collector.finish("x")
    w = speed.normal(24, 64, seed=5)
    keep = pattern(0.5).keep(w.abs() * stats[ColumnNorm])
    return {"w": w, "gram": stats[Gram], "norm": stats[ColumnNorm], "moments": stats[Moments], "keep": keep}


def test_the_loop_over_columns_is_sparsegpt(parts: dict[str, Any], assert_close: Any) -> None:
    found = inverse_factor(parts["gram"], 0.01)
    assert found is not None
    got, _, _ = feed_back(parts["w"], found[0], Unrounded(), Chosen(pattern(0.5, "matrix")), 32)
    assert_close("weights", got, speed.column_loop(parts["w"], found[0], 0.5, 32), 1e-4)


def test_the_loop_over_columns_is_gptq(parts: dict[str, Any], assert_close: Any) -> None:
    found = inverse_factor(parts["gram"], 0.01)
    assert found is not None
    got, _ = gptq(parts["w"], found[0], Grid(bits=4, group=16), block=32)
    assert_close("weights", got.dense(), speed.rounded_loop(parts["w"], found[0], 4, 16), 1e-4)


def test_the_loop_over_decompositions_is_oats(parts: dict[str, Any], assert_close: Any) -> None:
    """The first turn is the same; later ones come as near by another way."""
    a = parts["w"] * parts["norm"]

    def ours(turns: int) -> torch.Tensor:
        left, right, mask = by_turns(a, 2, pattern(0.75), turns)
        return torch.where(mask, a, left @ right)

    assert_close("first turn", ours(1), speed.turns_loop(a, 2, 16, 1), 1e-4)
    errors = [float((a - found).norm()) for found in (ours(80), speed.turns_loop(a, 2, 16, 80))]
    assert errors[0] == pytest.approx(errors[1], rel=0.02)


def test_the_loop_over_groups_is_the_pattern(parts: dict[str, Any]) -> None:
    score = parts["w"].abs() * parts["norm"]
    assert torch.equal(pattern("2:4").keep(score), speed.group_loop(score, 4, 2))


def test_the_loop_over_rows_is_dsnot(parts: dict[str, Any]) -> None:
    mean, _, within = parts["moments"]
    args = (parts["w"], parts["keep"], mean, within, parts["norm"])
    assert torch.equal(dsnot(*args), speed.dsnot_loop(*args))


def test_the_loop_over_rows_and_pairs_is_swaps(parts: dict[str, Any]) -> None:
    w, keep = parts["w"], parts["keep"]
    _, got, _ = swap(w, w * keep, keep, parts["gram"], limit=100, shortlist=64)
    assert torch.equal(got, speed.swaps_loop(w, keep, parts["gram"]))


def test_the_loop_over_rows_is_least_squares(parts: dict[str, Any], assert_close: Any) -> None:
    w, keep, gram = parts["w"], parts["keep"], damp(parts["gram"], 0.01)
    got, _ = least_squares(w, keep, gram, w * keep, steps=500, tolerance=1e-6)
    assert_close("values", got, speed.solve_loop(w, keep, gram), 1e-3)


@pytest.mark.slow
def test_the_speed_table_names_its_conditions(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--hidden", "64", "--inner", "128", "--keys", "64", "--tokens", "256", "--rows", "4"]
    monkeypatch.setattr(sys, "argv", ["speed", *options])
    speed.main()
    printed = capsys.readouterr().out
    assert printed.startswith("hidden 64, inner 128, ")
    assert "| sparsegpt 2:4 int4 |" in printed
    assert "| gptq int4 g64 |" in printed
    assert "4 rows |" in printed


def test_a_row_comes_back_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    assert pruning.read(path) == []
    path.write_text(json.dumps(asdict(ROW)) + "\n", encoding="utf-8")
    (again,) = pruning.read(path)
    assert asdict(again) | {"intervals": 0} == asdict(ROW) | {"intervals": 0}


def test_a_table_shows_means_and_marks_the_best() -> None:
    worse = replace(ROW, method="magnitude", kl=[4.0, 4.0], right=dict.fromkeys(pruning.TASKS, "1000"))
    lines = pruning.table([ROW, worse]).splitlines()
    assert "| **0.5000** | 7.39 | **75.0 (50.0-90.0)**" in lines[2]  # 4 / 8 nats, e**2, 3 of 4
    assert "| 1.0000 | 7.39 | 25.0 (50.0-90.0)" in lines[3]


def test_methods_are_compared_on_the_same_questions() -> None:
    worse = replace(ROW, method="sparsegpt", kl=[4.0, 4.0], right=dict.fromkeys(pruning.TASKS, "1000"))
    (line,) = pruning.verdicts([ROW, worse])
    assert line.startswith("- 0.5 mixed: wanda against sparsegpt: KL 0.5000 against 1.0000 (p = 0.5)")
    assert "facts_trained +50.0 points" in line


def test_every_row_of_the_table_is_a_recipe() -> None:
    rows = pruning.wanted("mixed")
    assert len(rows) == len(set(rows))
    assert {method for method, _ in rows} == set(pruning.METHODS)
    assert all(pruning.METHODS[method](sparsity) for method, sparsity in rows)
    assert set(pruning.wanted("text")) < set(rows)
