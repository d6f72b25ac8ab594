"""Results are paired with the dense result they were compared with, or refused, naming the difference."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from compress.errors import ArtifactError
from compress_evals.leaderboard.collect import collect
from compress_evals.leaderboard.facts import told_apart
from compress_evals.results import Data, Results, save

Store = Callable[[Path, Sequence[Results]], Path]
Versus = Callable[..., Results]
Cell = Callable[..., None]


def test_dense_results_found_several_times_are_one(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    stored(tmp_path / "a", [dense.model_copy(update={"noise": {}}), versus("one", {"facts_mc": 3})])
    stored(tmp_path / "b", [dense, versus("two", {"facts_mc": 5})])
    [board] = collect([tmp_path / "a", tmp_path / "b"]).boards
    assert [entry.name for entry in board.compressed] == ["one", "two"]
    assert board.dense.results.noise == dense.noise
    assert board.dense.results.rows == {}
    assert board.compressed[0].scores["facts_mc"].sum() == 37


def test_overlapping_paths_and_copies_count_once(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    one = versus("one", {"facts_mc": 3}, sha="1" * 64)
    stored(tmp_path / "a", [dense, one])
    stored(tmp_path / "b", [dense, one])
    [board] = collect([tmp_path, tmp_path / "a", tmp_path / "a" / "r1" / "results.json"]).boards
    assert [entry.name for entry in board.compressed] == ["one"]


def test_one_name_for_different_models_is_told_apart_by_place(
    dense: Results, versus: Versus, stored: Store, tmp_path: Path
) -> None:
    stored(tmp_path / "cells" / "seed-0", [dense, versus("wanda", {"facts_mc": 3}, sha="1" * 64)])
    stored(tmp_path / "cells" / "seed-1", [dense, versus("wanda", {"facts_mc": 4}, sha="2" * 64)])
    [board] = collect([tmp_path]).boards
    assert [entry.name for entry in board.compressed] == ["wanda (seed-0)", "wanda (seed-1)"]


def test_another_protocol_is_another_board(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    other = dense.model_copy(update={"engine": dense.engine.model_copy(update={"batch_size": 8})})
    stored(tmp_path / "a", [dense, versus("one", {}), versus("two", {})])
    stored(tmp_path / "b", [other, versus("one", {}, original=other)])
    collection = collect([tmp_path])
    assert [len(board.compressed) for board in collection.boards] == [2, 1]
    assert told_apart(collection) == [[("batch size", "64")], [("batch size", "8")]]


def test_another_margin_is_another_board(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    stored(tmp_path, [dense, versus("one", {}), versus("two", {}, changes={"margin": 0.1})])
    assert sorted(board.margin for board in collect([tmp_path]).boards) == [0.05, 0.1]


def test_what_fits_no_dense_result_is_refused_with_the_difference(
    dense: Results, versus: Versus, stored: Store, make_results: Callable[..., Results], tmp_path: Path
) -> None:
    one = versus("one", {"facts_mc": 3})
    engine = one.engine.model_copy(update={"batch_size": 8})
    data = Data(source="hub", name="x", sha256="0")
    hub = {name: task.model_copy(update={"data": data}) for name, task in one.tasks.items()}
    newer = {name: task.model_copy(update={"version": "9"}) for name, task in one.tasks.items()}
    better = make_results("dense", {task: [1.0] * 39 + [0.0] for task in one.tasks})
    cases = {
        "batch_size: 64 and 8": [dense, one.model_copy(update={"engine": engine})],
        "facts_trained: different questions": [dense, one.model_copy(update={"tasks": newer})],
        "questions from built in and from hub": [dense, one.model_copy(update={"tasks": hub})],
        "another measurement of the dense model": [better, one],
        "no dense result of that name": [one],
    }
    for i, (words, results) in enumerate(cases.items()):
        folder = stored(tmp_path / str(i), results)
        with pytest.raises(ArtifactError, match=words):
            collect([folder])


def test_unreadable_results_are_one_line(dense: Results, versus: Versus, stored: Store, tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="no such folder"):
        collect([tmp_path / "missing"])
    with pytest.raises(ArtifactError, match=r"holds no results\.json"):
        collect([tmp_path])
    stored(tmp_path, [dense, versus("one", {})])
    (tmp_path / "r1" / "results.json").write_text("{", encoding="utf-8")
    with pytest.raises(ArtifactError, match="not readable as JSON") as caught:
        collect([tmp_path])
    assert "\n" not in str(caught.value)


def test_failed_cells_stand_on_the_board_of_their_model(
    dense: Results, versus: Versus, stored: Store, cell: Cell, tmp_path: Path
) -> None:
    other = dense.model_copy(update={"model": dense.model.model_copy(update={"name": "other"})})
    stored(tmp_path / "a", [dense, versus("one", {}), versus("two", {})])
    stored(tmp_path / "b", [other, versus("one", {}, original=other)])
    cell(tmp_path / "c", model="/models/other", id="failed")
    cell(tmp_path / "d", model="third", id="elsewhere")
    cell(tmp_path / "e", status="done", error=None)
    collection = collect([tmp_path])
    assert [[c.id for c in board.failed] for board in collection.boards] == [[], ["failed"]]
    assert [c.id for c in collection.unplaced] == ["elsewhere"]


def test_a_malformed_cell_is_refused(cell: Cell, tmp_path: Path) -> None:
    cell(tmp_path / "c", status="unsure")
    with pytest.raises(ArtifactError, match=r"cell\.json: status"):
        collect([tmp_path])
    (tmp_path / "c" / "cell.json").write_text(json.dumps([]), encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"cell\.json"):
        collect([tmp_path])


def test_rows_that_are_not_its_own_are_refused(dense: Results, versus: Versus, tmp_path: Path) -> None:
    one = versus("one", {})
    save(dense, tmp_path / "dense")
    save(one, tmp_path / "one")
    save(one.model_copy(update={"rows": {**one.rows, "facts_mc": one.rows["facts_mc"][:5]}}), tmp_path / "one")
    with pytest.raises(ArtifactError, match="do not belong"):
        collect([tmp_path])
