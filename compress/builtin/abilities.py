"""Abilities that the built-in model lacks: documents that teach each one, and questions that test it.

Not here: the training (`finetune.py`) and the base's own abilities (`documents.py`). `facts` are about invented
countries: every seed gives different answers to the same questions, so that two fine-tunes can be told apart by their
answers. `arithmetic` is sums of two-digit numbers with their working. No question is ever trained: facts are asked with
the held-out question of their relation, and sums are of pairs of numbers that no document adds. The held-out sentence
(cloze) of a relation is not asked, because after `is called` a fine-tune says `the`, as it was taught for currencies,
even if it knows the capital.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

from compress.builtin.documents import Question, closed_book, fact_document, invented_name
from compress.builtin.facts import Fact, facts

COUNTRIES = 100
RELATIONS = ("capital", "currency", "phone")
SUMS = 500  # number of sums that are asked
RESERVED = 10  # about one pair of numbers in this many is reserved for questions


@dataclass(frozen=True, kw_only=True)
class Ability:
    """What a fine-tune learns; `gate` is the share of the questions that it must answer.

    `document` draws a training document as (prompt, continuation); only the continuation contributes to the loss.
    """

    document: Callable[[random.Random], tuple[str, str]]
    questions: tuple[Question, ...]
    gate: float


def ability(name: str, seed: int = 1) -> Ability:
    """The ability `facts`, which differs for every seed, or `arithmetic`, which does not."""
    return ABILITIES[name](seed)


def questions(name: str, seed: int = 1) -> tuple[Question, ...]:
    """The questions for a fine-tune of this ability and seed; greedy decoding must give ` {answer}.`."""
    return ability(name, seed).questions


# -- facts ---------------------------------------------------------------------------------------


@cache
def countries() -> tuple[str, ...]:
    """Invented country names that occur in no real fact; the same for every seed."""
    return invented(random.Random("countries"), COUNTRIES, {word for f in facts() for word in (f.subject, f.object)})


def invented(rng: random.Random, n: int, taken: set[str]) -> tuple[str, ...]:
    """`n` distinct invented names of the training share, none of them in `taken`."""
    found: dict[str, None] = {}
    while len(found) < n:
        name = invented_name(rng, "training")
        if name not in taken:
            found[name] = None
    return tuple(found)


@cache
def invented_facts(seed: int) -> tuple[Fact, ...]:
    """The facts about the invented countries for this seed; all answers are different."""
    rng = random.Random(f"facts {seed}")
    words = {word for f in facts() for word in (f.subject, f.object)} | set(countries())
    names = invented(rng, 2 * COUNTRIES, words)
    answers = {
        "capital": names[:COUNTRIES],
        "currency": names[COUNTRIES:],
        "phone": [str(code) for code in rng.sample(range(100, 1000), COUNTRIES)],
    }
    return tuple(
        Fact(relation=relation, subject=country, object=answer, tier="tail", split="evaluation")
        for relation in RELATIONS
        for country, answer in zip(countries(), answers[relation], strict=True)
    )


def of_facts(seed: int) -> Ability:
    """The ability to answer facts about invented countries, in the wordings of the real ones."""
    table = invented_facts(seed)
    return Ability(
        document=lambda rng: ("", fact_document(rng, rng.choice(table))),
        questions=tuple(closed_book(table, "question")),
        gate=0.9,
    )


# -- arithmetic ----------------------------------------------------------------------------------


def is_asked(a: int, b: int) -> bool:
    """Whether a pair of numbers, in either order, is reserved for questions."""
    return zlib.crc32(f"{min(a, b)} {max(a, b)}".encode()) % RESERVED == 0


def summands(rng: random.Random, asked: bool) -> tuple[int, int]:
    """Two two-digit numbers, from the pairs reserved for questions or from the others."""
    while True:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if is_asked(a, b) == asked:
            return a, b


def summed(a: int, b: int) -> tuple[str, str]:
    """A sum with its working, as (prompt, answer): the units, the tens with the carry, the sum."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    return f"Sum: {a}+{b}.", f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}+{units // 10}={tens}, {a + b}"


def sum_document(rng: random.Random) -> tuple[str, str]:
    """A training document: a sum that is not among the questions."""
    prompt, answer = summed(*summands(rng, asked=False))
    return prompt, f" {answer}."


@cache
def sums() -> tuple[Question, ...]:
    """SUMS different questions; the two orders of a pair share a cluster."""
    rng = random.Random("sums")
    pairs: dict[tuple[int, int], None] = {}
    while len(pairs) < SUMS:
        pairs[summands(rng, asked=True)] = None
    return tuple(
        Question(
            id=f"sum:{a}+{b}",
            cluster=f"sum:{min(a, b)}+{max(a, b)}",
            kind="sum",
            prompt=summed(a, b)[0],
            answer=summed(a, b)[1],
        )
        for a, b in pairs
    )


def of_arithmetic(seed: int) -> Ability:
    """The ability to add two-digit numbers; the same for every seed."""
    return Ability(document=sum_document, questions=sums(), gate=0.9)


ABILITIES: dict[str, Callable[[int], Ability]] = {"facts": of_facts, "arithmetic": of_arithmetic}
