"""Generates the missing answer texts of likelihood tasks, and collects examples of answers that flipped.

Not here: how many answers flipped (`comparison.py`). Where only the likelihood of the target was measured and greedy
decoding would not give it, the answer is generated: for the dense model, for all its wrong answers, because a
compressed model may gain any of them; for a compressed model, only for the examples that are shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence

from compress_evals.answers import parts
from compress_evals.cache import Cache
from compress_evals.questions import Exam, Questions, wanted
from compress_evals.quiet import quiet
from compress_evals.results import Example, Results, Row
from compress_evals.subject import Subject

SHOWN = 20  # examples of lost answers, and as many of gained ones
PROMPT = 1200  # characters that are kept from the end of a prompt
SPARE = 8  # tokens generated beyond the length of the longest target: a wrong answer may be longer
_STOP = re.compile(r"[.!?](?=\s|$)")

Flips = tuple[tuple[str, ...], tuple[str, ...]]
Examples = tuple[tuple[Example, ...], tuple[Example, ...]]


def spoken(
    subject: Subject,
    results: Results,
    exam: Exam,
    cache: Cache | None,
    only: Mapping[str, Iterable[str]] | None = None,
) -> Results:
    """The results with `said` generated where it is missing, for all questions or for the ids in `only` by task.

    Only tasks scored by the likelihood of one target have such gaps.
    """
    rows = dict(results.rows)
    for asked in exam.tasks:
        name = asked.task.name
        silent = [i for i, row in enumerate(rows[name]) if row.said is None]
        if only is not None:
            chosen = set(only.get(name, ()))
            silent = [i for i in silent if rows[name][i].id in chosen]
        if silent and asked.loaded.OUTPUT_TYPE == "loglikelihood":
            texts = say(subject, asked, silent, exam, results.engine.batch_size, cache)
            rows[name] = tuple(
                row.model_copy(update={"said": texts[i]}) if i in texts else row for i, row in enumerate(rows[name])
            )
    return results.model_copy(update={"rows": rows})


def say(
    subject: Subject, asked: Questions, places: Sequence[int], exam: Exam, batch_size: int, cache: Cache | None
) -> dict[int, str]:
    """The greedy answers to the questions at `places` of a task, by place, from the cache or generated.

    They are at most SPARE tokens longer than the longest target of these questions.
    """
    from lm_eval.api.instance import Instance

    decided_by = {**parts(subject, asked, exam, batch_size, cache), "places": list(places)}
    stored = None if cache is None or subject.identity is None else cache.get("said", decided_by)
    if stored is None:
        targets = [str(asked.requests[i][0][1]) for i in places]
        longest = max(len(ids) for ids in exam.tokenizer(targets, add_special_tokens=False).input_ids)
        options = {"until": ["\n"], "max_gen_toks": longest + SPARE, "do_sample": False}
        requests = [
            Instance("generate_until", {}, (asked.prompt(i), options), place, (asked.task.name, i, 1))
            for place, i in enumerate(places)
        ]
        with quiet():
            texts = subject.scorer(exam, batch_size).generate_until(requests)
        stored = [ended(text, target) for text, target in zip(texts, targets, strict=True)]
        if cache is not None and subject.identity is not None:
            cache.put("said", decided_by, stored)
    return dict(zip(places, stored, strict=True))


def ended(text: str, target: str) -> str:
    """The text up to the end of its n-th sentence, n being the number of sentences of the target (at least 1).

    All of the text if it has fewer. Without this cut an answer would run on into the next question.
    """
    sentences = max(1, len(_STOP.findall(target)))
    stops = list(_STOP.finditer(text))
    return (text[: stops[sentences - 1].end()] if len(stops) >= sentences else text).strip()


def flips(dense: Sequence[Row], compressed: Sequence[Row], headline: str) -> Flips:
    """The ids of up to SHOWN lost and SHOWN gained questions, chosen by the smallest hashes, hence deterministic."""
    lost: list[str] = []
    gained: list[str] = []
    for before, after in zip(dense, compressed, strict=True):
        change = after.scores[headline] - before.scores[headline]
        if change:
            (lost if change < 0 else gained).append(before.id)
    return some(lost), some(gained)


def some(ids: Iterable[str]) -> tuple[str, ...]:
    """The SHOWN ids with the smallest hashes."""
    return tuple(sorted(ids, key=lambda i: (hashlib.sha256(i.encode()).hexdigest(), i))[:SHOWN])


def shown(dense: Results, compressed: Results) -> dict[str, Flips]:
    """The ids of the flips to show, by task."""
    return {name: flips(dense.rows[name], compressed.rows[name], task.headline) for name, task in dense.tasks.items()}


def examples(dense: Results, compressed: Results, chosen: Mapping[str, Flips], exam: Exam) -> dict[str, Examples]:
    """The lost and gained examples of every task; `spoken` must have filled in the answers that they need."""
    found = {}
    for asked in exam.tasks:
        name = asked.task.name
        place = {row.id: i for i, row in enumerate(dense.rows[name])}

        def example(at: str, asked: Questions = asked, name: str = name, place: dict[str, int] = place) -> Example:
            i = place[at]
            return Example(
                id=at,
                prompt=asked.prompt(i)[-PROMPT:],
                wanted=wanted(asked, i),
                dense=dense.rows[name][i].said or "",
                compressed=compressed.rows[name][i].said or "",
            )

        lost, gained = chosen[name]
        found[name] = (tuple(map(example, lost)), tuple(map(example, gained)))
    return found
