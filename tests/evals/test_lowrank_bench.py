"""The low-rank table: equal bytes at every share, rows identified by their recipes, and paired verdicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import Calibration, Recipe
from compress_evals import lowrank
from compress_evals.lowrank import METHODS, SHARES, Measured, recipe_of
from compress_evals.table import read

DENSE = Measured(
    method="dense", source="m", kl=[0.0] * 16, loss=[8.0] * 16, dense_loss=[8.0] * 16, tokens=16, seconds=0.0,
    right=dict.fromkeys(lowrank.TASKS, "1" * 200),
    clusters={task: [str(i) for i in range(200)] for task in lowrank.TASKS},
    intervals=dict.fromkeys(lowrank.TASKS, (0.9, 1.0)), removed=0.0, recipe={}, bits_per_weight=16.0,
)  # fmt: skip


def row(method: str, removed: float, kl: float, right: str = "1" * 200) -> Measured:
    recipe = recipe_of(method, removed)
    assert recipe is not None
    return replace(
        DENSE, method=method, removed=removed, kl=[kl * (1 + i / 16) for i in range(16)],
        right=dict.fromkeys(lowrank.TASKS, right), bits_per_weight=16 * (1 - removed), recipe=recipe.to_dict(),
    )  # fmt: skip


class Stub(lowrank.Bench):
    """Measures nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.dense = None

    def run(self, recipe: Any, method: str) -> tuple[dict[str, Any], dict[str, Any]]:
        self.ran.append(method)
        return {"sizes": {"bits_per_weight": 8.0}}, self.scored(None, method, 1.0)

    def scored(self, model: Any, method: str, seconds: float) -> dict[str, Any]:
        own = ("removed", "recipe", "bits_per_weight")
        return {k: v for k, v in asdict(DENSE).items() if k not in own} | {"method": method, "seconds": seconds}


@pytest.mark.slow
def test_every_row_has_a_recipe_of_its_own() -> None:
    found = [lowrank.recipe_key(r) for name in METHODS for s in SHARES if (r := recipe_of(name, s)) is not None]
    assert len(set(found)) == len(found) == len(METHODS) * len(SHARES)
    assert recipe_of("gptq", 0.2) is None


@pytest.mark.slow
@pytest.mark.parametrize("methods", [("svd", "wanda", "oats"), ("svd-llm", "sparsegpt", "oats refit")], ids=str)
def test_methods_are_compared_at_equal_bytes(methods: Sequence[str], tiny_llama: Path, tmp_path: Path) -> None:
    few = Calibration(samples=6, length=32)
    bits = []
    for i, method in enumerate(methods):
        recipe = recipe_of(method, 0.5)
        assert recipe is not None
        out = tmp_path / str(i)
        bits.append(compress.run(tiny_llama, Recipe(passes=recipe.passes, calibration=few), out).bits_per_weight)
    itemsize = 32 / 16  # the tiny model is float32, the table's model has 16 bits; a bitmap has one bit in both
    assert bits[0] == pytest.approx(16 * itemsize / 2, rel=0.08)  # ranks are whole
    assert bits[1] == pytest.approx((1 - lowrank.sparse(0.5)) * 16 * itemsize + 1, rel=0.03)
    assert bits[2] == pytest.approx(bits[1], rel=0.03)


def test_a_row_is_measured_once(tmp_path: Path) -> None:
    bench, path = Stub(), tmp_path / "rows.jsonl"
    lowrank.fill(bench, path, ["svd", "wanda", "gptq"], [0.2, 0.5])
    lowrank.fill(bench, path, ["svd", "wanda", "gptq"], [0.2, 0.5])
    assert bench.ran == ["svd", "wanda", "svd", "wanda", "gptq"]
    assert [r.removed for r in read(path, Measured)] == [0.0, 0.2, 0.2, 0.5, 0.5, 0.5]


def test_the_lowest_divergence_and_the_lost_answers_are_shown() -> None:
    rows = [row("svd", 0.5, 0.9, "0" * 50 + "1" * 150), row("wanda", 0.5, 0.1)]
    lines = lowrank.table(rows, DENSE).splitlines()
    assert "**0.1469**" in lines[3]
    assert "**" not in lines[2].split("|")[4]
    assert "-50 +0" in lines[2]


def test_a_sum_is_set_against_pure_forms() -> None:
    rows = [row("oats refit", 0.3, 0.10), row("wanda", 0.3, 0.2), row("sparsegpt", 0.3, 0.05), row("svd-llm", 0.3, 0.4)]
    lines = lowrank.checks(rows)
    assert [line.rpartition(": ")[2] for line in lines] == ["better", "WORSE", "better", "WORSE", "better"]
    assert "the best sparse, sparsegpt" in lines[3]
    assert "the best low rank, svd-llm" in lines[4]


def test_nothing_measured_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["lowrank", "--print", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        lowrank.main()
    assert stopped.value.code == 2
    assert "holds no row yet; measure some first" in capsys.readouterr().err
