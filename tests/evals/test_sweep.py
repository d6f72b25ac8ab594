"""Sweeps: what the file may contain, which cells it defines, and that cells are measured once, however a sweep ends.

The work of a cell's process is replaced by a stub, except in one test; `tests/test_cli_sweep.py` tests the command.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.errors import RecipeError
from compress.recipe import from_dict
from compress_evals import data
from compress_evals.sweep import Board, Progress, Summary, Sweep, load, plan, records, run, running, strangers
from compress_evals.sweep.grid import MOST

# a cell's process that writes what a real one would, or fails if its recipe prunes 0.9, or takes its time at 0.8
STUB = """
import json, os, sys, time
from pathlib import Path
work = Path(sys.argv[1])
told = json.loads((work / "job.json").read_text())
with (work.parent.parent.parent / "calls").open("a") as calls:
    calls.write(told["id"] + " " + os.environ["OMP_NUM_THREADS"] + chr(10))
[sparsity] = [step["magnitude"]["sparsity"] for step in told["recipe"]["passes"]]
if sparsity == 0.9:
    (work / "error.txt").write_text("it went wrong")
    sys.exit(1)
if sparsity == 0.8:
    time.sleep(60)
if sparsity in (0.15, 0.25, 0.35):
    time.sleep(0.4)  # seen at work, however slow the machine
(work / "model" / told["id"]).mkdir(parents=True)
for name in ("dense", told["id"]):
    (work / "results" / name).mkdir(parents=True)
    (work / "results" / name / "results.json").write_text("{}")
"""
Written = Callable[..., Path]


@pytest.fixture
def written(tmp_path: Path) -> Written:
    """`written(cells, ...)`: a sweep file."""

    def write(cells: str, before: str = "") -> Path:
        path = tmp_path / "sweep.yaml"
        path.write_text(f"{before}\ncells:\n{cells}\n")
        return path

    return write


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "command", lambda work: [sys.executable, "-c", STUB, str(work)])
    monkeypatch.setattr(running, "POLL", 0.02)


def pruned(written: Written, *sparsities: float) -> Sweep:
    axis = ", ".join(map(str, sparsities))
    return load(written(f"- {{name: m, recipe: magnitude-50, set: {{passes.0.sparsity: [{axis}]}}}}"))


def calls(out: Path) -> list[str]:
    """The cells that were started, in order."""
    return [line.split()[0] for line in (out / "calls").read_text().splitlines()]


def statuses(summary: Summary) -> dict[str, str]:
    return {record.id: record.status for record in summary.records}


# -- the file -----------------------------------------------------------------------------------------


def test_axes_make_a_grid_and_names_say_what_was_set(written: Written) -> None:
    sweep = load(written("- {recipe: gptq-int4, set: {passes.0.bits: [2, 3], passes.0.group: [32, 64]}}"))
    assert [cell.name for cell in sweep.cells] == [
        "gptq-int4 bits=2 group=32", "gptq-int4 bits=2 group=64", "gptq-int4 bits=3 group=32",
        "gptq-int4 bits=3 group=64",
    ]  # fmt: skip
    assert sweep.cells[2].id == "gptq-int4-bits=3-group=32"
    assert sweep.cells[2].recipe.passes[0].options()["bits"] == 3
    assert sweep.cells[2].changes == {"passes.0.bits": 3, "passes.0.group": 32}


def test_a_given_name_leaves_only_axes_to_tell(written: Written) -> None:
    line = "- {name: w, recipe: wanda-50, set: {passes.0.sparsity: ['2:4', 0.7], calibration.samples: 8}}"
    assert [cell.id for cell in load(written(line)).cells] == ["w-sparsity=2of4", "w-sparsity=0.7"]


def test_options_of_one_name_are_told_apart_by_their_pass(written: Written) -> None:
    sweep = load(written("- {recipe: quickstart, set: {passes.0.bits: [3, 4], passes.1.bits: 2}}"))
    assert sweep.cells[0].name == "quickstart 0.bits=3 1.bits=2"


def test_a_recipe_may_be_written_in_the_line(written: Written) -> None:
    line = "- {name: mine, passes: [wanda: {sparsity: 2:4}, rtn], set: {passes.1.bits: [3]}}"
    [cell] = load(written(line)).cells
    assert (cell.id, cell.label, len(cell.recipe.passes)) == ("mine-bits=3", "mine", 2)


def test_a_recipe_file_lies_beside_the_sweep_not_in_the_current_folder(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = tmp_path / "elsewhere"
    other.mkdir()
    (other / "mine.yaml").write_text("passes: [rtn]")
    monkeypatch.chdir(other)
    with pytest.raises(RecipeError, match=r"cells\[0\]\.recipe: no recipe file"):
        load(written("- mine.yaml"))
    (tmp_path / "mine.yaml").write_text("passes: [nf4]")
    assert load(written("- mine.yaml")).cells[0].recipe.passes[0].name == "nf4"


def test_each_model_and_seed_is_measured_and_the_first_keep_their_names(written: Written, tiny_llama: Path) -> None:
    sweep = load(written("- wanda-50", f"models: [builtin, {tiny_llama}]\nseeds: [0, 3]"))
    name = tiny_llama.name
    assert [(cell.id, cell.model, cell.seed) for cell in sweep.cells] == [
        ("wanda-50", "builtin", 0), ("wanda-50-seed=3", "builtin", 3),
        (f"wanda-50-of-{name}", name, 0), (f"wanda-50-seed=3-of-{name}", name, 3),
    ]  # fmt: skip
    assert [cell.recipe.calibration.seed for cell in sweep.cells] == [0, 3, 0, 3]


def test_what_would_be_measured_twice_is_measured_once_and_noted(written: Written) -> None:
    sweep = load(written("- wanda-50\n- {name: w, recipe: wanda-50, set: {passes.0.sparsity: [0.5, 0.6]}}\n- nf4",
                         "seeds: [0, 1]"))  # fmt: skip
    assert [cell.id for cell in sweep.cells] == ["wanda-50", "wanda-50-seed=1", "w-sparsity=0.6",
                                                 "w-sparsity=0.6-seed=1", "nf4"]  # fmt: skip
    assert any("cells[1] (w sparsity=0.5) is the same as wanda-50:" in note for note in sweep.notes)
    assert any("(nf4 seed=1) is the same as nf4:" in note for note in sweep.notes)  # it reads no data


WRONG = {
    "unknown key": ("- {recipe: wanda-50, sets: {}}", "", r"cells\[0\]: unknown key 'sets'; did you mean 'set'"),
    "unknown key above": ("- wanda-50", "model: x", "unknown key 'model'; did you mean 'models'"),
    "unknown recipe": ("- wanda-51", "", r"cells\[0\]\.recipe: no recipe file at 'wanda-51'; did you mean 'wanda-50'"),
    "value": ("- {recipe: rtn-int4, set: {passes.0.bits: [4, 99]}}", "", r"cells\[0\] \(rtn-int4 bits=99\): .*bits"),
    "path": ("- {recipe: rtn-int4, set: {passes.7.bits: 4}}", "", "set.passes.7.bits: no item '7'"),
    "empty axis": ("- {recipe: rtn-int4, set: {passes.0.bits: []}}", "", "passes.0.bits: is an empty list"),
    "seed": ("- {recipe: wanda-50, set: {calibration.seed: 1}}", "", "must be set by `seeds`"),
    "model": ("- {recipe: wanda-50, set: {model: x}}", "", "must be set by `models`"),
    "both": ("- {recipe: wanda-50, passes: [rtn]}", "", "give either `recipe`"),
    "neither": ("- {name: x}", "", "give either `recipe`"),
    "no name": ("- {passes: [rtn]}", "", "needs a `name`"),
    "accept": ("- {recipe: rtn-int4, set: {accept: {max_drop: 0.1}}}", "", "tests no conditions"),
    "same name": ("- {name: a, recipe: nf4}\n- {name: A, recipe: fp8}", "", "another cell or model is called 'A'"),
    "a model's name": ("- {name: builtin, recipe: nf4}", "", "another cell or model is called 'builtin'"),
    "no letters": ("- {name: '/../', recipe: nf4}", "", "with letters or digits"),
    "anchor": ("- &a wanda-50", "", "anchors, aliases and tags"),
    "suite": ("- nf4", "eval: {suite: fact}", "did you mean 'facts'"),
    "eval": ("- nf4", "eval: {limits: 8}", r"eval: unknown option 'limits'; did you mean 'limit'"),
    "text": ("- nf4", "eval: {text: nowhere.txt}", "nowhere.txt does not exist"),
    "data": ("- nf4", "eval: {data_dir: sweep.yaml}", r"eval.data_dir: \S+sweep.yaml is not a folder"),
    "no model": ("- nf4", "models: [nowhere]", "no model folder at"),
    "models alike": ("- nf4", "models: [builtin, builtin]", "two models are called 'builtin'"),
    "seeds": ("- nf4", "seeds: [yes]", r"seeds\[0\]: expected a whole number"),
    "too many": (f"- {{recipe: nf4, set: {{a: [{'1, ' * 200}], b: [{'1, ' * 200}]}}}}", "", f"more than {MOST}"),
}  # fmt: skip


@pytest.mark.parametrize(("cells", "before", "message"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_with_its_place(written: Written, cells: str, before: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(written(cells, before))


def test_every_error_of_a_file_is_told_at_once(written: Written) -> None:
    with pytest.raises(RecipeError) as caught:
        load(written("- wanda-51\n- {recipe: rtn-int4, set: {passes.0.bits: [99, 4, -1]}}", "seeds: []"))
    places = re.findall(r"seeds:|cells\[\d\]", str(caught.value))
    assert "sweep.yaml: 4 errors: " in str(caught.value) and "\n" not in str(caught.value)
    assert places == ["seeds:", "cells[0]", "cells[1]", "cells[1]"]


def test_a_file_without_cells_is_refused(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("[]")
    with pytest.raises(RecipeError, match="expected a mapping"):
        load(tmp_path / "s.yaml")


@pytest.mark.slow
def test_the_committed_sweep_is_valid_and_covers_the_families() -> None:
    sweep = load(Path(__file__).parents[2] / "docs" / "leaderboard" / "sweep.yaml")
    used = {step.name for cell in sweep.cells for step in cell.recipe.passes}
    sent = [json.loads(json.dumps(cell.recipe.to_dict())) for cell in sweep.cells]
    assert [from_dict(data) for data in sent] == [cell.recipe for cell in sweep.cells]  # on the way to its process
    assert len(sweep.cells) >= 70
    assert used >= {"magnitude", "wanda", "sparsegpt", "alps", "rtn", "gptq", "hqq", "svd-llm", "oats", "slim",
                    "shortgpt", "flap", "wanda-sp", "slicegpt", "vq", "awq", "nf4", "mxfp4", "nvfp4", "fp8",
                    "smoothquant"}  # fmt: skip


# -- running ------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("stub")
def test_cells_are_measured_once_and_their_results_put_in_place(written: Written, tmp_path: Path) -> None:
    out, sweep, seen = tmp_path / "o", pruned(written, 0.1, 0.2), []
    first = run(sweep, out, on_progress=seen.append)
    again = run(sweep, out)
    assert calls(out) == ["m-sparsity=0.1", "m-sparsity=0.2"] == list(first.ran)
    assert (again.ran, again.skipped) == ((), first.ran)
    assert (out / "cells/m-sparsity=0.1/results/m-sparsity=0.1/results.json").is_file()
    assert (out / "dense/dense/results.json").is_file()
    assert not list(out.glob("cells/*/results/dense"))
    assert not [*out.glob("cells/*/work"), *out.glob("cells/*/model")]
    assert (out / "sweep.yaml").read_text() == sweep.text
    ended = [progress for progress in seen if progress.ended]
    assert [(p.done, p.total) for p in ended] == [(1, 2), (2, 2)]
    assert ended[0].seconds_left is not None and ended[0].seconds_left >= 0
    assert all(progress.seconds_left is None for progress in seen[: seen.index(ended[0])])  # none, on a busy machine


class Label(str):
    """The name of a recipe that counts with how many others it is compared."""

    compared = 0
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        Label.compared += 1
        return str.__eq__(self, other)


def test_the_time_left_is_told_without_comparing_each_cell_with_each() -> None:
    done: Any = {str(i): SimpleNamespace(recipe=Label(f"r{i % 3}"), seconds=i % 3, status="done") for i in range(90)}
    waiting: Any = [SimpleNamespace(cell=SimpleNamespace(label=Label(f"r{i % 4}"))) for i in range(80)]
    board = Board(waiting=waiting)
    assert board.seconds_left(2) is None
    board.records = done
    assert board.seconds_left(2) == pytest.approx((20 * (0 + 1 + 2) + 20 * 1) / 2)  # the mean of all for the fourth
    assert Label.compared < 10 * (80 + 90)


@pytest.mark.usefixtures("stub")
def test_the_record_of_a_cell_has_the_agreed_form(written: Written, tmp_path: Path) -> None:
    run(pruned(written, 0.2), tmp_path / "o")
    record = json.loads((tmp_path / "o/cells/m-sparsity=0.2/cell.json").read_text())
    assert record.pop("seconds") >= 0
    assert len(record.pop("key")) == 64
    assert record == {"schema": 1, "id": "m-sparsity=0.2", "model": "builtin", "recipe": "magnitude-50", "seed": 0,
                      "changes": {"passes.0.sparsity": 0.2}, "status": "done", "error": None}  # fmt: skip


@pytest.mark.usefixtures("stub")
def test_a_failed_cell_is_recorded_and_tried_again_only_if_asked(written: Written, tmp_path: Path) -> None:
    out, sweep = tmp_path / "o", pruned(written, 0.9, 0.2)
    first = run(sweep, out)
    assert statuses(first) == {"m-sparsity=0.9": "failed", "m-sparsity=0.2": "done"}
    assert first.failed[0].error == "it went wrong"
    assert not (out / "cells/m-sparsity=0.9/results").exists()
    assert run(sweep, out).ran == ()
    assert run(sweep, out, retry_failed=True).ran == ("m-sparsity=0.9",)


@pytest.mark.usefixtures("stub")
def test_a_changed_recipe_reruns_only_its_cell_and_other_questions_all(written: Written, tmp_path: Path) -> None:
    out = tmp_path / "o"
    (tmp_path / "mine.yaml").write_text("passes: [magnitude: {sparsity: 0.1}]")
    cells = "- mine.yaml\n- magnitude-50"
    run(load(written(cells)), out)
    (tmp_path / "mine.yaml").write_text("passes: [magnitude: {sparsity: 0.2}]")
    changed = load(written(cells))
    assert [p.state for p in plan(changed, out)] == ["changed", "done"]
    assert run(changed, out).ran == ("mine",)
    assert run(load(written(cells, "eval: {limit: 8}")), out).ran == ("mine", "magnitude-50")


@pytest.mark.usefixtures("stub")
def test_a_suite_that_asks_something_else_reruns_all(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sweep = pruned(written, 0.1)
    run(sweep, tmp_path / "o")
    monkeypatch.setattr(records, "suite_digest", lambda name: "of another task file")
    assert [p.state for p in plan(sweep, tmp_path / "o")] == ["changed"]


def test_other_code_reruns_all(written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sweep = load(written("- rtn-int4"))
    [before] = plan(sweep, tmp_path / "o")
    monkeypatch.setattr(records, "software", lambda: {"code": "another"})
    [after] = plan(sweep, tmp_path / "o")
    assert before.key != after.key


@pytest.mark.usefixtures("stub")
@pytest.mark.parametrize("file", ["m/config.json", "m/tokenizer.json", "cal.txt"])
def test_a_model_or_a_calibration_text_that_says_something_else_reruns_its_cells(
    file: str, written: Written, tiny_llama: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_llama, tmp_path / "m")
    (tmp_path / "cal.txt").write_text("one " * 2000)
    (tmp_path / "mine.yaml").write_text(
        f"calibration: {{data: {tmp_path / 'cal.txt'}}}\npasses: [magnitude: {{sparsity: 0.1}}]"
    )
    sweep = load(written("- {recipe: mine.yaml}", "models: [m]"))
    run(sweep, tmp_path / "o")
    assert [p.state for p in plan(sweep, tmp_path / "o")] == ["done"]
    (tmp_path / file).write_text((tmp_path / file).read_text() + " ")
    assert [p.state for p in plan(sweep, tmp_path / "o")] == ["changed"]


@pytest.mark.usefixtures("stub")
def test_another_text_or_other_data_rerun_all(written: Written, tmp_path: Path) -> None:
    (tmp_path / "prose.txt").write_text("one " * 2000)
    (tmp_path / "data" / "freebaseqa").mkdir(parents=True)
    asked = tmp_path / "data" / "freebaseqa" / "eval.txt"
    asked.write_text("who | me\n")
    before = "eval: {suite: kick, tasks: [kick_freebaseqa], data_dir: data, text: prose.txt}"
    sweep = load(written("- magnitude-50", before))
    run(sweep, tmp_path / "o")
    assert [p.state for p in plan(sweep, tmp_path / "o")] == ["done"]
    for path in (tmp_path / "prose.txt", asked):
        kept = path.read_text()
        path.write_text(f"{kept}what | that\n")
        data._from_folder.cache_clear()  # a file is read once per process
        assert [p.state for p in plan(sweep, tmp_path / "o")] == ["changed"]
        path.write_text(kept)
        data._from_folder.cache_clear()
        assert [p.state for p in plan(sweep, tmp_path / "o")] == ["done"]


@pytest.mark.slow
@pytest.mark.usefixtures("stub")
def test_a_cell_that_takes_too_long_has_failed(written: Written, tmp_path: Path) -> None:
    summary = run(pruned(written, 0.8, 0.1), tmp_path / "o", timeout=0.01)
    assert [record.error for record in summary.records] == ["timed out after 0.01 minutes", None]


@pytest.mark.usefixtures("stub")
def test_cells_share_the_cores_and_wait_for_their_dense_model(
    written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(4)))
    seen: list[Progress] = []
    run(pruned(written, 0.15, 0.25, 0.35, 0.4), tmp_path / "o", jobs=2, on_progress=seen.append)
    assert {line.split()[1] for line in (tmp_path / "o/calls").read_text().splitlines()} == {"2"}
    assert max(len(p.running) for p in seen if not p.done) == 1
    assert max(len(p.running) for p in seen) == 2


def test_dense_results_of_another_batch_size_replace_none(tmp_path: Path) -> None:
    def measured(folder: Path, size: int) -> Path:
        (folder / "llama").mkdir(parents=True)
        path = folder / "llama" / "results.json"
        path.write_text(json.dumps({"engine": {"batch_size": size}}))
        return path

    assert running.dense_place(tmp_path, measured(tmp_path / "a", 64)) == tmp_path / "dense" / "llama"
    measured(tmp_path / "dense", 64)
    assert running.dense_place(tmp_path, measured(tmp_path / "b", 64)) == tmp_path / "dense" / "llama"
    assert running.dense_place(tmp_path, measured(tmp_path / "c", 32)) == tmp_path / "dense" / "llama-batch-32"


@pytest.mark.usefixtures("stub")
def test_models_are_kept_if_asked(written: Written, tmp_path: Path) -> None:
    run(pruned(written, 0.1), tmp_path / "o", keep_models=True)
    assert (tmp_path / "o/cells/m-sparsity=0.1/model/m-sparsity=0.1").is_dir()


@pytest.mark.usefixtures("stub")
def test_cells_that_left_the_sweep_are_named(written: Written, tmp_path: Path) -> None:
    run(pruned(written, 0.1, 0.2), tmp_path / "o")
    assert strangers(tmp_path / "o", pruned(written, 0.2).cells) == ["m-sparsity=0.1"]


@pytest.mark.usefixtures("stub")
def test_a_record_that_cannot_be_read_is_none(written: Written, tmp_path: Path) -> None:
    sweep = pruned(written, 0.1)
    run(sweep, tmp_path / "o")
    (tmp_path / "o/cells/m-sparsity=0.1/cell.json").write_text('{"status": "done"}')
    assert plan(sweep, tmp_path / "o")[0].state == "new"


# -- whatever ends it -----------------------------------------------------------------------------------

DRIVER = """
import sys
from pathlib import Path
from compress_evals.sweep import load, run, running
stub, file, out = sys.argv[1:]
running.command = lambda work: [sys.executable, "-c", stub, str(work)]
run(load(file), out)
"""
# the stub, with the part of a real cell that ends it when the sweep is gone
ORPHAN = "from compress_evals.sweep.cell import end_with_parent\nend_with_parent()\n" + STUB


def drive(stub: str, sweep: Path, out: Path) -> subprocess.Popen[bytes]:
    """A sweep in a process of its own, once its second cell has begun."""
    process = subprocess.Popen([sys.executable, "-c", DRIVER, stub, str(sweep), str(out)])
    until = time.monotonic() + 60
    while not ((out / "calls").exists() and len(calls(out)) == 2):
        assert time.monotonic() < until and process.poll() is None
        time.sleep(0.05)
    return process


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_a_sweep_goes_on_where_it_was_ended(
    how: signal.Signals, written: Written, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tally: Any
) -> None:
    file, out = written("- {name: m, recipe: magnitude-50, set: {passes.0.sparsity: [0.1, 0.8, 0.2]}}"), tmp_path / "o"
    process = drive(ORPHAN if how == signal.SIGKILL else STUB, file, out)
    monkeypatch.setattr(records, "PATIENCE", 0.3)
    sweep = load(file)
    with (
        tally("fault", "sweeps at once in one folder"),
        pytest.raises(RecipeError, match=f"another sweep is running .* .process {process.pid}"),
    ):
        run(sweep, out)
    with tally("fault", "SIGKILL or Ctrl-C of a sweep"):
        process.send_signal(how)
        process.wait(timeout=30)
        assert [p.state for p in plan(sweep, out)] == ["done", "new", "new"]
        monkeypatch.setattr(records, "PATIENCE", 20.0)  # until the orphan is gone
        (tmp_path / "stub.py").write_text(STUB.replace("time.sleep(60)", "pass"))
        monkeypatch.setattr(running, "command", lambda work: [sys.executable, str(tmp_path / "stub.py"), str(work)])
        assert run(sweep, out).ran == ("m-sparsity=0.8", "m-sparsity=0.2")
        assert not list(out.glob("cells/*/work"))


def test_a_log_that_may_not_be_written_is_refused_and_none_is_made(
    written: Written, tmp_path: Path, read_only: Any
) -> None:
    sweep, out = load(written("- {name: m, recipe: magnitude-50}")), tmp_path / "o"
    cell = out / "cells" / "m"
    cell.mkdir(parents=True)
    assert not records.busy(cell / "log.txt") and not list(cell.iterdir())
    (cell / "log.txt").touch()
    with read_only(cell), pytest.raises(RecipeError, match=r"log\.txt cannot be written: Permission denied"):
        run(sweep, out)


# -- one that is real -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_real_cell_is_compressed_and_evaluated_in_its_process(
    written: Written, tmp_path: Path, tiny_llama: Path
) -> None:
    from compress_evals.fidelity import evaluation_text
    from compress_evals.folders import SHORTEST
    from compress_evals.results import load as load_results

    (tmp_path / "text.txt").write_text(evaluation_text()[:SHORTEST])
    cells = (
        "- {name: bad, recipe: wanda-50, set: {calibration.data: nowhere.txt, calibration.length: 64}}\n- magnitude-50"
    )
    asked = "{limit: 4, text: text.txt, tasks: [facts_trained, facts_mc]}"
    sweep = load(written(cells, f"models: [{tiny_llama}]\neval: {asked}"))
    bad, good = run(sweep, tmp_path / "o").records
    assert "'nowhere.txt' cannot be read" in str(bad.error)
    assert good.error is None, (tmp_path / "o/cells/magnitude-50/log.txt").read_text()[-2000:]
    found: Any = load_results(tmp_path / "o/cells/magnitude-50/results/magnitude-50")
    assert (found.model.name, found.limit, found.vs.dense) == ("magnitude-50", 4, tiny_llama.name)
    assert load_results(tmp_path / "o/dense" / tiny_llama.name).vs is None
