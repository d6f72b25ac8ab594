"""Recorded answers (choices, targets, generated text), and the examples of flips that are shown."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from compress_evals import examples as showing
from compress_evals.answers import said
from compress_evals.cache import Cache
from compress_evals.comparison import compare
from compress_evals.examples import ended, examples, flips, shown, some, spoken
from compress_evals.questions import Exam, prepare
from compress_evals.results import Results, Row
from compress_evals.run import measure
from compress_evals.subject import Subject
from compress_evals.suite import FACTS

TASKS = ["facts_trained", "facts_mc", "facts_generate"]


@pytest.fixture(scope="module")
def exam(tokenizer: Any) -> Exam:
    """The questions that the tiny model has learned come first in the file."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("compress_evals.questions.subset", lambda documents, limit, seed: list(range(limit)))
        return prepare(FACTS, tokenizer, only=TASKS, limit=16)


def subject(model: Any, name: str = "tiny", identity: str | None = None) -> Subject:
    return Subject(name, lambda: model, device="cpu", identity=identity)


@pytest.fixture(scope="module")
def dense(model: Any, exam: Exam) -> Results:
    return spoken(subject(model), measure(subject(model), exam, 8), exam, None)


@pytest.fixture(scope="module")
def broken(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[1].mlp.down_proj.weight.zero_()
        other.model.layers[0].mlp.down_proj.weight.mul_(0.3)
    return other


@pytest.mark.slow
def test_a_right_answer_says_the_target_and_a_wrong_one_something_else(dense: Results, exam: Exam) -> None:
    [asked, *_] = exam.tasks
    rows = dense.rows["facts_trained"]
    right = [i for i, row in enumerate(rows) if row.scores["acc"]]
    assert 0 < len(right) < len(rows)
    for i, row in enumerate(rows):
        assert (row.said == str(asked.document(i)["target"]).strip()) == (i in right)


def test_the_choice_said_is_the_likeliest(dense: Results, exam: Exam) -> None:
    asked = exam.tasks[1]
    for i, row in enumerate(dense.rows["facts_mc"]):
        document = asked.document(i)
        assert row.said in document["choices"]
        assert (row.said == document["choices"][document["gold"]]) == (row.scores["acc"] == 1)


def test_scores_that_are_not_finite_say_nothing(exam: Exam) -> None:
    loaded, document = exam.tasks[1].loaded, exam.tasks[1].document(0)
    assert said([(math.nan, False)] * 4, document, loaded) == ""
    assert said([(-3.0, False), (-1.0, False), (-2.0, False), (-9.0, True)], document, loaded) == document["choices"][1]


def test_what_is_said_is_what_greedy_decoding_says(dense: Results, model: Any, exam: Exam) -> None:
    asked, tokenizer = exam.tasks[0], exam.tokenizer
    wrong = [i for i, row in enumerate(dense.rows["facts_trained"]) if not row.scores["acc"]]
    for i in wrong[:4]:
        ids = tokenizer(asked.prompt(i), return_tensors="pt").input_ids
        with torch.inference_mode():
            out = model.generate(ids, max_new_tokens=60, do_sample=False)[0, ids.shape[1] :]
        text = str(dense.rows["facts_trained"][i].said)
        assert text and tokenizer.decode(out, skip_special_tokens=True).strip().startswith(text)


def test_an_answer_ends_with_its_sentence() -> None:
    assert ended(" Paris. Question: what", " Rome.") == "Paris."
    assert ended(" .fr. Question: what", " .it.") == ".fr."
    assert ended(" St. Louis. Question: what", " St. Paul.") == "St. Louis."
    assert ended(" never ending", " Rome.") == "never ending"


def test_flips_are_chosen_by_the_hash_of_their_ids_alone() -> None:
    rows = [Row(id=f"t:{i}", cluster="", hash="", scores={"acc": 1.0}) for i in range(60)]
    worse = [row.model_copy(update={"scores": {"acc": 0.0}}) for row in rows]
    lost, gained = flips(rows, worse, "acc")
    assert (len(lost), gained) == (showing.SHOWN, ())
    assert flips(worse, rows, "acc") == ((), lost)
    assert lost == some(reversed([row.id for row in rows])) != tuple(f"t:{i}" for i in range(20))


def test_examples_show_both_answers_beside_what_was_wanted(dense: Results, broken: Any, exam: Exam) -> None:
    other = measure(subject(broken), exam, 8)
    chosen = shown(dense, other)
    ids = {name: (*lost, *gained) for name, (lost, gained) in chosen.items()}
    spoke = spoken(subject(broken), other, exam, None, ids)
    found = examples(dense, spoke, chosen, exam)
    lost, _ = found["facts_trained"]
    assert lost
    for example in lost:
        i = [row.id for row in dense.rows["facts_trained"]].index(example.id)
        assert exam.tasks[0].prompt(i).endswith(example.prompt) and len(example.prompt) <= showing.PROMPT
        assert example.dense == f"{example.wanted}." != example.compressed
    comparison = compare(dense, spoke, examples=found)
    assert comparison.tasks["facts_trained"].lost == lost
    assert comparison.tasks["facts_mc"].disagreement is not None
    silent = [row for row in spoke.rows["facts_trained"] if row.said is None]
    assert len(silent) == sum(row.said is None for row in other.rows["facts_trained"]) - len(lost)


@pytest.mark.slow
def test_what_was_said_is_stored(model: Any, exam: Exam, tmp_path: Path, dense: Results) -> None:
    first = subject(model, identity="a")
    results = measure(first, exam, 8, Cache(tmp_path))
    assert spoken(first, results, exam, Cache(tmp_path)).rows == dense.rows

    def refused() -> Any:
        raise AssertionError("the model was loaded")

    stored = Subject("tiny", refused, device="cpu", identity="a")
    assert spoken(stored, measure(stored, exam, 8, Cache(tmp_path)), exam, Cache(tmp_path)).rows == dense.rows
