"""One-line documents about facts, invented worlds, records and formats, and the questions asked of them.

They are shared by the training script, the `mixed` calibration set and the evaluation tasks, so that
the three cannot drift apart. Every document ends with a full stop; an answer follows its prompt
after one space. Invented names are split by hash, so that a name seen in training is never asked about.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import count

from compress.builtin.facts import Fact
from compress.builtin.wordings import INVENTED, WORDINGS

ONSETS = ("b", "d", "f", "g", "k", "l", "m", "n", "p", "r", "s", "t", "v", "z", "br", "dr", "kr", "st", "tr")
VOWELS = ("a", "e", "i", "o", "u")
ENDINGS = ("", "n", "r", "l", "s", "m", "k")
TRADES = (
    "baker",
    "miller",
    "smith",
    "sailor",
    "teacher",
    "farmer",
    "weaver",
    "tailor",
    "hunter",
    "doctor",
    "painter",
    "clerk",
)
COUNTERFACTUAL = 0.3  # share of open-book contexts that contradict the real facts
NAME_SHARES = {"evaluation": (0, 2), "calibration": (2, 3), "training": (3, 10)}  # tenths of the hash range


@dataclass(frozen=True, kw_only=True)
class Question:
    """A prompt and its only correct continuation, ` {answer}.`; `cluster` groups dependent questions."""

    id: str
    cluster: str
    kind: str
    prompt: str
    answer: str
    distractors: tuple[str, ...] = ()
    tier: str = ""


def invented_name(rng: random.Random, use: str) -> str:
    """A pronounceable name reserved for `use`: training, calibration or evaluation."""
    low, high = NAME_SHARES[use]
    while True:
        syllables = rng.choice([2, 2, 3])
        stem = "".join(rng.choice(ONSETS) + rng.choice(VOWELS) for _ in range(syllables))
        name = stem.capitalize() + rng.choice(ENDINGS)
        if low <= zlib.crc32(name.encode()) % 10 < high:
            return name


def statement(rng: random.Random, fact: Fact) -> str:
    """The fact in one of its trained wordings as a statement."""
    return rng.choice(WORDINGS[fact.relation].statements).format(s=fact.subject, o=fact.object)


def fact_document(rng: random.Random, fact: Fact) -> str:
    """The fact as a trained statement or as a trained question with its answer."""
    if rng.random() < 0.5:
        return statement(rng, fact)
    question = rng.choice(WORDINGS[fact.relation].questions).format(s=fact.subject)
    return f"Question: {question} Answer: {fact.object}."


@dataclass(frozen=True, kw_only=True)
class World:
    """Invented facts that hold only inside one document: (relation, subject, object, wording) each."""

    rows: tuple[tuple[str, str, str, int], ...]

    def context(self) -> str:
        """The facts as one paragraph."""
        return "Context: " + " ".join(INVENTED[r][0][w].format(s=s, o=o) for r, s, o, w in self.rows)

    def ask(self, row: int, wording: int) -> str:
        """The question about one row, up to and including `Answer:`."""
        relation, subject, _, _ = self.rows[row]
        return f" Question: {INVENTED[relation][1][wording].format(s=subject)} Answer:"


def invented_world(rng: random.Random, size: int, use: str) -> World:
    """`size` invented facts with distinct names; only the relation `number` has numbers as objects."""
    rows: list[tuple[str, str, str, int]] = []
    used: set[str] = set()
    while len(rows) < size:
        relation = rng.choice(sorted(INVENTED))
        subject = invented_name(rng, use)
        answer = str(rng.randint(2, 999)) if relation == "number" else invented_name(rng, use)
        if {subject, answer} & used or subject == answer:
            continue
        used |= {subject, answer}
        rows.append((relation, subject, answer, rng.randrange(2)))
    return World(rows=tuple(rows))


def context_document(rng: random.Random, largest: int, use: str = "training") -> str:
    """An invented world of up to `largest` facts, then up to four questions with their answers."""
    size = min(largest, rng.choice([1, 2, 2, 3, 3, 4, 5, 6, 8]))
    world = invented_world(rng, size, use)
    asked = rng.sample(range(size), min(4, size))
    return world.context() + "".join(f"{world.ask(i, rng.randrange(2))} {world.rows[i][2]}." for i in asked)


def open_book_document(rng: random.Random, pool: Sequence[Fact]) -> str:
    """Real facts stated in a context, then questions about them; some contexts are deliberately wrong."""
    told = rng.sample(pool, rng.choice([1, 1, 2, 3]))
    objects = {relation: [f.object for f in pool if f.relation == relation] for relation in {f.relation for f in told}}
    swap = rng.random() < COUNTERFACTUAL
    rows = [(fact, rng.choice(objects[fact.relation]) if swap else fact.object) for fact in told]
    context = " ".join(rng.choice(WORDINGS[f.relation].statements).format(s=f.subject, o=o) for f, o in rows)
    questions = "".join(
        f" Question: {rng.choice(WORDINGS[f.relation].questions).format(s=f.subject)} Answer: {o}."
        for f, o in rng.sample(rows, len(rows))
    )
    return f"Context: {context}{questions}"


def copy_task(rng: random.Random, use: str) -> tuple[str, str]:
    """A list of names to repeat, as (prompt, answer)."""
    names = ", ".join(invented_name(rng, use) for _ in range(rng.randint(3, 8)))
    return f"List: {names}. Again:", names


def summary_task(rng: random.Random, use: str) -> tuple[str, str]:
    """A record of four fields to summarize in one sentence, as (prompt, answer)."""
    name, home = invented_name(rng, use), invented_name(rng, use)
    trade, age = rng.choice(TRADES), rng.randint(18, 79)
    fields = [f"name {name}", f"home {home}", f"trade {trade}", f"age {age}"]
    rng.shuffle(fields)
    return f"Record: {'; '.join(fields)}. Summary:", f"{name} is a {trade} of {age} years and lives in {home}"


def format_task(rng: random.Random, use: str) -> tuple[str, str]:
    """Three names to write in a requested format, as (prompt, answer)."""
    names = [invented_name(rng, use) for _ in range(3)]
    style = rng.choice(["as a list", "with dashes", "as JSON", "backwards"])
    written = {
        "as a list": f"[{', '.join(names)}]",
        "with dashes": " - ".join(names),
        "as JSON": f'{{"first": "{names[0]}", "last": "{names[2]}"}}',
        "backwards": ", ".join(reversed(names)),
    }[style]
    return f"Words: {', '.join(names)}. Write {style}:", written


TASKS = {"copy": copy_task, "summary": summary_task, "format": format_task}


def task_document(rng: random.Random, task: str, use: str = "training") -> str:
    """A copy, summary or format task with its answer."""
    prompt, answer = TASKS[task](rng, use)
    return f"{prompt} {answer}."


# -- questions -----------------------------------------------------------------------------------


def closed_book(facts: Sequence[Fact], form: str) -> list[Question]:
    """One question per fact, without context; `form` is `trained`, or `question` or `cloze`, which are held out."""
    prompts = {
        "trained": lambda f: f"Question: {WORDINGS[f.relation].questions[0].format(s=f.subject)} Answer:",
        "question": lambda f: f"Question: {WORDINGS[f.relation].question.format(s=f.subject)} Answer:",
        "cloze": lambda f: WORDINGS[f.relation].cloze.split("{o}")[0].format(s=f.subject).rstrip(),
    }
    rng = random.Random(17)
    objects: dict[str, list[str]] = {}
    for fact in facts:
        objects.setdefault(fact.relation, []).append(fact.object)
    return [
        Question(
            id=f"{form}:{fact.id}",
            cluster=fact.subject,
            kind=form,
            tier=fact.tier,
            prompt=prompts[form](fact),
            answer=fact.object,
            distractors=tuple(rng.sample(sorted(set(objects[fact.relation]) - {fact.object}), 3)),
        )
        for fact in facts
    ]


def open_book(facts: Sequence[Fact]) -> list[Question]:
    """The trained question, asked with a statement of the fact in context."""
    return [
        Question(
            id=f"open:{fact.id}",
            cluster=fact.subject,
            kind="open",
            tier=fact.tier,
            prompt=f"Context: {WORDINGS[fact.relation].statements[0].format(s=fact.subject, o=fact.object)} "
            f"Question: {WORDINGS[fact.relation].questions[0].format(s=fact.subject)} Answer:",
            answer=fact.object,
        )
        for fact in facts
    ]


@lru_cache(maxsize=32)  # takes a second, and every evaluation uses the same questions
def in_context(size: int, n: int) -> Sequence[Question]:
    """`n` questions, each over its own invented world of `size` facts; the asked fact is never a number."""
    rng = random.Random(777 + size)
    questions: list[Question] = []
    while len(questions) < n:
        world = invented_world(rng, size, "evaluation")
        row = rng.randrange(size)
        if world.rows[row][0] == "number":
            continue
        others = [o for i, (_, _, o, _) in enumerate(world.rows) if i != row][:3]
        others += [invented_name(rng, "evaluation") for _ in range(3 - len(others))]
        questions.append(
            Question(
                id=f"context{size}:{len(questions)}",
                cluster=f"context{size}:{len(questions)}",
                kind=f"context{size}",
                prompt=world.context() + world.ask(row, rng.randrange(2)),
                answer=world.rows[row][2],
                distractors=tuple(others),
            )
        )
    return tuple(questions)


@lru_cache(maxsize=32)
def task_questions(task: str, n: int) -> Sequence[Question]:
    """`n` copy, summary or format tasks."""
    rng = random.Random(778)
    pairs = (TASKS[task](rng, "evaluation") for _ in count())
    return tuple(
        Question(id=f"{task}:{i}", cluster=f"{task}:{i}", kind=task, prompt=prompt, answer=answer)
        for i, (prompt, answer) in zip(range(n), pairs, strict=False)
    )
