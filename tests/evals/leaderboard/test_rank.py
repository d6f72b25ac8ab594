"""Shares kept of the dense score, their confidence intervals, and which models share a rank."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from compress_evals.comparison import compare, retained
from compress_evals.leaderboard.collect import Board, Entry, collect
from compress_evals.leaderboard.columns import columns
from compress_evals.leaderboard.rank import standings
from compress_evals.leaderboard.table import lines
from compress_evals.results import Results

Store = Callable[[Path, Sequence[Results]], Path]
Versus = Callable[..., Results]


def board_of(dense: Results, compressed: Results) -> Board:
    def entry(results: Results) -> Entry:
        scores = {task: np.array([row.scores["acc"] for row in rows]) for task, rows in results.rows.items()}
        return Entry(name=results.model.name, place="", results=results, scores=scores)

    clusters = {task: tuple(row.cluster for row in rows) for task, rows in dense.rows.items()}
    return Board(dense=entry(dense), compressed=(entry(compressed),), clusters=clusters, margin=0.05)


def test_what_was_kept_is_what_the_comparison_says(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    one = versus("one", {"facts_trained": 10, "facts_mc": 4})
    [board] = collect([stored(tmp_path, [dense, one])]).boards
    [standing] = standings(board)
    expected = retained(dense.tasks, one.tasks)
    assert {family: kept.value for family, kept in standing.families.items()} == pytest.approx(expected)
    assert one.vs is not None and one.vs.worst is not None
    assert (standing.worst, standing.kept and standing.kept.value) == (one.vs.worst.family, one.vs.worst.retained)
    assert standing.mean is not None and standing.mean.value == pytest.approx((0.75 + 0.9 + 1) / 3)


@pytest.mark.slow
def test_the_interval_covers_the_truth_19_times_in_20(make_results: Callable[..., Results]) -> None:
    rng, hits, trials, n = np.random.default_rng(0), 0, 400, 150
    clusters = [f"c{i // 3}" for i in range(n)]
    for _ in range(trials):
        subject = np.repeat(rng.random(n // 3), 3)  # subjects differ: their questions are alike
        before = (rng.random(n) < 0.5 + 0.4 * subject).astype(float)
        after = before * (rng.random(n) < 0.5 + 0.4 * np.repeat(rng.random(n // 3), 3))
        dense = make_results("dense", {"facts_mc": before}, clusters)
        one = make_results("one", {"facts_mc": after}, clusters)
        [standing] = standings(board_of(dense, one))
        assert standing.kept is not None
        hits += standing.kept.low <= 0.7 <= standing.kept.high
    assert hits / trials == pytest.approx(0.95, abs=0.03)  # three standard errors of 400 trials


def test_no_flip_at_all_still_has_an_interval(dense: Results, versus: Versus) -> None:
    [standing] = standings(board_of(dense, versus("same", {})))
    assert standing.kept is not None
    assert standing.kept.low < 1 < standing.kept.high


def test_chance_is_taken_off_and_tasks_at_chance_do_not_count(make_results: Callable[..., Results]) -> None:
    def with_chance(results: Results) -> Results:
        tasks = {name: task.model_copy(update={"chance": 0.5}) for name, task in results.tasks.items()}
        return results.model_copy(update={"tasks": tasks})

    dense = with_chance(make_results("dense", {"facts_mc": [1] * 40, "facts_copy": [1, 0] * 20}))
    one = with_chance(make_results("one", {"facts_mc": [1] * 30 + [0] * 10, "facts_copy": [0] * 40}))
    one = one.model_copy(update={"vs": compare(dense, one, iters=10)})
    [standing] = standings(board_of(dense, one))
    assert list(standing.families) == ["facts_mc"]
    assert standing.kept is not None and standing.kept.value == pytest.approx(0.5)


def test_controls_decide_nothing(dense: Results, versus: Versus) -> None:
    tasks = {n: t.model_copy(update={"control": n == "facts_copy"}) for n, t in dense.tasks.items()}
    guarded = dense.model_copy(update={"tasks": tasks})
    [standing] = standings(board_of(guarded, versus("one", {"facts_copy": 40}, original=guarded)))
    assert "facts_copy" not in standing.families
    assert standing.kept is not None and standing.kept.value == 1


def test_a_control_that_fails_sorts_nobody_down(dense: Results, versus: Versus) -> None:
    tasks = {name: task.model_copy(update={"control": name == "facts_mc"}) for name, task in dense.tasks.items()}
    controlled = dense.model_copy(update={"tasks": tasks})
    orders = []
    for lost in ({}, {"facts_mc": 30}):
        [line] = lines(board_of(controlled, versus("one", lost, original=controlled)))
        [column] = [
            column for column in columns([line], [c.family for c in line.families]) if column.label[-7:] == "verdict"
        ]
        orders.append(column.cell(line).sort)
    assert "fails" in line.verdicts and orders[0] == orders[1]


def test_models_share_a_rank_unless_one_is_surely_better(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    models = [versus(f"m{lost}", {"facts_mc": lost}, sha=str(lost) * 64) for lost in (0, 1, 2, 30, 31)]
    [board] = collect([stored(tmp_path, [dense, *models])]).boards
    assert [(line.name, line.standing.rank) for line in lines(board)] == [
        ("m0", 1), ("m1", 1), ("m2", 1), ("m30", 4), ("m31", 4),
    ]  # fmt: skip


@pytest.mark.parametrize(("more", "ranks"), [(4, (1, 1)), (5, (1, 1)), (6, (1, 2)), (7, (1, 2))])
def test_few_answers_separate_two_models_as_in_the_exact_test(
    more: int, ranks: tuple[int, int], dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    # all one way, the exact p is 2 / 2^more: 0.125, 0.0625, 0.031, 0.016
    models = [versus(f"m{lost}", {"facts_mc": lost}, sha=str(lost) * 64) for lost in (2, 2 + more)]
    [board] = collect([stored(tmp_path, [dense, *models])]).boards
    assert tuple(line.standing.rank for line in lines(board)) == ranks


def test_a_family_is_judged_as_one(make_results: Callable[..., Results], stored: Store, tmp_path: Path) -> None:
    before = {"facts_trained": [1] * 60, "facts_question": [1] * 60}
    after = {"facts_trained": [1] * 60, "facts_question": [0] * 30 + [1] * 30}
    clusters = [f"c{i}" for i in range(60)]

    def one_family(results: Results) -> Results:
        tasks = {n: t.model_copy(update={"family": "closed book"}) for n, t in results.tasks.items()}
        return results.model_copy(update={"tasks": tasks})

    dense, one = (one_family(make_results(n, s, clusters)) for n, s in (("dense", before), ("one", after)))
    one = one.model_copy(update={"vs": compare(dense, one, iters=200)})
    [board] = collect([stored(tmp_path, [dense, one])]).boards
    [line] = lines(board)
    [cell] = line.families
    assert (cell.paired.n, cell.paired.clusters, cell.paired.delta) == (120, 60, -0.25)
    assert (cell.paired.verdict, cell.normalised, line.flips) == ("fails", 0.75, 0.25)
