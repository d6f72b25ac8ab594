"""Runs of one recipe with several calibration seeds: one line, own pages, exported data, and no false merges."""

from __future__ import annotations

import csv
import json
import math
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from compress.errors import ArtifactError
from compress_evals.comparison import compare
from compress_evals.leaderboard import publish
from compress_evals.leaderboard.collect import Board, collect
from compress_evals.leaderboard.runs import side_by_side, together
from compress_evals.leaderboard.table import lines
from compress_evals.results import GapChange, Metric, Results, TierScore
from compress_evals.stats import paired_runs

Versus = Callable[..., Results]
Store = Callable[[Path, Sequence[Results]], Path]


def text(seed: int | None, method: str = "gptq") -> str:
    calibration = "" if seed is None else f"calibration: {{samples: 128, seed: {seed}}}\n"
    return f"model: builtin\n{calibration}passes:\n- {method}: {{bits: 4}}\n"


@pytest.fixture
def runs(versus: Versus) -> list[Results]:
    """Three seeds that lose 2, 6 and 13 of 40, another recipe, and one that does not say its seed."""
    lost = {0: 2, 1: 6, 2: 13}
    made = [
        versus(f"gptq{f'-seed={seed}' * (seed > 0)}", {"facts_mc": n}, sha=str(seed) * 64, recipe=text(seed))
        for seed, n in lost.items()
    ]
    other = versus("rtn", {"facts_mc": 5}, sha="a" * 64, recipe=text(0, "rtn"))
    silent = versus("silent", {"facts_mc": 5}, sha="b" * 64, recipe=text(None))
    return [*made, other, silent]


@pytest.fixture
def board(dense: Results, runs: list[Results], stored: Store, tmp_path: Path) -> Board:
    [board] = collect([stored(tmp_path / "results", [dense, *runs])]).boards
    return board


def test_seeds_of_a_recipe_are_one_line(board: Board) -> None:
    merged = together(board)
    assert [(entry.name, len(entry.runs)) for entry in merged.compressed] == [("gptq", 3), ("rtn", 0), ("silent", 0)]
    [first] = [entry for entry in merged.compressed if entry.runs]
    assert [run.name for run in first.runs] == ["gptq, seed 0", "gptq, seed 1", "gptq, seed 2"]
    assert first.scores["facts_mc"].mean() == pytest.approx(1 - (2 + 6 + 13) / 3 / 40)
    assert first.results.model.sha is None
    [line] = [line for line in lines(merged) if line.runs]
    [cell] = [cell for cell in line.families if cell.paired.delta]
    assert cell.paired.delta == pytest.approx(-7 / 40)
    assert line.fidelity is not None and line.fidelity.kl.value == pytest.approx(0.07)
    assert line.fidelity.kl.low == 0 and line.fidelity.kl.high > 0.13  # Student's t of .02, .06 and .13
    assert all(0 <= cell.low <= cell.high <= 1 for cell in line.families)


def test_the_interval_is_wider_than_that_of_the_mean_as_one_run(board: Board) -> None:
    merged = lines(together(board))
    [line] = [line for line in merged if line.runs]
    [cell] = [cell for cell in line.families if cell.paired.delta]
    alone = [run.families[line.families.index(cell)].paired for run in line.runs]
    assert cell.runs.count == 3 and 0.1 < cell.runs.between < np.std([0.05, 0.15, 0.325], ddof=1)
    assert cell.paired.high - cell.paired.low > max(pair.high - pair.low for pair in alone)
    assert cell.low < min(run.families[line.families.index(cell)].low for run in line.runs)
    assert [pair.verdict for pair in alone] == ["inconclusive", "drop", "fails"]
    assert cell.paired.verdict == "inconclusive"
    assert line.standing.kept is not None and line.standing.kept.value == pytest.approx(1 - 7 / 40)
    assert line.standing.kept.runs.between == pytest.approx(cell.runs.between, abs=0.002)
    assert {other.standing.rank for other in merged} == {1}  # runs that far apart are surely worse than nobody
    assert all(run.standing.rank is None for run in line.runs)


def test_near_the_top_a_family_of_several_tasks_is_no_surer_than_its_runs(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    """A bootstrap of mean scores, one of which is below 1, would end at 98.75 %."""
    together_asked = {task: result.model_copy(update={"family": "all"}) for task, result in dense.tasks.items()}
    dense = dense.model_copy(update={"tasks": together_asked})
    made = [
        versus(f"g-seed={s}", {"facts_mc": s // 3}, original=dense, sha=str(s) * 64, recipe=text(s)) for s in (1, 2, 3)
    ]
    [board] = collect([stored(tmp_path, [dense, *made])]).boards
    [line] = lines(together(board))
    assert line.families[0].low < max(run.families[0].low for run in line.runs)


def test_equal_runs_have_the_interval_of_one(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    made = [versus(f"rtn-seed={seed}", {"facts_mc": 4}, sha="c" * 64, recipe=text(seed)) for seed in (1, 2, 3)]
    [board] = collect([stored(tmp_path, [dense, *made])]).boards
    [line], [once, *_] = lines(together(board)), lines(board)
    for ours, theirs in zip(line.families, once.families, strict=True):
        assert (ours.paired.low, ours.paired.high) == pytest.approx((theirs.paired.low, theirs.paired.high))
        assert (ours.low, ours.high, ours.runs.between) == pytest.approx((theirs.low, theirs.high, 0))
    assert line.name == "rtn" and line.entry.results.model.sha == "c" * 64


def test_a_seed_that_comes_twice_keeps_all_apart(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    made = [
        versus(name, {"facts_mc": n}, sha=str(n) * 64, recipe=text(seed))
        for name, n, seed in (("before", 1, 0), ("after", 2, 0), ("later", 3, 1))
    ]
    [board] = collect([stored(tmp_path, [dense, *made])]).boards
    assert together(board) == board


def test_another_device_is_no_spread_of_runs(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    one, two = (versus(f"g-seed={s}", {"facts_mc": s}, sha=str(s) * 64, recipe=text(s)) for s in (1, 2))
    two = two.model_copy(update={"engine": two.engine.model_copy(update={"device": "cuda:0", "dtype": "bfloat16"})})
    [board] = collect([stored(tmp_path, [dense, one, two])]).boards
    assert [entry.name for entry in together(board).compressed] == ["g-seed=1", "g-seed=2"]


def test_a_name_that_is_taken_is_not_given_again(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    made = [versus(f"x-seed={seed}", {"facts_mc": seed}, sha=str(seed) * 64, recipe=text(seed)) for seed in (1, 2)]
    made.append(versus("x", {"facts_mc": 9}, sha="9" * 64, recipe=text(0, "rtn")))
    [board] = collect([stored(tmp_path, [dense, *made])]).boards
    assert [entry.name for entry in together(board).compressed] == ["x (2 runs)", "x"]


@pytest.mark.parametrize(
    ("other", "line"), [("dense", "x"), ("x (2 runs)", "x"), ("x, seed 1", "x (2 runs)"), ("y", "x")]
)
def test_names_of_lines_and_runs_are_nobody_elses(
    other: str, line: str, dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    """Also where the sweep set the seed of a pass: `x-seed=7-seed=1` and `x-seed=8-seed=1` are two recipes."""
    stem = "dense" if other == "dense" else "x"
    made = [
        versus(f"{stem}-seed={seed}", {"facts_mc": seed}, sha=str(seed) * 64, recipe=text(seed, method))
        for seed, method in ((1, "gptq"), (2, "gptq"), (3, "vq"), (4, "vq"))
    ]
    made += [] if other == "dense" else [versus(other, {"facts_mc": 9}, sha="9" * 64, recipe=text(0, "rtn"))]
    results = stored(tmp_path / "results", [dense, *made])
    publish([results], tmp_path / "site")
    [board] = json.loads((tmp_path / "site" / "leaderboard.json").read_text(encoding="utf-8"))["boards"]
    names = [name for model in board["models"] for name in (model["name"], *(run["name"] for run in model["runs"]))]
    assert len({"dense", *names}) == 1 + len(names) == len(made) + 3
    assert (line if other != "dense" else "dense (2 runs)") in names
    assert [m["tasks"]["facts_mc"]["delta"] for m in board["models"] if m["name"] == other] in ([], [-9 / 40])


def test_a_line_has_a_name_where_its_runs_are_called_by_their_seeds_alone(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    made = [versus(f"-seed={s}", {}, sha=str(s) * 64, recipe=text(s)) for s in (1, 2)]
    [board] = collect([stored(tmp_path, [dense, *made])]).boards
    assert [entry.name for entry in together(board).compressed] == ["-seed=1"]


@pytest.mark.parametrize("changes", [{"iters": 0}, {"iters": 10**12}, {"seed": -1}])
def test_numbers_that_no_bootstrap_takes_are_refused(
    changes: dict[str, int], dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    made = [versus(f"x-seed={s}", {}, sha=str(s) * 64, recipe=text(s), changes=changes) for s in (1, 2)]
    with pytest.raises(ArtifactError, match=next(iter(changes))):
        publish([stored(tmp_path / "results", [dense, *made])], tmp_path / "site")


def test_runs_whose_names_share_nothing_keep_them(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    made = [versus(name, {}, sha=str(s) * 64, recipe=text(s)) for s, name in enumerate(("alice", "bob"))]
    [board] = collect([stored(tmp_path, [dense, *made])]).boards
    [entry] = together(board).compressed
    assert (entry.name, [run.name for run in entry.runs]) == ("alice (2 runs)", ["alice", "bob"])


def test_a_line_is_called_by_its_name_all_over_its_page_and_says_nothing_of_one_run_alone(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    made = [
        versus(f"x-seed={s}", {"facts_mc": s}, sha=str(s) * 64, recipe=text(s), calibration={"name": "c", "sha256": s})
        for s in (1, 2)
    ]
    publish([stored(tmp_path / "results", [dense, *made])], tmp_path / "site")
    page = (tmp_path / "site" / "models" / "x.html").read_text(encoding="utf-8")
    assert "x-seed=1" not in page and "Recipe of <bdi>x, seed 1</bdi>" in page
    assert "<dd>name c</dd>" in page  # the hash is of the windows of one seed


def test_what_was_not_measured_in_every_run_is_not_said(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    one, two = (versus(f"g-seed={s}", {"facts_mc": s}, sha=str(s) * 64, recipe=text(s)) for s in (1, 2))
    assert two.vs is not None
    two = two.model_copy(update={"vs": two.vs.model_copy(update={"fidelity": None})})
    [board] = collect([stored(tmp_path, [dense, one, two])]).boards
    [line] = lines(together(board))
    assert line.fidelity is None and line.speed is None


def test_metrics_tiers_and_gaps_of_one_run_alone_are_not_said(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    one, two = (versus(f"g-seed={s}", {"facts_mc": s}, sha=str(s) * 64, recipe=text(s)) for s in (1, 2))
    assert one.vs is not None
    task = one.tasks["facts_mc"]
    more = {
        "metrics": {**task.metrics, "more": Metric(value=0, low=0, high=1)},
        "tiers": {"more": TierScore(n=1, value=0, low=0, high=1)},
    }
    gaps = {"more": GapChange(dense=0, compressed=0, delta=0, low=0, high=0)}
    one = one.model_copy(
        update={
            "tasks": {**one.tasks, "facts_mc": task.model_copy(update=more)},
            "vs": one.vs.model_copy(update={"gaps": gaps}),
        }
    )
    [board] = collect([stored(tmp_path, [dense, one, two])]).boards
    [entry] = together(board).compressed
    found = entry.results.tasks["facts_mc"]
    assert (found.metrics.keys(), found.tiers) == (task.metrics.keys(), two.tasks["facts_mc"].tiers)
    assert entry.results.vs is not None and entry.results.vs.gaps == {}


def test_results_scored_otherwise_are_no_runs(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    one, two = (versus(f"g-seed={s}", {"facts_mc": s}, sha=str(s) * 64, recipe=text(s)) for s in (1, 2))
    task = one.tasks["facts_mc"]
    rows = [row.model_copy(update={"scores": {"other": row.scores[task.headline]}}) for row in one.rows["facts_mc"]]
    other = task.model_copy(update={"headline": "other", "metrics": {"other": task.score}})
    one = one.model_copy(
        update={"tasks": {**one.tasks, "facts_mc": other}, "rows": {**one.rows, "facts_mc": tuple(rows)}}
    )
    [board] = collect([stored(tmp_path, [dense, one, two])]).boards
    assert together(board) == board


@pytest.mark.parametrize(
    "calibration",
    ["seed: {}, 2026-01-01: 1", "seed: {}, ? [a] : 1", "seed: {}, 1: 1", f"seed: {{}}, a: 0x{'f' * 5000}",
     f"seed: 0x{'f' * 5000}{{}}", "seed: -{}"],
)  # fmt: skip
def test_recipes_that_are_none_are_left_alone(
    calibration: str, dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    made = [
        versus(f"g-seed={s}", {}, sha=str(s) * 64, recipe=f"calibration: {{{calibration.format(s)}, z: 1}}\n")
        for s in (1, 2)
    ]
    [board] = collect([stored(tmp_path, [dense, *made])]).boards
    assert together(board) == board


def test_an_infinite_divergence_stays_infinite(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    made = []
    for seed in (1, 2):
        result = versus(f"g-seed={seed}", {"facts_mc": seed}, sha=str(seed) * 64, recipe=text(seed))
        assert result.vs is not None and result.vs.fidelity is not None
        worst = {"value": math.inf, "low": math.inf, "high": math.inf} if seed == 2 else {}
        kl = type(result.vs.fidelity.kl)(**({"value": 0.1, "low": 0.1, "high": 0.1} | worst))
        fidelity = type(result.vs.fidelity)(**{**vars(result.vs.fidelity), "kl": kl})
        made.append(result.model_copy(update={"vs": result.vs.model_copy(update={"fidelity": fidelity})}))
    [board] = collect([stored(tmp_path, [dense, *made])]).boards
    [line] = lines(together(board))
    assert line.fidelity is not None and line.fidelity.kl.value == math.inf


def test_the_site_says_so_on_pages_and_in_data(
    dense: Results, runs: list[Results], stored: Store, tmp_path: Path
) -> None:
    results = stored(tmp_path / "results", [dense, *runs])
    publish([results], tmp_path / "site")
    page = (tmp_path / "site" / "index.html").read_text(encoding="utf-8")
    assert (
        "gptq</bdi>, 3 runs" in page
        and "Between runs, points" in page
        and "variance over questions and over runs" in page
    )
    assert 'href="models/gptq-seed-1.html"' not in page  # single runs are not in the table
    mean = (tmp_path / "site" / "models" / "gptq.html").read_text(encoding="utf-8")
    single = (tmp_path / "site" / "models" / "gptq-seed-1.html").read_text(encoding="utf-8")
    assert 'href="gptq-seed-1.html"' in mean and "between runs" in mean and "calibration seeds 0, 1, 2" in mean
    assert 'one of 3 runs of <a href="gptq.html">' in single and "every single run" in single
    [found] = json.loads((tmp_path / "site" / "leaderboard.json").read_text(encoding="utf-8"))["boards"]
    [model] = [model for model in found["models"] if model["runs"]]
    assert [run["page"] for run in model["runs"]] == [f"models/gptq-seed-{seed}.html" for seed in range(3)]
    with (tmp_path / "site" / "leaderboard.csv").open(encoding="utf-8", newline="") as stream:
        rows = {row["model"]: row for row in csv.DictReader(stream)}
    assert (rows["gptq"]["runs"], rows["rtn"]["runs"]) == ("3", "1")
    assert float(rows["gptq"]["facts_mc between"]) > 0.1 and rows["rtn"]["facts_mc between"] == ""
    words = (tmp_path / "site" / "leaderboard.md").read_text(encoding="utf-8")
    assert "gptq (3 runs)" in words and "| gptq | 3 | 0.0700 (0.0200 to 0.1300) | " in words
    assert re.search(r"\| 82\.5 \(67\.5 to 95\.0\); 4\.\d; 13\.\d \|", words)


def test_every_run_can_have_a_line(dense: Results, runs: list[Results], stored: Store, tmp_path: Path) -> None:
    results = stored(tmp_path / "results", [dense, *runs])
    done = publish([results], tmp_path / "site", each_run=True)
    assert done.boards == (("dense", 5, 0),)
    assert "Between runs" not in (tmp_path / "site" / "index.html").read_text(encoding="utf-8")


def test_runs_of_one_seed_are_compared_with_each_other(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    made = [
        versus(f"{method}-seed={seed}", {"facts_mc": lost + seed}, sha=f"{lost}{seed}" * 32, recipe=text(seed, method))
        for method, lost, seeds in (("gptq", 0, (0, 1, 2)), ("rtn", 20, (1, 2, 3)), ("hqq", 10, (7, 8)))
        for seed in seeds
    ]
    [board] = collect([stored(tmp_path, [dense, *made])]).boards
    one, other, third = together(board).compressed
    assert [(a.name, b.name) for a, b in side_by_side(one, other)] == [
        ("gptq, seed 1", "rtn, seed 1"), ("gptq, seed 2", "rtn, seed 2"),
    ]  # fmt: skip
    assert len(side_by_side(one, board.dense)) == len(side_by_side(board.dense, one)) == 3
    assert side_by_side(one, third) == []
    after, before = zip(*side_by_side(one, other), strict=True)
    pair, spread = paired_runs(*([entry.scores["facts_mc"] for entry in side] for side in (before, after)))
    assert (pair.delta, spread.between) == (pytest.approx(0.5), 0)  # both lose one more with each seed


def test_a_run_is_compared_as_it_was(board: Board, dense: Results, runs: list[Results]) -> None:
    [line] = [line for line in lines(together(board)) if line.runs]
    again = compare(dense, runs[1], iters=200)
    assert line.runs[1].versus.tasks["facts_mc"].paired == again.tasks["facts_mc"].paired
