"""`compress sweep` from the command line: its output, its exit codes, and the state after an interrupt.

The process of a cell is a stub; `tests/evals/test_sweep.py` tests the rest.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from compress_evals.sweep import records, running

Run = Callable[..., tuple[int, str, str]]
# writes a result at 0.1, fails at 0.9, interrupts the sweep at 0.8
STUB = """
import json, os, signal, sys, time
from pathlib import Path
work = Path(sys.argv[1])
told = json.loads((work / "job.json").read_text())
[sparsity] = [step["magnitude"]["sparsity"] for step in told["recipe"]["passes"]]
if sparsity == 0.9:
    sys.exit(1)
if sparsity == 0.8:
    os.kill(os.getppid(), signal.SIGINT)
    time.sleep(60)
(work / "results" / told["id"]).mkdir(parents=True)
(work / "results" / told["id"] / "results.json").write_text("{}")
"""
SWEEP = "cells:\n- {{name: m, recipe: magnitude-50, set: {{passes.0.sparsity: [{}]}}}}\n"


@pytest.fixture(autouse=True)
def stub(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(running, "command", lambda work: [sys.executable, "-c", STUB, str(work)])
    monkeypatch.setattr(running, "POLL", 0.02)


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], Path]:
    def write(sparsities: str) -> Path:
        (tmp_path / "s.yaml").write_text(SWEEP.format(sparsities))
        return tmp_path / "s.yaml"

    return write


def test_a_sweep_that_ended_well_exits_0_and_says_what_it_did(cli: Run, file: Callable[[str], Path]) -> None:
    path = file("0.1, 0.2")
    code, out, err = cli("sweep", path, "--out", path.parent / "o")
    assert code == 0, err
    assert "2 done, 0 failed" in out
    assert "m-sparsity=0.2: done" in err
    assert "2/2" in err


def test_failed_cells_exit_6_and_are_listed_with_their_error(cli: Run, file: Callable[[str], Path]) -> None:
    path = file("0.9, 0.1")
    code, out, _ = cli("sweep", path, "--out", path.parent / "o", "--json")
    found = json.loads(out)
    assert (code, found["done"], found["failed"]) == (6, 1, 1)
    assert found["cells"][0]["error"] == "its process exited with 1; see log.txt"
    code, out, _ = cli("sweep", path, "--out", path.parent / "o")
    assert code == 6
    assert "failed, earlier" in out and "see log.txt" in out


def test_a_dry_run_lists_the_cells_and_the_time_left_and_measures_nothing(
    cli: Run, file: Callable[[str], Path], tmp_path: Path
) -> None:
    cli("sweep", file("0.1"), "--out", tmp_path / "o")
    code, out, err = cli("sweep", file("0.1, 0.2, 0.1"), "--out", tmp_path / "o", "--dry-run")
    assert code == 0, err
    assert "2 cells, 1 to measure, about" in out
    assert "measured once" in err
    assert not (tmp_path / "o/cells/m-sparsity=0.2").exists()


def test_a_dry_run_looks_for_the_engine_too(cli: Run, file: Callable[[str], Path], tmp_path: Path) -> None:
    for said, *given in (
        ("is only valid with --engine ray", "--address", "head:6379"),
        ("is not one of local, ray", "--engine", "slurm"),
        ("nothing answers at 127.0.0.1:1: ", "--engine", "ray", "--address", "127.0.0.1:1"),
    ):
        code, _, err = cli("sweep", file("0.1"), "--out", tmp_path / "o", "--dry-run", *given)
        assert code == 2 and said in err
    assert not (tmp_path / "o").exists()


def test_an_interrupt_stops_the_cells_and_leaves_nothing_half_written(
    cli: Run, file: Callable[[str], Path], tmp_path: Path
) -> None:
    code, out, err = cli("sweep", file("0.1, 0.8, 0.2"), "--out", tmp_path / "o")
    assert (code, out) == (130, "")
    assert "the same command resumes the sweep" in err
    assert [path.parent.name for path in (tmp_path / "o").glob("cells/*/cell.json")] == ["m-sparsity=0.1"]
    assert not list((tmp_path / "o").glob("cells/*/work"))


def test_a_second_sweep_in_one_folder_is_refused(
    cli: Run, file: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(records, "PATIENCE", 0.1)
    with records.locked(tmp_path / "o"):
        code, out, err = cli("sweep", file("0.1"), "--out", tmp_path / "o")
    assert (code, out) == (2, "")
    assert "another sweep is running" in err


def test_a_lock_file_that_a_dead_sweep_left_is_no_lock(cli: Run, file: Callable[[str], Path], tmp_path: Path) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "lock").write_text("1\n")  # a process that lives, and holds nothing
    assert cli("sweep", file("0.1"), "--out", tmp_path / "o")[0] == 0


def test_an_error_in_the_file_is_told_before_anything_is_written(
    cli: Run, file: Callable[[str], Path], tmp_path: Path
) -> None:
    code, out, err = cli("sweep", file("0.1, 7"), "--out", tmp_path / "o")
    assert (code, out) == (2, "")
    assert "cells[0] (m sparsity=7): passes[0].magnitude.sparsity" in err
    assert not (tmp_path / "o").exists()
    assert cli("sweep", "nope.yaml") == (2, "", "error: nope.yaml: cannot be read: No such file or directory\n")
