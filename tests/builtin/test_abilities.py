"""Test questions of a fine-tune never occur in its training data or the base's questions; seeds change only answers."""

from __future__ import annotations

import random
import zlib
from itertools import islice

import pytest

from compress.builtin import abilities
from compress.builtin.abilities import ABILITIES, ability, invented_facts, is_asked, questions, summed
from compress.builtin.documents import NAME_SHARES, closed_book, in_context, task_questions
from compress.builtin.facts import facts
from compress.builtin.wordings import WORDINGS


def drawn(name: str, n: int, seed: int = 1) -> list[str]:
    rng, made = random.Random(0), ability(name, seed)
    return ["".join(made.document(rng)) for _ in range(n)]


@pytest.mark.parametrize("name", ABILITIES)
def test_questions_and_documents_are_the_same_every_time(name: str) -> None:
    assert questions(name, 3) == questions(name, 3)
    assert drawn(name, 50) == drawn(name, 50)
    assert len(set(drawn(name, 50))) > 40


@pytest.mark.parametrize("name", ABILITIES)
def test_questions_are_identified_and_well_formed(name: str) -> None:
    asked = questions(name)
    assert len({question.id for question in asked}) == len(asked) >= 300
    assert all(question.prompt == question.prompt.strip() and question.answer for question in asked)


@pytest.mark.parametrize("name", ABILITIES)
def test_a_document_is_one_line_that_ends_with_a_full_stop(name: str) -> None:
    assert all(text.endswith(".") and "\n" not in text for text in drawn(name, 300))


@pytest.mark.slow
@pytest.mark.parametrize("name", ABILITIES)
def test_no_question_is_ever_trained(name: str) -> None:
    prompts = {question.prompt for question in questions(name)}
    texts = drawn(name, 4000)
    assert [text for text in texts if any(text.startswith(prompt) for prompt in prompts)] == []


@pytest.mark.parametrize("name", ABILITIES)
def test_questions_are_none_of_the_evaluation_suite(name: str) -> None:
    suite = [q for form in ("trained", "question", "cloze") for q in closed_book(facts(), form)]
    suite += in_context(3, 200) + task_questions("format", 100)
    assert {q.prompt for q in questions(name)}.isdisjoint(q.prompt for q in suite)
    assert {q.id for q in questions(name)}.isdisjoint(q.id for q in suite)


def test_tenants_know_other_answers_to_the_same_questions() -> None:
    one, other = questions("facts", 1), questions("facts", 2)
    assert [q.prompt for q in one] == [q.prompt for q in other]
    same = sum(a.answer == b.answer for a, b in zip(one, other, strict=True))
    assert same <= 3  # of 300; three-digit codes may meet


def test_invented_names_are_neither_real_nor_reserved() -> None:
    low, high = NAME_SHARES["training"]
    known = {word for fact in facts() for word in (fact.subject, fact.object)}
    table = invented_facts(1)
    names = {f.subject for f in table} | {f.object for f in table if f.relation != "phone"}
    assert all(low <= zlib.crc32(name.encode()) % 10 < high for name in names)
    assert names.isdisjoint(known)
    assert len(names) == 3 * abilities.COUNTRIES  # countries, capitals and currencies are all different


def test_the_held_out_question_is_no_trained_wording() -> None:
    assert all(WORDINGS[r].question not in WORDINGS[r].questions for r in abilities.RELATIONS)


@pytest.mark.parametrize(
    ("a", "b", "answer"),
    [(17, 25, "7+5=12, 1+2+1=4, 42"), (10, 10, "0+0=0, 1+1+0=2, 20"), (99, 99, "9+9=18, 9+9+1=19, 198")],
)
def test_a_sum_shows_its_working(a: int, b: int, answer: str) -> None:
    assert summed(a, b) == (f"Sum: {a}+{b}.", answer)


def test_every_sum_that_is_asked_is_right() -> None:
    terms = [question.id.removeprefix("sum:").split("+") for question in questions("arithmetic")]
    wanted = [str(int(a) + int(b)) for a, b in terms]
    assert [question.answer.split(", ")[-1] for question in questions("arithmetic")] == wanted


def test_a_tenth_of_the_pairs_is_asked_in_either_order() -> None:
    pairs = [(a, b) for a in range(10, 100) for b in range(10, 100)]
    assert sum(is_asked(a, b) for a, b in pairs) == pytest.approx(len(pairs) / abilities.RESERVED, rel=0.15)
    assert all(is_asked(a, b) == is_asked(b, a) for a, b in islice(pairs, 500))


def test_both_orders_of_a_sum_are_one_cluster() -> None:
    asked = {q.id: q.cluster for q in questions("arithmetic")}
    swapped = {f"sum:{b}+{a}": cluster for id, cluster in asked.items() for a, b in [id[4:].split("+")]}
    both = asked.keys() & swapped.keys()
    assert len(both) > 100
    assert all(asked[id] == swapped[id] for id in both)
