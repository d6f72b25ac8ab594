"""The table of deltas: the fine-tune compared with itself loses nothing, rows are measured once, claims can fail."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress import Recipe
from compress.builtin.finetune import BASE
from compress_evals import deltas
from compress_evals.deltas import BUDGETS, METHODS, DeltaBench, Measured, recipe_of
from compress_evals.table import read

SIZES = {"lowrank": (2.0, 1.0, 0.5), "gptq": (2.0,), "deltazip": (2.0,), "bitdelta": (2.0, 1.0),
         "bitdelta as published": (1.0,)}  # fmt: skip
TRUE = Measured(
    method=deltas.TRUE, source="m", kl=[0.0] * 16, loss=[8.0] * 16, dense_loss=[8.0] * 16, tokens=16, seconds=0.0,
    right={deltas.OWN: "1" * 100, deltas.FACTS: "1" * 100},
    clusters={task: [str(i) for i in range(100)] for task in (deltas.OWN, deltas.FACTS)},
    intervals=dict.fromkeys((deltas.OWN, deltas.FACTS), (0.9, 1.0)), recipe={}, budget=16.0, bits_per_weight=16.0,
    bytes=100, folder_bytes=100, own_kl=[0.0] * 16, own_tokens=16,
)  # fmt: skip
BARE = replace(TRUE, method=deltas.BARE, budget=0.0, own_kl=[6.0] * 16, right=TRUE.right | {deltas.OWN: "0" * 100})
ANCHORS = [TRUE, BARE]


def row(method: str, bits: float, kl: float, own: str = "1" * 100, size: float | None = None) -> Measured:
    return replace(
        TRUE, method=method, budget=bits, bits_per_weight=size or bits, own_kl=[kl * (1 + i / 16) for i in range(16)],
        right=TRUE.right | {deltas.OWN: own}, recipe={"passes": [{method: {}}]},
    )  # fmt: skip


class Stub(DeltaBench):
    """Measures nothing, and remembers what it was asked."""

    def __init__(self) -> None:
        self.ran: list[tuple[str, float]] = []

    def delta(self, recipe: Recipe, method: str, budget: float) -> Measured:
        self.ran.append((method, budget))
        return replace(row(method, budget, 0.1), recipe=recipe.to_dict())

    def anchors(self) -> list[Measured]:
        return ANCHORS


@pytest.fixture(scope="module")
def finetuned(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in model with its matrices moved a little, said to be a fine-tune on sums."""
    from transformers import AutoModelForCausalLM

    out = tmp_path_factory.mktemp("perturbed")
    model: Any = AutoModelForCausalLM.from_pretrained(BASE, local_files_only=True, dtype="auto")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".layers." in name and parameter.ndim == 2:
                step = torch.randn(parameter.shape, generator=generator) * 0.1 * parameter.float().std()
                parameter.add_(step.to(parameter.dtype))
    model.save_pretrained(out)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(BASE / name, out / name)
    (out / "finetune.json").write_text(json.dumps({"ability": "arithmetic", "seed": 1}), encoding="utf-8")
    return out


@pytest.fixture(scope="module")
def bench(finetuned: Path) -> DeltaBench:
    bench = DeltaBench(finetuned, limit=4)
    bench.windows = bench.windows[:2]
    return bench


# -- measuring ---------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_fine_tune_beside_itself_loses_nothing_and_the_base_differs(bench: DeltaBench) -> None:
    true, bare = bench.anchors()
    assert true.mean_own_kl == true.mean_kl == 0
    assert bare.mean_own_kl > 0.001 < bare.mean_kl
    matrices = 4 * (2 * 256 * 256 + 2 * 256 * 128 + 3 * 256 * 768)
    assert (true.bytes, true.bits_per_weight, bare.bytes) == (2 * matrices, 16.0, 0)


@pytest.mark.slow
def test_a_delta_of_more_bits_is_nearer_to_the_fine_tune(bench: DeltaBench) -> None:
    few, many = (bench.delta(recipe_of("magnitude, rtn", bits), "magnitude, rtn", bits) for bits in (0.5, 2.0))
    assert many.mean_own_kl < few.mean_own_kl
    assert few.bytes < few.folder_bytes < many.folder_bytes > many.bytes > few.bytes
    assert len(few.own_kl) == len(few.right[deltas.OWN]) == len(few.clusters[deltas.OWN]) == 4


def test_calibration_is_what_the_model_was_tuned_on(bench: DeltaBench, tmp_path: Path) -> None:
    bench.write_documents(tmp_path / "a.jsonl")
    bench.write_documents(tmp_path / "b.jsonl")
    texts = [json.loads(line)["text"] for line in (tmp_path / "a.jsonl").read_text().splitlines()]
    assert (tmp_path / "a.jsonl").read_bytes() == (tmp_path / "b.jsonl").read_bytes()
    assert len(texts) == deltas.DOCUMENTS
    assert sum(text.startswith("Sum: ") for text in texts) == deltas.DOCUMENTS // 2
    assert not {text.split(".")[0] for text in texts} & {q.prompt.rstrip(".") for q in bench.questions}


# -- rows ----------------------------------------------------------------------------------------------


def test_every_row_has_a_recipe_of_its_own() -> None:
    found = [deltas.recipe_key(r) for m in METHODS for b in BUDGETS if (r := recipe_of(m, b)) is not None]
    assert len(set(found)) == len(found) > 2 * len(METHODS)


@pytest.mark.parametrize("method", SIZES)
def test_a_method_has_only_the_sizes_it_can_have(method: str) -> None:
    assert tuple(bits for bits in BUDGETS if METHODS[method](bits) is not None) == SIZES[method]


def test_a_row_is_measured_once(tmp_path: Path) -> None:
    bench, path = Stub(), tmp_path / "x" / "rows.jsonl"
    path.parent.mkdir()
    deltas.fill(bench, path, ["svd", "gptq"], [2.0, 1.0])
    deltas.fill(bench, path, ["svd", "gptq"], [2.0, 1.0])
    assert bench.ran == [("svd", 2.0), ("gptq", 2.0), ("svd", 1.0)]
    assert [r.method for r in read(path, Measured)] == [deltas.TRUE, deltas.BARE, "svd", "gptq", "svd"]


# -- the table -----------------------------------------------------------------------------------------


def test_what_is_kept_is_relative_to_the_true_fine_tune() -> None:
    true = replace(TRUE, right=TRUE.right | {deltas.OWN: "1" * 80 + "0" * 20})
    half = row("svd", 1.0, 0.1, "1" * 40 + "0" * 60)
    assert deltas.kept(half, true, deltas.OWN).startswith("50.0 (")
    assert deltas.kept(half, replace(true, right=true.right | {deltas.OWN: "0" * 100}), deltas.OWN) == "-"


def test_the_best_of_a_budget_is_bold() -> None:
    lines = deltas.table([*ANCHORS, row("svd", 1.0, 0.9, "0" * 50 + "1" * 50), row("lowrank", 1.0, 0.1)], TRUE)
    true, svd, lowrank, bare = lines.splitlines()[2:]
    assert "**0.1469**" in lowrank
    assert "**100.0 (" in lowrank
    assert all("**" not in "|".join(line.split("|")[:7]) for line in (true, svd, bare))


@pytest.mark.parametrize(
    ("rows", "ending"),
    [
        ([row("svd", 1.0, 0.3), row("auto", 1.0, 0.1)], "better"),
        ([row("svd", 1.0, 0.1), row("auto", 1.0, 0.3)], "WORSE"),
        ([row("svd", 1.0, 0.2), row("auto", 1.0, 0.2)], "tie"),
        ([row("svd", 1.0, 0.2, size=1.2)], "TOO LARGE"),
        ([row("svd", 1.0, 0.2, size=1.08)], "holds"),
    ],
    ids=str,
)
def test_a_claim_is_checked_at_each_budget(rows: list[Measured], ending: str) -> None:
    lines = deltas.checks([*ANCHORS, *rows])
    assert lines[-1].rpartition(": ")[2] == ending
    assert deltas.failed(lines) == ending.isupper()


def test_a_rival_over_the_budget_is_no_rival() -> None:
    lines = deltas.checks([*ANCHORS, row("svd", 1.0, 0.1, size=2.0), row("auto", 1.0, 0.3)])
    assert not any("auto" in line for line in lines)


def test_an_ability_that_the_base_has_is_told() -> None:
    assert deltas.failed(deltas.checks([TRUE, replace(BARE, right=TRUE.right)]))
    assert not deltas.failed(deltas.checks(ANCHORS))


def test_the_check_is_the_exit_code(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "tuned").mkdir()
    rows = [*ANCHORS, row("svd", 1.0, 0.1), row("auto", 1.0, 0.3)]
    (tmp_path / "tuned" / "rows.jsonl").write_text("".join(json.dumps(asdict(r)) + "\n" for r in rows))
    monkeypatch.setattr("sys.argv", ["deltas", "tuned", "--print", "--check", "--out", str(tmp_path)])
    assert deltas.main() == 1
    assert capsys.readouterr().out == (tmp_path / "table.md").read_text()


def test_nothing_measured_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["deltas", "tuned", "--print", "--out", str(tmp_path)])
    with pytest.raises(SystemExit) as stopped:
        deltas.main()
    assert stopped.value.code == 2
    assert "holds no row yet; measure some first" in capsys.readouterr().err
