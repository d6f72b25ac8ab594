"""The task files load in plain lm-eval, ask only evaluation facts, and give no score for NaN or ties."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
from transformers import AutoTokenizer

from compress.builtin.facts import facts
from compress.model.source import locate
from compress_evals.run import load_tasks
from compress_evals.suite import FACTS, FEWEST_TOKENS
from compress_evals.tasks.facts.functions import generated, greedy_match, questions, strict_choice

CHOICE = {"gold": 1}


@pytest.fixture(scope="module")
def tasks() -> Iterator[dict[str, Any]]:
    yield load_tasks()


@pytest.mark.slow
def test_the_suite_is_the_group(tasks: dict[str, Any]) -> None:
    assert list(tasks) == [task.name for task in FACTS.tasks]


def test_every_task_file_is_read_by_plain_lm_eval() -> None:
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(FACTS.folder), include_defaults=False)
    files = {path.stem for path in FACTS.folder.glob("*.yaml") if path.stem != "_base"}
    assert files == set(manager.all_tasks)
    assert manager.load(["facts_context"])["group_map"] == {
        "facts_context": ["facts_context1", "facts_context3", "facts_context8"]
    }


def test_sizes_and_headline_metrics(tasks: dict[str, Any]) -> None:
    table = len(facts("evaluation"))
    sizes = {"facts_context1": 400, "facts_context3": 400, "facts_context8": 400, "facts_generate": 100}
    sizes |= {"facts_long": 400, "facts_copy": 400, "facts_summary": 400, "facts_format": 400}
    assert {name: len(task.eval_docs) for name, task in tasks.items()} == {
        task.name: sizes.get(task.name, table) for task in FACTS.tasks
    }
    assert all(task.headline in tasks[task.name].higher_is_better() for task in FACTS.tasks)


def test_no_calibration_fact_is_asked(tasks: dict[str, Any]) -> None:
    kept = {fact.id for fact in facts("calibration")}
    for name in ("facts_trained", "facts_question", "facts_cloze", "facts_mc", "facts_open", "facts_generate"):
        asked = {document["id"].partition(":")[2] for document in tasks[name].eval_docs}
        assert asked and not asked & kept


def test_documents_become_prompt_and_target(tasks: dict[str, Any]) -> None:
    document = tasks["facts_trained"].eval_docs[0]
    assert tasks["facts_trained"].doc_to_text(document) == document["prompt"]
    assert tasks["facts_trained"].doc_to_target(document) == f" {document['answer']}."
    assert document["prompt"].endswith("Answer:")


def test_choices_hold_the_answer_once_and_not_always_first(tasks: dict[str, Any]) -> None:
    documents = list(tasks["facts_mc"].eval_docs)
    assert all(len(set(document["choices"])) == 4 for document in documents)
    assert all(document["choices"][document["gold"]] == f"{document['answer']}." for document in documents)
    assert {document["gold"] for document in documents} == {0, 1, 2, 3}


def test_a_choice_must_win_strictly_and_be_finite() -> None:
    scores = {
        "right": [-3.0, -1.0, -2.0, -9.0],
        "wrong": [-0.5, -1.0, -2.0, -9.0],
        "tie": [-1.0, -1.0, -2.0, -9.0],
        "nan": [math.nan] * 4,
        "nan elsewhere": [math.nan, -1.0, -2.0, -9.0],
        "infinite": [-math.inf] * 4,
        "infinite gold": [-3.0, math.inf, -2.0, -9.0],
    }
    found = {case: strict_choice(CHOICE, [(score, False) for score in row])["acc"] for case, row in scores.items()}
    assert found == dict.fromkeys(scores, 0.0) | {"right": 1.0}


def test_who_knows_nothing_gets_what_the_choices_call_chance(tasks: dict[str, Any]) -> None:
    """By summed likelihood a model without knowledge takes the choice of fewest tokens; of several, any."""
    tokenizer = AutoTokenizer.from_pretrained(locate("builtin"))
    won = 0.0
    documents = list(tasks["facts_mc"].eval_docs)
    for document in documents:
        lengths = [len(tokenizer(f" {choice}", add_special_tokens=False).input_ids) for choice in document["choices"]]
        shortest = [i for i, length in enumerate(lengths) if length == min(lengths)]
        won += (document["gold"] in shortest) / len(shortest)
    assert won / len(documents) == pytest.approx(FEWEST_TOKENS, abs=5e-4)
    assert next(task.chance for task in FACTS.tasks if task.name == "facts_mc") == FEWEST_TOKENS


def test_lm_eval_uses_the_strict_choice(tasks: dict[str, Any]) -> None:
    document = tasks["facts_mc"].eval_docs[0]
    assert tasks["facts_mc"].process_results(document, [(math.nan, False)] * 4) == {"acc": 0.0}


def test_greedy_match_needs_a_finite_likelihood() -> None:
    assert greedy_match({}, [(-0.1, True)]) == {"acc": 1.0}
    assert greedy_match({}, [(-0.1, False)]) == {"acc": 0.0}
    assert greedy_match({}, [(math.nan, True)]) == {"acc": 0.0}


def test_generated_answers_are_scored_and_collapse_is_seen() -> None:
    document = {"answer": "Paris"}
    assert generated(document, [" Paris"]) == {"em": 1, "contains": 1, "f1": 1, "valid": 1, "degenerate": 0}
    assert generated(document, [""]) == {"em": 0, "contains": 0, "f1": 0, "valid": 0, "degenerate": 0}
    assert generated(document, [" of of of of of"]) == {"em": 0, "contains": 0, "f1": 0, "valid": 1, "degenerate": 1}


def test_unknown_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="no questions of kind 'riddle'"):
        questions("riddle")
    with pytest.raises(ValueError, match="context"):
        questions("context", n=3)


def test_a_smaller_sample_is_the_beginning_of_a_larger_one() -> None:
    assert questions("trained", n=10) == questions("trained", n=40)[:10]
