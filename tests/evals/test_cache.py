"""Cached answers: what changes the key, which entries are trusted, and what a killed evaluation must ask again."""

from __future__ import annotations

import copy
import errno
import gzip
import json
import os
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.errors import RecipeError
from compress.identity import code_hash
from compress_evals import answers as asking
from compress_evals.answers import parts
from compress_evals.cache import Cache, key
from compress_evals.questions import Exam, prepare
from compress_evals.run import measure
from compress_evals.subject import Subject, software
from compress_evals.suite import FACTS

TASKS = ["facts_trained", "facts_mc", "facts_context1", "facts_generate"]


@pytest.fixture
def exam(tokenizer: Any) -> Exam:
    return prepare(FACTS, tokenizer, only=TASKS, limit=4)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The tasks that were really asked."""
    names: list[str] = []
    whole = asking.ask

    def ask(subject: Any, questions: Any, *rest: Any) -> Any:
        names.append(questions.task.name)
        return whole(subject, questions, *rest)

    monkeypatch.setattr(asking, "ask", ask)
    return names


def of(model: Any, identity: str | None = "a" * 64) -> Subject:
    return Subject("tiny", lambda: model, device="cpu", identity=identity)


def refused() -> Any:
    raise AssertionError("the model was loaded")


def entries(folder: Path) -> list[Path]:
    return sorted((folder / "answers").iterdir())


@pytest.mark.slow
def test_what_was_asked_is_not_asked_again_and_needs_no_model(
    model: Any, exam: Exam, tmp_path: Path, asked: list[str]
) -> None:
    first = measure(of(model), exam, 4, Cache(tmp_path))
    assert asked == TASKS
    again = measure(Subject("tiny", refused, device="cpu", identity="a" * 64), exam, 4, Cache(tmp_path))
    assert asked == TASKS
    assert again.rows == first.rows
    plain = {"created": "", "seconds": 0.0}
    assert again.model_copy(update=plain) == first.model_copy(update=plain)


@pytest.mark.slow
def test_a_live_model_without_an_identity_is_not_stored(
    model: Any, exam: Exam, tmp_path: Path, asked: list[str]
) -> None:
    for _ in range(2):
        measure(of(model, None), exam, 4, Cache(tmp_path))
    assert asked == TASKS * 2
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_everything_that_decides_an_answer_is_in_the_key(
    model: Any, tokenizer: Any, exam: Exam, monkeypatch: pytest.MonkeyPatch
) -> None:
    [question, *_] = exam.tasks
    half = copy.deepcopy(model).bfloat16()
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = 100
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    variants = {
        "as it is": parts(of(model), question, exam, 4, None),
        "weights": parts(of(model, "b" * 64), question, exam, 4, None),
        "dtype": parts(of(half), question, exam, 4, None),
        "context": parts(of(short), question, exam, 4, None),
        "batch size": parts(of(model), question, exam, 2, None),
        "task": parts(of(model), exam.tasks[1], exam, 4, None),
        "questions": parts(of(model), replace(question, sha256="c" * 64), exam, 4, None),
        "template": parts(of(model), question, replace(exam, chat_template="d" * 64), 4, None),
        "tokenizer": parts(of(model), question, prepare(FACTS, other, only=TASKS[:1], limit=4), 4, None),
    }
    monkeypatch.setattr(asking, "software", lambda: {"torch": "next"})
    variants["software"] = parts(of(model), question, exam, 4, None)
    assert len({key("answers", found) for found in variants.values()}) == len(variants)


def test_answers_depend_on_our_own_code() -> None:
    assert re.fullmatch("[0-9a-f]{64}", software()["code"]) and software()["code"] != code_hash()


def test_an_entry_that_cannot_be_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a shared cache it may be valid, but another user's."""
    notes: list[str] = []
    cache = Cache(tmp_path)
    cache.put("answers", {"a": 1}, [2])

    def fail(_: Path) -> bytes:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "read_bytes", fail)
    with pytest.raises(RecipeError, match=r"json\.gz: cannot be read: Permission denied"):
        cache.get("answers", {"a": 1})
    assert not notes


@pytest.mark.slow
def test_two_models_never_share_an_entry(model: Any, exam: Exam, tmp_path: Path, asked: list[str]) -> None:
    import torch

    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight.zero_()
    found = [measure(of(m, sha), exam, 4, Cache(tmp_path)) for m, sha in ((model, "a"), (broken, "b"))]
    assert asked == TASKS * 2
    assert found[0].rows["facts_generate"] != found[1].rows["facts_generate"]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["a score", "truncated", "a bit", "not gzip", "another's", "a row less"])
def test_a_damaged_entry_is_measured_again_and_said_to_be(
    model: Any, exam: Exam, tmp_path: Path, asked: list[str], how: str
) -> None:
    first = measure(of(model), exam, 4, Cache(tmp_path))
    path, other = entries(tmp_path)[:2]
    damage(path, other, how)
    notes: list[str] = []
    again = measure(of(model), exam, 4, Cache(tmp_path, say=notes.append))
    assert len(asked) == len(TASKS) + 1
    assert [path.name in note and "damaged" in note for note in notes] == [True]
    assert again.rows == first.rows
    measure(of(model), exam, 4, Cache(tmp_path))
    assert len(asked) == len(TASKS) + 1


def damage(path: Path, other: Path, how: str) -> None:
    entry = json.loads(gzip.decompress(path.read_bytes()))
    match how:
        case "a score":
            metric = next(iter(entry["content"]["rows"][0]["scores"]))
            entry["content"]["rows"][0]["scores"][metric] = 0.5
            path.write_bytes(gzip.compress(json.dumps(entry).encode()))
        case "a row less":  # with a hash that fits, as a bug of ours would write it
            from compress_evals.cache import _sha

            entry["content"]["rows"].pop()
            entry["sha256"] = _sha(entry["content"])
            path.write_bytes(gzip.compress(json.dumps(entry).encode()))
        case "truncated":
            path.write_bytes(path.read_bytes()[:-20])
        case "a bit":
            raw = bytearray(path.read_bytes())
            raw[10] = 0xFF  # the first block is of no kind that there is
            path.write_bytes(raw)
        case "not gzip":
            path.write_bytes(b"{}")
        case "another's":
            path.write_bytes(other.read_bytes())


@pytest.mark.slow
def test_a_fresh_start_ignores_what_is_there_and_replaces_it(
    model: Any, exam: Exam, tmp_path: Path, asked: list[str]
) -> None:
    measure(of(model), exam, 4, Cache(tmp_path))
    fresh = Cache(tmp_path, fresh=True)
    measure(of(model), exam, 4, fresh)
    assert asked == TASKS * 2
    measure(of(model), exam, 4, fresh)  # what it wrote itself is good
    assert asked == TASKS * 2


def test_nothing_half_written_is_left_or_read(tmp_path: Path) -> None:
    cache = Cache(tmp_path)

    def half(partial: Path) -> None:
        partial.write_text("half")
        raise OSError(28, "disk full")

    with pytest.raises(RecipeError, match="x cannot be written: disk full"):
        cache.place(tmp_path / "answers" / "x", half)
    assert list((tmp_path / "answers").iterdir()) == []
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match="x cannot be written"):
        cache.place(tmp_path / "file" / "x", half)


def test_a_cache_that_cannot_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(RecipeError, match=r"--cache: .*file"):
        Cache(tmp_path / "file" / "cache")


def test_what_was_put_is_got_by_its_parts_alone(tmp_path: Path) -> None:
    cache = Cache(tmp_path)
    content = {"value": [1.5, float("inf"), None, "é"]}
    cache.put("kind", {"a": 1}, content)
    assert cache.get("kind", {"a": 1}) == content
    assert cache.get("kind", {"a": 2}) is None and cache.get("other", {"a": 1}) is None
