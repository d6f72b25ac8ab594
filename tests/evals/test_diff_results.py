"""`compress diff` with evaluation results, found beside both folders or named on the command line."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from compress_evals.results import Results, save

Command = Callable[..., tuple[int, str, str]]


@pytest.mark.slow
def test_results_beside_both_folders_are_compared(
    own_artifact: Path, make_results: Callable[..., Results], cli: Command
) -> None:
    other = own_artifact.with_name("other")
    shutil.copytree(own_artifact, other)
    for folder, answers in ((own_artifact, [1, 1, 0, 1]), (other, [1, 0, 0, 1])):
        result = make_results(folder.name, {"facts_trained": answers})
        save(result, folder.with_name(f"{folder.name}.eval") / folder.name)
    code, out, _ = cli("diff", own_artifact, other, "--json")
    told = json.loads(out)
    assert (code, told["equal"], told["tensors"]) == (1, False, [])
    (row,) = told["results"]
    assert (row["task"], row["n"], row["a"], row["b"], row["delta"]) == ("facts_trained", 4, 0.75, 0.5, -0.25)
    assert row["low"] <= -0.25 <= row["high"]
    assert "facts_trained" in cli("diff", own_artifact, other)[1]


def test_results_of_other_questions_are_refused_if_named_and_told_if_found(
    own_artifact: Path, make_results: Callable[..., Results], tmp_path: Path, cli: Command
) -> None:
    other = own_artifact.with_name("other")
    shutil.copytree(own_artifact, other)
    places = []
    for folder, answers in ((own_artifact, [1, 1, 0, 1]), (other, [1, 0])):
        places.append(folder.with_name(f"{folder.name}.eval") / folder.name)
        save(make_results(folder.name, {"facts_trained": answers}), places[-1])
    code, out, err = cli("diff", own_artifact, other, "--results", *places)
    assert (code, out, err.count("\n")) == (2, "", 1)
    code, out, _ = cli("diff", own_artifact, other)
    assert code == 0
    assert "evaluations are not compared: " in out and "different questions" in out
