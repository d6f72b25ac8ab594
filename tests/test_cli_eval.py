"""`compress eval` from the command line, on the built-in model: its output, its files and its error messages."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import compress
from compress import RTN
from compress_evals.fidelity import evaluation_text
from compress_evals.folders import SHORTEST
from compress_evals.results import Skipped
from compress_evals.suite import FACTS

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return compress.run("builtin", [RTN(bits=8, group=0)], tmp_path_factory.mktemp("eval") / "small").out


@pytest.mark.slow
def test_json_goes_to_stdout_alone_and_the_reports_are_written(artifact: Path, forks: Any, tmp_path: Path) -> None:
    """In a process of its own: what lm-eval and its workers say is not ours to catch in this one."""
    (tmp_path / "text.txt").write_text(evaluation_text()[:SHORTEST])
    asked = ["--limit", "4", "--noise", "2", "--text", tmp_path / "text.txt"]
    [done] = forks(lines=[["eval", artifact, *asked, "--out", tmp_path / "e", "--json"]])
    assert done["code"] == 0, done["err"]
    dense, small = json.loads(done["out"])["results"]
    assert (dense["model"]["name"], small["model"]["name"]) == ("builtin", "small")
    assert small["vs"]["tasks"]["facts_trained"]["paired"]["n"] == 4
    n = len(FACTS.tasks)
    assert f"{n}/{n}" in done["err"]
    assert "</html>" in (tmp_path / "e" / "report.html").read_text()
    assert "facts" in (tmp_path / "e" / "report.md").read_text().lower()


@pytest.mark.slow
def test_the_table_names_the_tasks_and_the_verdicts(cli: Run, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(evaluation_text()[:SHORTEST])
    asked = ("--limit", 8, "--tasks", "facts_trained,facts_mc", "--text", tmp_path / "text.txt")
    code, out, err = cli("eval", artifact, *asked, "--out", tmp_path / "e")
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


@pytest.mark.slow
def test_what_is_not_accepted_exits_5_and_is_written_all_the_same(cli: Run, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text(evaluation_text()[:SHORTEST])
    arguments = (artifact, "--limit", 8, "--tasks", "facts_trained", "--noise", 0, "--text", tmp_path / "text.txt")
    options = ("--out", tmp_path / "e", "--accept", "drop<=1@95%")
    code, out, err = cli("eval", *arguments, *options)
    assert (code, "facts_trained" in err) == (0, False), err
    code, out, err = cli("eval", *arguments, *options, "--accept", "closed book:drop<=0.001@95%")
    assert code == 5  # eight questions exclude no loss
    assert "Facts, trained wording" in out and "small: facts_trained: +0.0 points" in err
    assert (tmp_path / "e" / "small" / "results.json").exists()


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--accept", "drop<0.02"), "drop<=0.02@95%"),
        (("--accept", "recall:drop<=0.02@95%"), "no family 'recall'"),
        (("--accept", "choice:drop<=0.02@95%", "--tasks", "facts_trained"), "applies to none of the tasks in --tasks"),
        (("--batch-size", "lots"), "neither auto nor a number"),
        (("--suite", "fact"), "--suite: there is no 'fact'; did you mean 'facts'"),
        (
            ("--tasks", "facts_trained,facts_mcq"),
            "--tasks: the suite facts has no task 'facts_mcq'; did you mean 'facts_mc'",
        ),
        (("--tasks", ""), "error: --tasks: is empty; give task names separated by commas\n"),
        (
            ("--tasks", "facts_trained, "),
            "error: --tasks: 'facts_trained, ' has an empty name; give",
        ),
        (("--chat-template",), "no chat template"),
        (("--text", "nope"), "error: --text: nope cannot be read: No such file or directory\n"),
        (("--data-dir", "nope"), "--data-dir: nope is not a folder"),
    ],
)
def test_what_cannot_be_asked_is_one_line_and_asks_nothing(
    cli: Run, artifact: Path, tmp_path: Path, options: tuple[str, ...], said: str
) -> None:
    code, out, err = cli("eval", artifact, "--out", tmp_path / "e", *options)
    assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
    assert said in err
    assert not (tmp_path / "e").exists()


@pytest.mark.slow
def test_a_condition_on_a_family_without_data_asks_nothing(
    cli: Run, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It was found unmet, with exit code 5, once all other tasks had been asked."""
    had = {task.name: None for task in FACTS.tasks if task.family != "summaries"}
    lost = {"facts_summary": Skipped(title="", family="summaries", reason="no data folder was given")}
    monkeypatch.setattr("compress_evals.questions.availability", lambda *_: (had, lost))
    asked = ("--limit", 4, "--out", tmp_path / "e", "--accept", "drop<=1@95%", "--accept", "summaries:drop<=1@95%")
    code, out, err = cli("eval", artifact, *asked)
    said = "error: --accept: no task of 'summaries' can be asked: facts_summary: no data folder was given\n"
    assert (code, out, err) == (2, "", said)
    assert not (tmp_path / "e").exists()


def test_a_base_that_must_be_named_is_of_the_model_as_it_was_asked_for(cli: Run) -> None:
    code, out, err = cli("eval", "builtin")
    assert (code, out, err) == (2, "", "error: --base: give the dense model that builtin was made from\n")


@pytest.mark.parametrize("option", ["--out", "--cache"])
@pytest.mark.parametrize("below", ["", "e"])
def test_nothing_is_written_into_a_model_folder(cli: Run, artifact: Path, option: str, below: str) -> None:
    before = sorted(artifact.rglob("*"))
    code, out, err = cli("eval", artifact, option, artifact / below)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert f"{option}: {artifact / below} must not be the model folder" in err
    assert sorted(artifact.rglob("*")) == before


@pytest.mark.slow
def test_a_folder_that_may_not_be_written_is_refused_before_anything_is_asked(
    cli: Run, artifact: Path, tmp_path: Path, read_only: Any, tally: Any
) -> None:
    (tmp_path / "e").mkdir()
    options = ("--out", tmp_path / "e", "--cache", tmp_path / "cache")
    with tally("fault", "a place that may not be written"), read_only(tmp_path / "e"):
        code, out, err = cli("eval", artifact, *options)
        assert (code, out, len(err.strip().splitlines())) == (2, "", 1)
        assert "--out: " in err and "cannot be written: Permission denied" in err
        assert [path.name for path in tmp_path.iterdir()] == ["e"]


@pytest.mark.slow
def test_the_tasks_are_listed_with_their_sizes_and_what_they_lack(cli: Run) -> None:
    code, out, err = cli("tasks", "--suite", "facts", "--json")
    assert code == 0, err
    [suite] = json.loads(out)["suites"]
    found = {task["name"]: task for task in suite["tasks"]}
    assert (suite["suite"], found["facts_generate"]["n"], found["facts_generate"]["data"]) == ("facts", 100, "built in")
    assert Path(suite["folder"]).is_dir()
    code, out, err = cli("tasks", "--suite", "facts")
    assert code == 0 and "facts_trained" in out and "--include_path" in out
    assert cli("tasks", "--suite", "fakts")[0] == 2
    assert cli("tasks", "--suite", "facts", "--data-dir", "n" * 300)[2].endswith("n is not a folder\n")
