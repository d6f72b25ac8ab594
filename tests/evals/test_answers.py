"""Scores of short answers: empty, tiny or repeated output scores nothing, right answers do."""

from __future__ import annotations

import pytest

from compress_evals.metrics.answers import contains, exact_match, f1, fold, normalise
from compress_evals.metrics.text import degenerate, distinct, longest_loop

GOLDS = ["Paris", "the euro", "J. R. R. Tolkien", "48", "He", "Eiffel Tower", "e", "The"]


@pytest.mark.parametrize("said", ["", " ", "....", "the", "The a an", "\n", "?!"])
def test_empty_answers_never_score(said: str) -> None:
    assert not exact_match(said, GOLDS)
    assert not contains(said, GOLDS)
    assert f1(said, GOLDS) == 0.0


@pytest.mark.parametrize("said", ["e", "s", "on", "Par", "aris", "tower of"])
def test_pieces_of_an_answer_are_not_the_answer(said: str) -> None:
    golds = ["Paris", "Tower", "Onslow", "seas"]
    assert not exact_match(said, golds)
    assert not contains(said, ["Paris", "Towers", "Onslow", "seas"])


def test_normalising_ignores_case_articles_punctuation_and_width() -> None:
    assert normalise("  The  Euro! ") == "euro"
    assert exact_match("J.R.R. Tolkien", ["J. R. R. Tolkien"]) == (normalise("J.R.R. Tolkien") == "j r r tolkien")
    assert exact_match("ＰＡＲＩＳ", ["Paris"])
    assert exact_match("42", ["forty-two", "42"])
    assert fold("Brasília") == "Brasilia"


def test_containment_needs_whole_words_and_three_letters() -> None:
    assert contains("It is Paris, of course", ["Paris"])
    assert not contains("It is Parisian", ["Paris"])
    assert not contains("He was there", ["He"])
    assert contains("He", ["He"])
    assert contains("The Eiffel Tower stands", ["Eiffel Tower"])


def test_f1_is_the_best_overlap_over_aliases() -> None:
    assert f1("Mark Twain", ["Samuel Clemens", "Mark Twain"]) == 1.0
    assert f1("Republic of Congo", ["Republic of the Congo"]) == 1.0
    assert f1("Congo", ["Republic of the Congo"]) == pytest.approx(2 * 1 / (1 + 3))
    assert f1("Congo", []) == 0.0


def test_loops_are_degenerate_and_answers_are_not() -> None:
    assert degenerate("the the the the")
    assert degenerate("is one of the is one of the is one of the is one of the")
    assert degenerate("nananananananana")
    assert degenerate(", , , ,")
    for answer in ["Papua New Guinea", "the euro", "1000000", "Begisun, Dupas, Rifor", "Bora Bora", ""]:
        assert not degenerate(answer)


def test_loops_and_variety_are_counted() -> None:
    assert longest_loop("a b a b a b c") == 3
    assert longest_loop("") == 0
    assert distinct("a b a b", 2) == pytest.approx(2 / 3)
    assert distinct("a", 2) == 1.0
