"""The noise floor: the dense model against itself at another batch size, and which differences are within it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from compress_evals import noise as noises
from compress_evals.answers import Answers
from compress_evals.noise import measure_noise, samples, sentence, within
from compress_evals.progress import Meter
from compress_evals.questions import Exam, prepare
from compress_evals.results import Noise
from compress_evals.run import measure
from compress_evals.stats import paired
from compress_evals.subject import Subject
from compress_evals.suite import FACTS


@pytest.fixture(scope="module")
def exam(tokenizer: Any) -> Exam:
    return prepare(FACTS, tokenizer, only=["facts_trained", "facts_mc"], limit=12)


@pytest.mark.slow
def test_a_float32_model_has_none_at_half_the_batch(model: Any, exam: Exam) -> None:
    tiny = Subject("tiny", lambda: model, device="cpu")
    found = measure_noise(tiny, measure(tiny, exam, 6), exam, samples(exam, 5), None, Meter())
    assert found == {name: Noise(batch_size=3, n=5, flips=0) for name in ("facts_trained", "facts_mc")}


def test_answers_that_change_are_counted(model: Any, exam: Exam, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = Subject("tiny", lambda: model, device="cpu")
    results = measure(tiny, exam, 2)
    sizes = []

    def changed(subject: Any, asked: Any, exam: Exam, batch_size: int, *rest: Any) -> Answers:
        sizes.append(batch_size)
        rows = [row for row in results.rows[asked.task.name] if row.id in {asked.document(i)["id"] for i in range(5)}]
        other = {"scores": {"acc": 1 - rows[0].scores["acc"]}}
        return Answers(rows=(rows[0].model_copy(update=other), *rows[1:]), truncated=0, seconds=0.0)

    monkeypatch.setattr(noises, "answers", changed)
    found = measure_noise(tiny, results, exam, samples(exam, 5), None, Meter())
    assert [noise.flips for noise in found.values()] == [1, 1]
    assert sizes == [1, 1]
    alone = results.model_copy(update={"engine": results.engine.model_copy(update={"batch_size": 1})})
    assert measure_noise(tiny, alone, exam, samples(exam, 5), None, Meter()) == {}  # there is no half of one


def test_scores_that_are_not_right_or_wrong_have_no_flips(
    model: Any, exam: Exam, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny = Subject("tiny", lambda: model, device="cpu")
    results = measure(tiny, exam, 2)
    rouge = [row.model_copy(update={"scores": {"acc": 0.25}}) for row in results.rows["facts_mc"]]
    results = results.model_copy(update={"rows": {**results.rows, "facts_mc": rouge}})

    def same(subject: Any, asked: Any, *rest: Any) -> Answers:
        return Answers(rows=tuple(results.rows[asked.task.name][:5]), truncated=0, seconds=0.0)

    monkeypatch.setattr(noises, "answers", same)
    found = measure_noise(tiny, results, exam, samples(exam, 5), None, Meter())
    assert found == {"facts_trained": Noise(batch_size=1, n=5, flips=0)}


def test_no_more_flips_than_noise_is_no_difference() -> None:
    pair = paired([1] * 100, [0, 0] + [1] * 98)
    assert within(pair, Noise(batch_size=32, n=200, flips=4))
    assert not within(pair, Noise(batch_size=32, n=200, flips=3))
    assert not within(pair, None)


def test_as_many_flips_that_only_lose_are_a_difference() -> None:
    pair = paired([1] * 1000, [0] * 20 + [1] * 980)
    assert pair.verdict == "matching" and pair.high < 0
    assert not within(pair, Noise(batch_size=32, n=200, flips=4))
    both = paired([1] * 990 + [0] * 10, [0] * 10 + [1] * 990)
    assert within(both, Noise(batch_size=32, n=200, flips=4))


def test_the_sentence_names_what_is_within_noise() -> None:
    pairs = {"a": ("Task A", paired([1] * 100, [0, 0] + [1] * 98)), "b": ("Task B", paired([1] * 100, [0] * 100))}
    noise = {name: Noise(batch_size=32, n=200, flips=4) for name in pairs}
    assert sentence(noise, pairs) == (
        "Indistinguishable from the dense model's own noise (8 of 400 answers change with the batch size): Task A."
    )
    assert sentence({name: Noise(batch_size=32, n=200, flips=0) for name in pairs}, pairs).startswith("Every task")
    assert sentence({}, pairs) == ""


def test_the_sample_is_that_of_another_process(exam: Exam, tokenizer: Any, tmp_path: Path) -> None:
    again = prepare(FACTS, tokenizer, only=["facts_trained", "facts_mc"], limit=12)
    assert [asked.chosen for asked in samples(exam, 5)] == [asked.chosen for asked in samples(again, 5)]
