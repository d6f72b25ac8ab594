"""The documents of the kick tasks: the exact prompt for each row of the data, with its answers.

Not here: reading the rows (`compress_evals.data`) and scoring (`functions.py`). Prompts are those of LLM-KICK without
its trailing space, which a tokenizer turns into a separate token, and for MMLU those of Hendrycks et al. An id is
`kind:row`, where the row is the same in tasks that ask about the same thing; questions that share an answer, a passage
or a twin sentence share a cluster.
Source: Jaiswal et al., Compressing LLMs: The Truth is Rarely Pure and Never Simple, ICLR 2024, section 3.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from compress.builtin.documents import invented_name
from compress.errors import ArtifactError
from compress_evals.data import Found, Item
from compress_evals.metrics.answers import normalise

Document = dict[str, Any]
LETTERS = ("A", "B", "C", "D")
SHOTS = 5
CATEGORIES = {
    "STEM": "abstract_algebra astronomy college_biology college_chemistry college_computer_science "
    "college_mathematics college_physics computer_security conceptual_physics electrical_engineering "
    "elementary_mathematics high_school_biology high_school_chemistry high_school_computer_science "
    "high_school_mathematics high_school_physics high_school_statistics machine_learning",
    "humanities": "formal_logic high_school_european_history high_school_us_history high_school_world_history "
    "international_law jurisprudence logical_fallacies moral_disputes moral_scenarios philosophy prehistory "
    "professional_law world_religions",
    "social sciences": "econometrics high_school_geography high_school_government_and_politics "
    "high_school_macroeconomics high_school_microeconomics high_school_psychology human_sexuality "
    "professional_psychology public_relations security_studies sociology us_foreign_policy",
    "other": "anatomy business_ethics clinical_knowledge college_medicine global_facts human_aging management "
    "marketing medical_genetics miscellaneous nutrition professional_accounting professional_medicine virology",
}
CATEGORY = {subject: category for category, subjects in CATEGORIES.items() for subject in subjects.split()}
SHARED_PASSAGE = "This question refers to the following information."  # MMLU's history questions
LENGTHS = (512, 1024, 2048, 4096, 8192)  # of a haystack, in tokens of about four characters
DEPTHS = (0, 25, 50, 75, 100)  # percent of the haystack before the needle
NEEDLES = 20  # facts, each of which is hidden at every length and depth
CHARACTERS = 4  # of English text per token of a large vocabulary


def freebaseqa(found: Found) -> list[Document]:
    """Closed-book questions; lines with the same question become one question with all their answers."""
    asked: dict[str, tuple[int, list[str]]] = {}
    for i, (question, answer) in enumerate(_each(found, _question_and_answer)):
        asked.setdefault(question, (i, []))[1].append(answer)
    return [
        _answered(f"freebaseqa:{i}", f"Please give answer to this question: {question}\nThe answer is", answers)
        for question, (i, answers) in asked.items()
    ]


def triviaqa(found: Found) -> list[Document]:
    """Closed-book questions; the answer or any of its aliases counts as right."""

    def ask(i: int, row: Item) -> Document:
        question = row["context"].removeprefix("Question: ").removesuffix("\nAnswer:")
        return _answered(f"triviaqa:{i}", _closed(question), list(dict.fromkeys([row["answer"], *row["aliases"]])))

    return list(_each(found, ask))


def nq_closed(found: Found) -> list[Document]:
    """The questions of Natural Questions without a passage (closed book)."""
    return list(_each(found, lambda i, row: _nq(f"nq_closed:{i}", _closed(row["question"]), row)))


def nq_open(found: Found) -> list[Document]:
    """The same questions, each after the passage that answers it (open book)."""

    def ask(i: int, row: Item) -> Document:
        [passage] = row["ctxs"]
        prompt = f"{passage['text']}\n\nBased on these texts, answer these questions:\n\nQ: {row['question']}\nA:"
        return _nq(f"nq_open:{i}", prompt, row)

    return list(_each(found, ask))


def mmlu(found: Found, examples: Found) -> list[Document]:
    """MMLU: four choices after five examples of the same subject, in the published format; the tier is the category.

    The published code writes two spaces before the name of the subject, and so does this one. Deviation: no example is
    dropped if a prompt is too long; such questions are counted as truncated.
    Source: Hendrycks et al., Measuring Massive Multitask Language Understanding, ICLR 2021, figure 1 and its code.
    """
    shots: dict[str, list[str]] = {}
    for subject, shot in _each(examples, lambda _, row: (row["subject"], f"{_four(row)} {LETTERS[row['answer']]}\n\n")):
        shots.setdefault(subject, []).append(shot)

    def ask(i: int, row: Item) -> Document:
        subject, question = row["subject"], row["question"]
        shared = question.rpartition("\n")[0] if question.startswith(SHARED_PASSAGE) else question
        about = f"The following are multiple choice questions (with answers) about  {subject.replace('_', ' ')}.\n\n"
        return {
            "id": f"mmlu:{i}",
            "cluster": _cluster(subject, shared),
            "tier": CATEGORY[subject],
            "prompt": about + "".join(shots[subject][:SHOTS]) + _four(row),
            "target": f" {LETTERS[row['answer']]}",
            "choices": list(LETTERS),
            "gold": row["answer"],
        }

    return list(_each(found, ask))


def key_value(found: Found, keys: int) -> list[Document]:
    """Key-value retrieval from a JSON object of `keys` keys; the tier is the third of the object that holds the key.

    The object is the published one if it has that many keys. Otherwise it has the first keys of the published one and
    the wanted key, whose position cycles through all positions.
    Source: Liu et al., Lost in the Middle: How Language Models Use Long Contexts, TACL 2024, section 3.
    """

    def ask(i: int, row: Item) -> Document:
        records = [(str(key), str(value)) for key, value in row["ordered_kv_records"]]
        wanted = (row["key"], row["value"])
        if keys < len(records):
            others = [record for record in records if record != wanted][: keys - 1]
            records = [*others[: i % keys], wanted, *others[i % keys :]]
        place = records.index(wanted)
        table = "{" + ",\n ".join(f"{json.dumps(key)}: {json.dumps(value)}" for key, value in records) + "}"
        prompt = (
            f"Extract the value corresponding to the specified key in the JSON object below.\n\nJSON data:\n{table}"
        )
        asked = f'{prompt}\n\nKey: "{row["key"]}"\nCorresponding value:'
        third = ("start", "middle", "end")[3 * place // len(records)]
        return {**_answered(f"kv{keys}:{i}", asked, [row["value"]], cluster=f"kv:{i}"), "tier": third}

    return list(_each(found, ask))


def needle(found: Found) -> list[Document]:
    """An invented fact hidden in passages about other things; the tier is their approximate length in tokens.

    The passages of one fact begin with the same passage at every length and depth, so that only these differ.
    """
    passages = list(_each(found, lambda _, row: str(row["ctxs"][0]["text"])))
    corpus = "\n".join(passages)
    documents = []
    for i in range(NEEDLES):
        rng = random.Random(i)
        start = rng.randrange(len(passages))
        name = _unheard(corpus, partial(invented_name, rng, "evaluation"))
        number = _unheard(corpus, lambda: str(rng.randrange(100_000, 1_000_000)))  # noqa: B023
        for length in LENGTHS:
            hay = _haystack(passages, start, CHARACTERS * length)
            for depth in DEPTHS:
                at = round(depth / 100 * len(hay))
                told = [*hay[:at], f"The secret number of {name} is {number}.", *hay[at:]]
                asked = "\n".join(told) + f"\n\nQ: What is the secret number of {name}?\nA:"
                document = _answered(f"needle:{length}-{depth}-{i}", asked, [number], cluster=f"needle:{i}")
                documents.append({**document, "tier": str(length)})
    return documents


def choice(found: Found, name: str) -> list[Document]:
    """Multiple choice among continuations; questions about the same passage or goal share a cluster."""

    def ask(i: int, row: Item) -> Document:
        query = row["query"].rstrip()
        passage = query.rpartition("\nQuestion:")[0] or query
        return {
            "id": f"{name}:{i}",
            "cluster": _cluster(name, passage),
            "tier": "",
            "prompt": query if name == "hellaswag" else f"{query}\nAnswer:",
            "target": f" {row['choices'][row['gold']]}",
            "choices": row["choices"],
            "gold": row["gold"],
        }

    return list(_each(found, ask))


def winogrande(found: Found) -> list[Document]:
    """WinoGrande: right if the continuation is more likely after the right one of two beginnings (partial scoring).

    Source: Trinh and Le, A Simple Method for Commonsense Reasoning, 2018, section 3.1.
    """

    def ask(i: int, row: Item) -> Document:
        return {
            "id": f"winogrande:{i}",
            "cluster": _cluster("winogrande", *row["context_options"]),
            "tier": "",
            "prompt": row["context_options"][row["gold"]],
            "target": f" {row['continuation']}",
            "continuation": row["continuation"],
            "choices": row["context_options"],
            "gold": row["gold"],
        }

    return list(_each(found, ask))


def gsm8k(found: Found) -> list[Document]:
    """GSM8K: a word problem to solve step by step, without examples (zero-shot).

    Source: Kojima et al., Large Language Models are Zero-Shot Reasoners, NeurIPS 2022, table 1.
    """

    def ask(i: int, row: Item) -> Document:
        _, marked, answer = row["answer"].rpartition("#### ")
        if not marked:
            raise ValueError("its answer has no '#### '")
        prompt = f"Q: {row['question']}\nA: Let's think step by step."
        return _answered(f"gsm8k:{i}", prompt, [answer.strip()], cluster=f"gsm8k:{i}")

    return list(_each(found, ask))


def _each(found: Found, ask: Callable[[int, Item], Any]) -> Iterator[Any]:
    for i, row in enumerate(found.rows):
        try:
            yield ask(i, row)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise ArtifactError(f"{found.name}: question {i + 1} is not as expected: {error!r}") from None


def _question_and_answer(_: int, row: Item) -> tuple[str, str]:
    question, between, answer = row["text"].rpartition(" | ")
    if not between:
        raise ValueError("there is no ' | '")
    return question.strip(), answer.strip()


def _closed(question: str) -> str:
    return f"Answer these questions:\n\nQ: {question}\nA:"


def _four(row: Item) -> str:
    """A question with its lettered choices, ending where the letter is expected."""
    choices = "".join(f"\n{letter}. {text}" for letter, text in zip(LETTERS, row["choices"], strict=True))
    return f"{row['question']}{choices}\nAnswer:"


def _nq(name: str, prompt: str, row: Item) -> Document:
    return _answered(name, prompt, row["answers"])


def _answered(name: str, prompt: str, answers: list[str], cluster: str | None = None) -> Document:
    """One row for lm-eval with a free answer; by default, questions with the same first answer share a cluster."""
    return {
        "id": name,
        "cluster": cluster or f"answer:{normalise(answers[0])}",
        "tier": "",
        "prompt": prompt,
        "target": f" {answers[0]}",
        "answers": answers,
    }


def _unheard(corpus: str, invent: Callable[[], str]) -> str:
    """The first result of `invent` that does not occur in the corpus."""
    while (made := invent()) in corpus:
        pass
    return made


def _haystack(passages: list[str], start: int, characters: int) -> list[str]:
    """Passages from `start` on, with about `characters` characters in all; the last passage is cut to fit."""
    taken: list[str] = []
    left = characters
    while left > 0:
        passage = passages[(start + len(taken)) % len(passages)]
        taken.append(passage[:left])
        left -= len(passage) + 1
    return taken


def _cluster(kind: str, *shared: str) -> str:
    return f"{kind}:{hashlib.sha256(chr(0).join(shared).encode()).hexdigest()[:12]}"
