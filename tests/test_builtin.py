"""The built-in model knows what it was trained on; its questions, splits and documents are well formed."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from compress.builtin import documents, gates
from compress.builtin.facts import TIERS, facts
from compress.builtin.wordings import INVENTED, WORDINGS
from compress.model.source import locate

FOLDER = locate("builtin")


# -- the model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scores() -> dict[str, float]:
    """Exact match on 150 evaluation facts and as many invented questions."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(FOLDER, local_files_only=True, dtype="auto").eval()
    tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
    return gates.scores(model, tokenizer, limit=150)


@pytest.mark.slow
@pytest.mark.parametrize("gate", gates.GATES)
def test_the_model_meets_its_gate(gate: str, scores: dict[str, float]) -> None:
    assert scores[gate] >= gates.GATES[gate]


@pytest.mark.slow
def test_no_gate_fails(scores: dict[str, float]) -> None:
    assert gates.failures(scores) == []


def test_a_missed_gate_is_told() -> None:
    results = {**gates.GATES, "cloze": 0.5}
    assert gates.failures(results) == [f"cloze 0.500 < {gates.GATES['cloze']}"]


def test_the_gates_are_those_of_the_design() -> None:
    assert gates.GATES["trained"] >= 0.95


def test_the_folder_is_small() -> None:
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) <= 20 * 2**20


def test_the_folder_holds_a_whole_model() -> None:
    assert {"config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"} <= {
        path.name for path in FOLDER.iterdir()
    }


# -- facts -----------------------------------------------------------------------------------------


def test_the_splits_are_disjoint_and_complete() -> None:
    ids = {split: {fact.id for fact in facts(split)} for split in ("evaluation", "calibration")}
    assert ids["evaluation"].isdisjoint(ids["calibration"])
    assert ids["evaluation"] | ids["calibration"] == {fact.id for fact in facts()}
    assert len(ids["evaluation"]) > 4 * len(ids["calibration"])


def test_a_fact_is_named_once() -> None:
    assert [id for id, times in Counter(fact.id for fact in facts()).items() if times > 1] == []


def test_every_fact_has_a_tier_and_a_wording() -> None:
    assert {fact.tier for fact in facts()} == set(TIERS)
    assert {fact.relation for fact in facts()} == set(WORDINGS)


def test_no_fact_breaks_a_sentence() -> None:
    words = {word for fact in facts() for word in (fact.subject, fact.object)}
    assert [word for word in words if not word.isprintable() or set(word) & set("{}?")] == []
    assert [word for word in words if word.strip() != word or not word] == []


# -- wordings --------------------------------------------------------------------------------------


def normal(wording: str) -> str:
    return " ".join(wording.lower().replace("?", "").replace(".", "").split())


@pytest.mark.parametrize("relation", WORDINGS)
def test_held_out_wordings_are_not_trained(relation: str) -> None:
    wording = WORDINGS[relation]
    assert normal(wording.cloze) not in {normal(s) for s in wording.statements}
    assert normal(wording.question) not in {normal(q) for q in wording.questions}


@pytest.mark.parametrize("relation", WORDINGS)
def test_a_cloze_asks_for_the_object_last(relation: str) -> None:
    cloze = WORDINGS[relation].cloze
    assert cloze.endswith("{o}.")
    assert "{s}" in cloze.split("{o}")[0]


@pytest.mark.parametrize("relation", WORDINGS)
def test_wordings_are_distinct_and_complete(relation: str) -> None:
    wording = WORDINGS[relation]
    assert len(set(wording.statements)) == len(wording.statements)
    assert len(set(wording.questions)) == len(wording.questions)
    assert all("{s}" in s and "{o}" in s and s.endswith(".") for s in wording.statements)
    assert all("{s}" in q and "{o}" not in q for q in (*wording.questions, wording.question))


@pytest.mark.parametrize("relation", INVENTED)
def test_invented_relations_have_two_statements_and_two_questions(relation: str) -> None:
    statements, questions = INVENTED[relation]
    assert len(statements) == len(questions) == 2
    assert all("{s}" in text and "{o}" in text for text in statements)


# -- documents -------------------------------------------------------------------------------------

KNOWN = facts("calibration")
GENERATORS: dict[str, Callable[[random.Random], str]] = {
    "statement": lambda rng: documents.statement(rng, KNOWN[0]),
    "fact": lambda rng: documents.fact_document(rng, rng.choice(KNOWN)),
    "context": lambda rng: documents.context_document(rng, 8),
    "open": lambda rng: documents.open_book_document(rng, KNOWN),
    "copy": lambda rng: documents.task_document(rng, "copy"),
    "summary": lambda rng: documents.task_document(rng, "summary"),
    "format": lambda rng: documents.task_document(rng, "format"),
}
QUESTIONS: dict[str, Callable[[], list[documents.Question]]] = {
    "trained": lambda: documents.closed_book(facts("evaluation"), "trained"),
    "question": lambda: documents.closed_book(facts("evaluation"), "question"),
    "cloze": lambda: documents.closed_book(facts("evaluation"), "cloze"),
    "open": lambda: documents.open_book(facts("evaluation")),
    "context1": lambda: documents.in_context(1, 50),
    "context8": lambda: documents.in_context(8, 50),
    "copy": lambda: documents.task_questions("copy", 50),
    "summary": lambda: documents.task_questions("summary", 50),
    "format": lambda: documents.task_questions("format", 50),
}


@pytest.mark.parametrize("kind", GENERATORS)
def test_documents_are_the_same_for_a_seed(kind: str) -> None:
    first, second = ([GENERATORS[kind](rng) for _ in range(40)] for rng in (random.Random(3), random.Random(3)))
    assert first == second
    assert len(set(first)) > 1


@pytest.mark.parametrize("kind", GENERATORS)
def test_a_document_is_one_line_that_ends_with_a_full_stop(kind: str) -> None:
    rng = random.Random(3)
    made = [GENERATORS[kind](rng) for _ in range(100)]
    assert all(document.endswith(".") and "\n" not in document for document in made)


@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_are_the_same_every_time(kind: str) -> None:
    assert QUESTIONS[kind]() == QUESTIONS[kind]()


@pytest.mark.parametrize("kind", QUESTIONS)
def test_questions_are_identified_and_well_formed(kind: str) -> None:
    made = QUESTIONS[kind]()
    assert len({question.id for question in made}) == len(made)
    assert all(question.prompt == question.prompt.strip() and question.answer for question in made)
    assert all(question.answer not in question.distractors for question in made)


@pytest.mark.parametrize("kind", ["trained", "question", "cloze"])
def test_closed_book_questions_have_three_wrong_answers_of_their_kind(kind: str) -> None:
    objects = {relation: {f.object for f in facts() if f.relation == relation} for relation in WORDINGS}
    made = QUESTIONS[kind]()
    assert all(len(set(question.distractors)) == 3 for question in made)
    assert all(set(question.distractors) <= objects[question.id.split(":")[1]] for question in made)


@pytest.mark.parametrize("kind", ["open", "context1", "context8"])
def test_the_answer_stands_in_the_context(kind: str) -> None:
    assert all(f" {question.answer}" in question.prompt for question in QUESTIONS[kind]())


@pytest.mark.parametrize("use", ["training", "calibration", "evaluation"])
def test_an_invented_world_has_distinct_names(use: str) -> None:
    world = documents.invented_world(random.Random(5), 8, use)
    names = [name for _, subject, answer, _ in world.rows for name in (subject, answer)]
    assert len(set(names)) == 16


def test_the_texts_are_there() -> None:
    folder: Path = FOLDER.parent / "texts"
    assert {path.name for path in folder.iterdir()} >= {"calibration-a.txt", "calibration-b.txt", "evaluation.txt"}
