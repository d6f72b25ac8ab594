"""Summaries are scored as by the `rouge_score` package, and empty, random or copied text gains nothing."""

from __future__ import annotations

import random

import pytest

from compress_evals.metrics import summaries
from compress_evals.metrics.text import longest_repeat, repetitive, says_something, words

SOURCE = (
    "The harbour of Port Merrow was closed on Tuesday after 14 boats broke loose in a storm. Anna Vell, who leads the "
    "coast guard, said that the damage would cost 1,200,000 crowns. Nobody was hurt. The town's mayor, Tom Harrow, "
    "asked the Marine Office for help and promised that ferries to Saint Iva would run again within 3 days."
)
REFERENCE = "Port Merrow's harbour is closed after 14 boats broke loose. Anna Vell says damage costs 1,200,000 crowns."
GOOD = "A storm closed the harbour of Port Merrow; 14 boats broke loose. Anna Vell puts the damage at 1,200,000 crowns."
NOTHING = ["", "....", "the", " \n", "?!", "the the a"]


@pytest.fixture
def rouge() -> object:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rougeL"], use_stemmer=True)


def sentences(n: int) -> list[tuple[str, str]]:
    rng, vocabulary = random.Random(0), [*words(SOURCE), *words(GOOD), "running", "runs", "boat", "Zürich", "don't"]
    texts = [" ".join(rng.choices(vocabulary, k=rng.randint(1, 90))) for _ in range(2 * n)]
    return list(zip(texts[::2], texts[1::2], strict=True))


@pytest.mark.parametrize(("said", "wanted"), [(GOOD, REFERENCE), (SOURCE, REFERENCE), *sentences(40)])
def test_rouge_is_that_of_the_package(rouge: object, said: str, wanted: str) -> None:
    theirs = rouge.score(wanted, said)  # type: ignore[attr-defined]
    assert summaries.rouge_1(said, wanted) == pytest.approx(theirs["rouge1"].fmeasure)
    assert summaries.rouge_l(said, wanted) == pytest.approx(theirs["rougeL"].fmeasure)


def test_common_subsequence_of_nothing() -> None:
    assert summaries.common_subsequence([], ["a"]) == summaries.common_subsequence(["a"], []) == 0


@pytest.mark.parametrize("said", NOTHING)
def test_saying_nothing_scores_nothing(said: str) -> None:
    assert set(summaries.summary_scores(said, REFERENCE, SOURCE).values()) == {0.0}


@pytest.mark.parametrize("said", ["e", "of of of of", "lorem ipsum dolor sit amet", "qzx vw jk " * 30])
def test_noise_scores_almost_nothing(said: str) -> None:
    found = summaries.summary_scores(said, REFERENCE, SOURCE)
    assert max(found[name] for name in ("rouge_l", "entity_recall", "entity_precision", "number_precision")) < 0.02


def test_names_are_runs_of_capitals_within_sentences() -> None:
    assert summaries.names(REFERENCE) == {"port merrow", "anna vell"}
    assert summaries.names("He met Jean-Luc O'Hara. NEW: It rained, I think. (CNN)") == {"jean-luc o'hara", "cnn"}


def test_numbers_are_digits() -> None:
    assert summaries.numbers(SOURCE) == {"14", "1200000", "3"}
    assert summaries.numbers("at 10:30, 2.5 of 1,000.") == {"10:30", "2.5", "1000"}


def test_facts_kept_and_invented_are_told_apart() -> None:
    assert summaries.entity_recall(GOOD, REFERENCE) == 1
    assert summaries.entity_recall("Port Merrow is closed.", REFERENCE) == pytest.approx(1 / 4)
    invented = "Anna Vell and Boris Krane lost 14 boats and 99 crowns."
    assert summaries.entity_precision(invented, SOURCE) == summaries.number_precision(invented, SOURCE) == 0.5


def test_precision_is_not_won_by_naming_nothing() -> None:
    assert summaries.entity_precision("it was bad", SOURCE) == summaries.number_precision("it was bad", SOURCE) == 0


def test_copying_is_seen() -> None:
    assert summaries.copy_rate(SOURCE, SOURCE) == 1
    assert summaries.longest_copy(SOURCE, SOURCE) == len(words(SOURCE))
    assert summaries.longest_copy("so 14 boats broke loose today", SOURCE) == 4
    # of "w x 14 boats broke loose" one of three phrases of four words stands in the source
    assert summaries.copy_rate("w x 14 boats broke loose", SOURCE) == pytest.approx(1 / 3)
    assert summaries.copy_rate("boats broke", SOURCE) == 0


def test_length_ratio_and_variety() -> None:
    assert summaries.length_ratio("one two three", "one two") == 1.5
    scores = summaries.summary_scores("port merrow port merrow port", REFERENCE, SOURCE)
    assert scores["distinct_2"] == 0.5
    assert scores["length_ratio"] == pytest.approx(5 / len(words(REFERENCE)))


def test_agreement_is_with_the_dense_text() -> None:
    assert summaries.agreement(GOOD, GOOD) == summaries.agreement("", "") == 1
    assert summaries.agreement(GOOD, "") == summaries.agreement("", GOOD) == 0
    # three of four words in order: 2 * 3 / (4 + 4)
    assert summaries.agreement("boats broke loose today", "boats broke loose yesterday") == 0.75


@pytest.mark.parametrize(
    ("text", "something"),
    [("", False), ("....", False), ("the", False), ("e e e e e", False), ("***", False), ("no no, NO!", False),
     ("My answer is no.", True), ("{1: 2, 3: 4}", True), ("你好吗", True), ("สวัสดี", True)],
)  # fmt: skip
def test_something_is_three_different_words(text: str, something: bool) -> None:
    assert says_something(text) is something


def test_the_longest_phrase_said_twice() -> None:
    assert longest_repeat("a b c d") == 0
    assert longest_repeat("a b c x a b c y b c") == 3
    assert longest_repeat("go go go go") == 3


def test_stuck_texts_are_repetitive_and_tables_are_not() -> None:
    assert repetitive("the boats are gone and " * 10)
    assert not repetitive(SOURCE)
    assert not repetitive("| a | b |\n|---|---|\n" + "-" * 80 + "\none two three four five six seven eight")
    assert not repetitive("") and not repetitive("a a a")
