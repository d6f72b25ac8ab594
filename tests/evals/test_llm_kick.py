"""The LLM-KICK findings: cells are identified by their recipes, tasks are pooled, and each rule can hold or fail."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compress_evals.comparison import compare
from compress_evals.leaderboard.collect import Board, Entry, collect
from compress_evals.llm_kick import Cells, criteria, decided, eight_bits, findings, markdown, samples
from compress_evals.results import Results, save

N = 200
Make = Callable[..., Results]


def scores(kept: float) -> dict[str, list[int]]:
    """Facts answered to a share, choices and passages always."""
    right = round(N * kept)
    recall = [1] * right + [0] * (N - right)
    return {"facts_trained": recall, "facts_mc": [1] * N, "facts_open": [1] * N}


def families(results: Results) -> Results:
    names = {"facts_trained": "closed book", "facts_mc": "choice", "facts_open": "open book"}
    tasks = {name: task.model_copy(update={"family": names[name]}) for name, task in results.tasks.items()}
    return results.model_copy(update={"tasks": tasks})


@pytest.fixture
def board(make_results: Make, tmp_path: Path) -> Board:
    """A curve of magnitude that knows everything to 30 % and half from 40 %, and 2:4 that knows a tenth."""
    dense = families(make_results("dense", scores(1.0)))
    save(dense, tmp_path / "dense")
    levels = {0.1: 1.0, 0.2: 1.0, 0.3: 1.0, 0.4: 0.5, 0.5: 0.5, "2:4": 0.1}
    for setting, kept in levels.items():
        recipe = f'passes:\n  - magnitude: {{sparsity: "{setting}"}}\n' if isinstance(setting, str) else (
            f"passes:\n  - magnitude: {{sparsity: {setting}}}\n"
        )  # fmt: skip
        made = families(make_results(f"magnitude {setting}", scores(kept), recipe=recipe))
        save(made.model_copy(update={"vs": compare(dense, made)}), tmp_path / f"c-{setting}".replace(":", "of"))
    return collect([tmp_path]).boards[0]


def test_a_curve_is_found_by_recipes_and_says_how_far_it_matches(board: Board) -> None:
    cells = Cells(board)
    assert [level.setting for level in cells.curve("magnitude")] == [0.1, 0.2, 0.3, 0.4, 0.5]
    assert cells.reach("magnitude", ["facts_trained"]) == (0.3, 0.4)
    assert cells.reach("magnitude", ["facts_mc"]) == (0.5, None)
    assert cells.at("magnitude", "2:4") is not None and cells.at("wanda", 0.5) is None


def test_another_seed_is_no_other_level(board: Board) -> None:
    def reseeded(entry: Entry) -> Entry:
        recipe = f"{entry.results.model.recipe}calibration: {{seed: 1}}\n"
        model = entry.results.model.model_copy(update={"recipe": recipe})
        return replace(entry, results=entry.results.model_copy(update={"model": model}))

    twice = Cells(replace(board, compressed=(*map(reseeded, board.compressed), *board.compressed)))
    assert twice.levels == Cells(board).levels


def test_merged_lines_count_whatever_their_first_seed(board: Board) -> None:
    def merged(entry: Entry) -> Entry:
        recipe = f"{entry.results.model.recipe}calibration: {{seed: 1}}\n"
        model = entry.results.model.model_copy(update={"recipe": recipe})
        return replace(entry, results=entry.results.model_copy(update={"model": model}), runs=(entry, entry))

    together = replace(board, compressed=tuple(map(merged, board.compressed)))
    assert Cells(together).levels.keys() == Cells(board).levels.keys()


def test_a_board_without_closed_book_leaves_its_findings_open(board: Board, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cells, "tasks", lambda self, families: [])
    cells = Cells(board)
    assert not eight_bits(cells).measured and not criteria(cells).measured and not samples(cells).measured


def test_a_family_that_fails_is_not_said_to_hold_where_bits_are_not_known(board: Board) -> None:
    [finding] = [finding for finding in findings(board) if finding.title == "Perplexity hides what was lost"]
    assert finding.measured == ("magnitude: closed book matches to 30%, fails from 40%",)
    assert finding.verdict == "cannot be told"


def test_findings_follow_their_rules(board: Board) -> None:
    verdicts = {finding.title: finding.verdict for finding in findings(board)}
    assert verdicts["Closed-book questions fail early"] == "holds"
    assert verdicts["N:M patterns never match"] == "holds"
    assert verdicts["Multiple choice breaks later than recall"] == "holds"
    assert verdicts["Wanda and SparseGPT beat magnitude"] == "cannot be told"


def test_the_page_has_a_row_and_a_section_for_each_finding(board: Board) -> None:
    found = findings(board)
    page = markdown(found)
    assert page.count("\n| ") >= len(found) and page.count("### ") == len(found)
    assert "-50.0 points" in page or "fails from 40%" in page


def test_a_rule_holds_in_part_if_some_cases_say_so() -> None:
    assert [decided(case) for case in ([], [True], [True, False], [False])] == [
        "cannot be told", "holds", "holds in part", "does not hold"
    ]  # fmt: skip
