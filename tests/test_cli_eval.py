"""`compress eval` from the command line, on the built-in model: what it prints, writes and refuses."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import compress
from compress import RTN
from compress_evals.fidelity import evaluation_text
from compress_evals.folders import SHORTEST

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress.run("builtin", [RTN(bits=8, group=0)], tmp_path_factory.mktemp("eval") / "small").out


@pytest.mark.slow
def test_json_goes_to_stdout_alone_and_the_reports_are_written(artifact: Path, tmp_path: Path) -> None:
    """In a process of its own: what lm-eval and its workers say is not ours to catch in this one."""
    arguments = [artifact, "--limit", 8, "--out", tmp_path / "e", "--json"]
    command = [sys.executable, "-m", "compress", "eval", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    dense, small = json.loads(done.stdout)["results"]
    assert (dense["model"]["name"], small["model"]["name"]) == ("builtin", "small")
    assert small["vs"]["tasks"]["facts_trained"]["paired"]["n"] == 8
    assert "12/12" in done.stderr
    assert "</html>" in (tmp_path / "e" / "report.html").read_text()
    assert "facts" in (tmp_path / "e" / "report.md").read_text().lower()


@pytest.mark.slow
def test_the_table_names_the_tasks_and_the_verdicts(cli: Run, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(evaluation_text()[:SHORTEST])
    code, out, err = cli("eval", artifact, "--limit", 8, "--text", tmp_path / "text.txt", "--out", tmp_path / "e")
    assert code == 0, err
    assert "Facts, trained wording (n=8)" in out
    assert "inconclusive" in out


@pytest.mark.slow
def test_another_base_than_its_own_is_refused_before_anything_is_written(
    cli: Run, artifact: Path, tiny_llama: Path, tmp_path: Path
) -> None:
    code, out, err = cli("eval", artifact, "--base", tiny_llama, "--out", tmp_path / "e")
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert "other weights" in err
    assert not (tmp_path / "e").exists()
