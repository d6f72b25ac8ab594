"""What was said, where only the likelihood of the answer was measured, and examples of the answers that flipped.

Not here: how much flipped (`comparison.py`). A model that would not say the target is made to say something: all of
the dense model's wrong answers, since the compressed one may gain any of them, and of a compressed model's only those
that are shown.
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

SHOWN = 20  # examples each way
PROMPT = 1200  # characters of a prompt's end
SPARE = 8  # tokens beyond those of the target: a wrong answer may be longer
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
    """The results with `said` filled in where it is not known, at all questions or the ids in `only` by task."""
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
    """What a model says to these of a task's questions, greedily, in no more than the target's length and a little."""
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
    """The text up to where it ends a sentence for as many times as the target does; all of it if it never does.

    Without this an answer would run on into the next question.
    """
    sentences = max(1, len(_STOP.findall(target)))
    stops = list(_STOP.finditer(text))
    return (text[: stops[sentences - 1].end()] if len(stops) >= sentences else text).strip()


def flips(dense: Sequence[Row], compressed: Sequence[Row], headline: str) -> Flips:
    """The ids of some questions lost and some gained: those with the smallest hashes, so always the same."""
    lost: list[str] = []
    gained: list[str] = []
    for before, after in zip(dense, compressed, strict=True):
        change = after.scores[headline] - before.scores[headline]
        if change:
            (lost if change < 0 else gained).append(before.id)
    return some(lost), some(gained)


def some(ids: Iterable[str]) -> tuple[str, ...]:
    """As many ids as are shown, by their hash."""
    return tuple(sorted(ids, key=lambda i: (hashlib.sha256(i.encode()).hexdigest(), i))[:SHOWN])


def shown(dense: Results, compressed: Results) -> dict[str, Flips]:
    """The flips of every task that are shown."""
    return {name: flips(dense.rows[name], compressed.rows[name], task.headline) for name, task in dense.tasks.items()}


def examples(dense: Results, compressed: Results, chosen: Mapping[str, Flips], exam: Exam) -> dict[str, Examples]:
    """The examples of every task, lost and gained; both results are `spoken` where an example needs it."""
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
