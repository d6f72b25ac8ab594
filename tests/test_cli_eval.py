"""`compress eval` from the command line, on the built-in model: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import compress
from compress import RTN


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress.run("builtin", [RTN(bits=8, group=0)], tmp_path_factory.mktemp("eval") / "small").out


def evaluate(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "compress", "eval", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_json_goes_to_stdout_alone_and_the_reports_are_written(artifact: Path, tmp_path: Path) -> None:
    done = evaluate(artifact, "--limit", 8, "--out", tmp_path / "e", "--json")
    assert done.returncode == 0, done.stderr
    dense, small = json.loads(done.stdout)["results"]
    assert (dense["model"]["name"], small["model"]["name"]) == ("builtin", "small")
    assert small["vs"]["tasks"]["facts_trained"]["paired"]["n"] == 8
    assert "12/12" in done.stderr
    assert "</html>" in (tmp_path / "e" / "report.html").read_text()
    assert "facts" in (tmp_path / "e" / "report.md").read_text().lower()


@pytest.mark.slow
def test_the_table_names_the_tasks_and_the_verdicts(artifact: Path, tmp_path: Path) -> None:
    done = evaluate(artifact, "--limit", 8, "--out", tmp_path / "e")
    assert done.returncode == 0, done.stderr
    assert "Facts, trained wording (n=8)" in done.stdout
    assert "inconclusive" in done.stdout


@pytest.mark.slow
def test_another_base_than_its_own_is_refused_before_anything_is_written(
    artifact: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    done = evaluate(artifact, "--base", tiny_llama, "--out", tmp_path / "e")
    assert (done.returncode, done.stdout, len(done.stderr.strip().splitlines())) == (2, "", 1)
    assert "other weights" in done.stderr
    assert not (tmp_path / "e").exists()
