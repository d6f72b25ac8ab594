"""Abilities that the built-in model does not have: documents that teach one, and questions that ask for it.

Not here: the training (`finetune.py`) and the base's own abilities (`documents.py`). `facts` are about invented
countries: every seed gives other answers to the same questions, so that two fine-tunes can be told apart by what they
say. `arithmetic` is sums of two-digit numbers with their working. No question is ever trained: facts are asked in the
held-out question of their relation, sums are of pairs of numbers that no document adds. Its held-out sentence is not
asked: after `is called` a fine-tune says `the`, as it was taught for currencies, though it knows the capital.
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
SUMS = 500  # asked
RESERVED = 10  # of so many pairs of numbers one is only asked


@dataclass(frozen=True, kw_only=True)
class Ability:
    """What a fine-tune learns; `gate` is the share of the questions that it must answer.

    `document` draws a training document as (prompt, continuation); only the continuation is learned.
    """

    document: Callable[[random.Random], tuple[str, str]]
    questions: tuple[Question, ...]
    gate: float


def ability(name: str, seed: int = 1) -> Ability:
    """`facts`, which are others for every seed, or `arithmetic`, which is the same."""
    return ABILITIES[name](seed)


def questions(name: str, seed: int = 1) -> tuple[Question, ...]:
    """What a fine-tune of this ability and seed is asked; greedy decoding must give ` {answer}.`."""
    return ability(name, seed).questions


# -- facts ---------------------------------------------------------------------------------------


@cache
def countries() -> tuple[str, ...]:
    """Invented names that stand for nothing else; the same for every seed."""
    return invented(random.Random("countries"), COUNTRIES, {word for f in facts() for word in (f.subject, f.object)})


def invented(rng: random.Random, n: int, taken: set[str]) -> tuple[str, ...]:
    """`n` distinct names of the training share, none of them taken."""
    found: dict[str, None] = {}
    while len(found) < n:
        name = invented_name(rng, "training")
        if name not in taken:
            found[name] = None
    return tuple(found)


@cache
def invented_facts(seed: int) -> tuple[Fact, ...]:
    """What is true of the countries for this seed: no two answers are alike."""
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
    """Facts about invented countries, in the wordings of the real ones."""
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
    """Two numbers of two digits, of the pairs that are asked or of the others."""
    while True:
        a, b = rng.randrange(10, 100), rng.randrange(10, 100)
        if is_asked(a, b) == asked:
            return a, b


def summed(a: int, b: int) -> tuple[str, str]:
    """A sum with its working, (prompt, answer): the units, the tens with what is carried, the sum."""
    units = a % 10 + b % 10
    tens = a // 10 + b // 10 + units // 10
    return f"Sum: {a}+{b}.", f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}+{units // 10}={tens}, {a + b}"


def sum_document(rng: random.Random) -> tuple[str, str]:
    """A sum that is not asked."""
    prompt, answer = summed(*summands(rng, asked=False))
    return prompt, f" {answer}."


@cache
def sums() -> tuple[Question, ...]:
    """Different sums; the two orders of a pair are one cluster."""
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
    """Sums of two-digit numbers."""
    return Ability(document=sum_document, questions=sums(), gate=0.9)


ABILITIES: dict[str, Callable[[int], Ability]] = {"facts": of_facts, "arithmetic": of_arithmetic}
