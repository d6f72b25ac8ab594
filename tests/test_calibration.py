"""Calibration tokens: reproducible by seed, disjoint from evaluation questions, from every documented source."""

from __future__ import annotations

import hashlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from compress import Calibration, CalibrationError
from compress.builtin.documents import INVENTED, NAME_SHARES, in_context, invented_name, task_questions
from compress.builtin.facts import facts
from compress.builtin.wordings import WORDINGS
from compress.calibration import (
    LONGEST,
    PROBE,
    builtin_documents,
    builtin_text,
    draw,
    encode,
    windows,
)  # fmt: skip
from compress.texts import document_of, read_documents

BUILTIN = ("text", "mixed")


@pytest.fixture(scope="module")
def tokenizer(tiny_llama: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(tiny_llama, local_files_only=True)


def calibration(data: str = "text", **options: Any) -> Calibration:
    return Calibration(**{"data": data, "samples": 5, "length": 40, **options})


# -- determinism -----------------------------------------------------------------------------------


@pytest.mark.parametrize("data", BUILTIN)
def test_a_seed_gives_the_same_tokens(data: str, tokenizer: Any) -> None:
    first, second = (draw(calibration(data, seed=3), tokenizer, 128) for _ in range(2))
    assert torch.equal(first.windows[0], second.windows[0])
    assert torch.equal(first.probe_NT, second.probe_NT)
    assert first.sha256 == second.sha256


@pytest.mark.parametrize("data", BUILTIN)
def test_the_state_of_other_generators_does_not_matter(data: str, tokenizer: Any) -> None:
    first = draw(calibration(data), tokenizer, 128)
    random.seed(99)
    torch.manual_seed(99)
    assert draw(calibration(data), tokenizer, 128).sha256 == first.sha256


@pytest.mark.parametrize("data", BUILTIN)
def test_different_seeds_give_different_tokens(data: str, tokenizer: Any) -> None:
    drawn = {draw(calibration(data, seed=seed), tokenizer, 128).sha256 for seed in range(5)}
    assert len(drawn) == 5


@pytest.mark.parametrize("data", BUILTIN)
def test_shapes_and_names_are_as_asked(data: str, tokenizer: Any) -> None:
    tokens = draw(calibration(data, seed=7), tokenizer, 128)
    assert tuple(tokens.windows[0].shape) == (5, 40)
    assert len(tokens.probe_NT) == PROBE
    assert tokens.name == f"{data} 5x40 seed 7"
    assert tokens.windows[0].dtype == torch.int64
    assert len(tokens.sha256) == 64


def test_the_hash_is_that_of_the_windows(tokenizer: Any) -> None:
    tokens = draw(calibration(), tokenizer, 128)
    assert tokens.sha256 == hashlib.sha256(tokens.windows[0].to(torch.int32).numpy().tobytes()).hexdigest()


# -- windows ---------------------------------------------------------------------------------------


def test_windows_do_not_overlap_while_there_is_room() -> None:
    drawn = windows(list(range(1000)), 10, 90, random.Random(0))
    assert len({token for window in drawn for token in window}) == 900


class Counting:
    """A tokenizer that gives every word its own number, so that a window is known by its tokens."""

    bos_token_id = None
    eos_token_id = None

    def __call__(self, texts: list[str], **_: Any) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(word) for word in text.split()] for text in texts]}


def numbers(folder: Path, count: int) -> Path:
    """A file of `count` words, each once."""
    path = folder / "numbers.txt"
    path.write_text("\n\n".join(" ".join(map(str, range(i, i + 10))) for i in range(0, count, 10)))
    return path


@pytest.mark.parametrize("count", [1000, 250], ids=["room", "overlapping"])
@pytest.mark.parametrize("seed", range(4))
def test_the_probe_shares_no_token_with_the_calibration(seed: int, count: int, tmp_path: Path) -> None:
    tokens = draw(calibration(str(numbers(tmp_path, count)), seed=seed), Counting(), 128)
    assert not set(tokens.windows[0].flatten().tolist()) & set(tokens.probe_NT.flatten().tolist())
    assert tokens.probe_NT.unique().numel() == tokens.probe_NT.numel()


def test_every_token_is_drawn_once_while_there_is_room(tmp_path: Path) -> None:
    tokens = draw(calibration(str(numbers(tmp_path, 1000))), Counting(), 128)
    assert tokens.windows[0].unique().numel() == 5 * 40


def test_overlapping_windows_are_told(tmp_path: Path) -> None:
    tokens = draw(calibration(str(numbers(tmp_path, 250))), Counting(), 128)
    assert tokens.name == "numbers.txt 5x40 seed 0, windows overlap: 90 tokens for 5 of them"


def test_the_probe_is_the_same_for_every_seed(tokenizer: Any) -> None:
    first, second = (draw(calibration(seed=seed), tokenizer, 128) for seed in (0, 1))
    assert torch.equal(first.probe_NT, second.probe_NT)


def test_a_short_source_is_used_more_than_once() -> None:
    drawn = windows(list(range(100)), 10, 40, random.Random(0))
    assert [len(window) for window in drawn] == [40] * 10


def test_every_document_is_opened_by_the_beginning_of_text(tokenizer: Any) -> None:
    documents = encode(["one two", "three"], tokenizer)
    assert [ids[0] for ids in documents] == [tokenizer.bos_token_id] * 2
    assert tokenizer.decode(documents[0][1:]) == "one two"


def test_the_default_length_is_what_the_model_takes(tokenizer: Any) -> None:
    assert draw(calibration(length=None), tokenizer, 100).windows[0].shape[1] == 100


def test_the_default_length_is_capped(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "long.txt"
    path.write_text("word " * 8 * LONGEST)
    assert draw(calibration(str(path), samples=1, length=None), tokenizer, 131072).windows[0].shape == (1, LONGEST)


# -- what is never asked ---------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents() -> list[str]:
    return builtin_documents(random.Random(0), 60_000)


@pytest.fixture(scope="module")
def said(documents: list[str]) -> set[str]:
    """Every sentence of the calibration documents, without the frame of questions and contexts."""
    text = " ".join(documents)
    for mark in ("Context: ", "Question: ", "Answer: ", "Again: ", "Summary: "):
        text = text.replace(mark, "\n")
    return {sentence.strip() for line in text.split("\n") for sentence in line.replace(". ", ".\n").split("\n")}


def test_the_splits_of_the_facts_are_disjoint() -> None:
    asked, shown = facts("evaluation"), facts("calibration")
    assert len(asked) + len(shown) == len(facts())
    assert not {(f.relation, f.subject) for f in asked} & {(f.relation, f.subject) for f in shown}


def test_no_evaluation_fact_is_stated_in_calibration(said: set[str]) -> None:
    stated = {
        statement.format(s=fact.subject, o=fact.object)
        for fact in facts("evaluation")
        for statement in (*WORDINGS[fact.relation].statements, WORDINGS[fact.relation].cloze)
    }
    shown = {
        statement.format(s=fact.subject, o=fact.object)
        for fact in facts("calibration")
        for statement in WORDINGS[fact.relation].statements
    }
    assert not (said & stated) - shown  # `{s} is located in {o}` words a city and a country alike
    assert len(said & shown) > 100  # the sentences are recognised at all


@pytest.mark.slow
def test_no_evaluation_fact_is_asked_in_calibration(documents: list[str]) -> None:
    text = "\n".join(documents)
    asked = [
        f"{question.format(s=fact.subject)} Answer: {fact.object}."
        for fact in facts("evaluation")
        for question in (*WORDINGS[fact.relation].questions, WORDINGS[fact.relation].question)
    ]
    shown = {
        f"{question.format(s=fact.subject)} Answer: {fact.object}."
        for fact in facts("calibration")
        for question in WORDINGS[fact.relation].questions
    }
    assert [line for line in asked if line not in shown and f" {line}" in text] == []
    assert sum(line in text for line in shown) > 100


def test_no_held_out_wording_occurs_in_calibration(documents: list[str]) -> None:
    text = "\n".join(documents)
    held_out = [
        wording.format(s=fact.subject)
        for fact in facts("calibration")
        for wording in (WORDINGS[fact.relation].question, WORDINGS[fact.relation].cloze.split("{o}")[0].rstrip())
    ]
    trained = {
        wording.format(s=fact.subject, o=fact.object)
        for fact in facts("calibration")
        for wording in WORDINGS[fact.relation].statements + WORDINGS[fact.relation].questions
    }
    assert [w for w in held_out if f" {w}" in text and not any(t.startswith(w) for t in trained)] == []


def names_in(texts: list[str]) -> set[str]:
    """Capitalised words that are no part of the documents' own vocabulary."""
    frame = " ".join(f"{a} {b}" for pair in INVENTED.values() for a, b in [(" ".join(pair[0]), " ".join(pair[1]))])
    own = {word.strip(".,?;:[]{}\"'-") for word in frame.split()}
    own |= {"Context", "Question", "Answer", "List", "Again", "Record", "Summary", "Words", "Write", "JSON"}
    words = {word.strip(".,?;:[]{}\"'-") for text in texts for word in text.split()}
    return {word for word in words if word[:1].isupper() and word.isalpha()} - own


def test_invented_names_of_the_evaluation_never_occur_in_calibration(documents: list[str]) -> None:
    questions = [q for size in (1, 3, 8) for q in in_context(size, 200)]
    questions += [q for task in ("copy", "summary", "format") for q in task_questions(task, 200)]
    asked = names_in([f"{q.prompt} {q.answer}" for q in questions])
    real = {word for fact in facts() for word in f"{fact.subject} {fact.object}".split()}
    assert len(asked) > 1000
    assert not (asked & names_in(documents)) - real


def test_the_shares_of_names_are_disjoint() -> None:
    drawn = {use: {invented_name(random.Random(i), use) for i in range(300)} for use in NAME_SHARES}
    assert drawn["evaluation"].isdisjoint(drawn["calibration"])
    assert drawn["evaluation"].isdisjoint(drawn["training"])
    assert drawn["calibration"].isdisjoint(drawn["training"])


def test_the_evaluation_text_is_not_calibration_text() -> None:
    from compress.calibration import TEXTS

    evaluation = {line for line in (TEXTS / "evaluation.txt").read_text(encoding="utf-8").splitlines() if line}
    assert evaluation.isdisjoint(builtin_text())


# -- sources ---------------------------------------------------------------------------------------

LINES = [f"document number {i} speaks of rivers and roads at some length" for i in range(60)]


@pytest.fixture
def same_tokens(tokenizer: Any) -> Tensor:
    return torch.tensor([token for ids in encode(LINES, tokenizer) for token in ids])


def test_paragraphs_of_a_text_file_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_text("\n\n".join(LINES) + "\n\n\n\n")
    assert [document.strip() for document in read_documents(path)] == LINES


def test_text_fields_of_json_lines_are_documents(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": line, "id": 3}) for line in LINES) + "\n\n")
    assert read_documents(path) == LINES


def test_separators_inside_a_json_line_do_not_end_it(tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": "one\u2028two\u0085three\x0cfour"}, ensure_ascii=False), encoding="utf-8")
    assert read_documents(path) == ["one\u2028two\u0085three\x0cfour"]


def test_the_text_column_of_a_datasets_folder_is_documents(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"text": LINES}).save_to_disk(str(tmp_path / "saved"))
    assert read_documents(tmp_path / "saved") == LINES


@pytest.mark.parametrize("suffix", ["txt", "jsonl"])
def test_a_file_is_drawn_from(suffix: str, tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / f"corpus.{suffix}"
    path.write_text("\n\n".join(LINES) if suffix == "txt" else "\n".join(json.dumps({"text": line}) for line in LINES))
    tokens = draw(calibration(str(path)), tokenizer, 128)
    assert tokens.name == f"corpus.{suffix} 5x40 seed 0"
    assert tuple(tokens.windows[0].shape) == (5, 40)


# -- refusals --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["nothing.txt", "nothing.jsonl", "mixd"])
def test_a_missing_source_is_refused(name: str, tokenizer: Any, tmp_path: Path) -> None:
    with pytest.raises(CalibrationError, match=r"cannot be read \(FileNotFoundError\); allowed: text, mixed, a \.txt"):
        draw(calibration(str(tmp_path / name)), tokenizer, 128)


@pytest.mark.parametrize("content", [b"", b"too short", b"\n\n\n"])
def test_a_source_without_room_for_a_window_and_the_probe_is_refused(
    content: bytes, tokenizer: Any, tmp_path: Path
) -> None:
    path = tmp_path / "short.txt"
    path.write_bytes(content)
    with pytest.raises(CalibrationError, match=r"short\.txt has \d+ tokens, but 200 are needed"):
        draw(calibration(str(path)), tokenizer, 128)


def test_a_file_that_is_no_text_is_refused(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "corpus.txt"
    path.write_bytes(b"\xff\xfe\x00\x80")
    with pytest.raises(CalibrationError, match=r"cannot be read \(UnicodeDecodeError\)"):
        draw(calibration(str(path)), tokenizer, 128)


def test_json_is_read_however_it_is_called(tmp_path: Path) -> None:
    entries = [{"text": "one"}, {"text": "two\n\nthree"}]
    lines = "\n".join(map(json.dumps, entries))
    for name, content in {
        "a.JSONL": lines,
        "b.json": lines,
        "c.json": json.dumps(entries, indent=1),
        "d.ndjson": lines,
    }.items():
        (tmp_path / name).write_text(content)
        assert read_documents(tmp_path / name) == ["one", "two\n\nthree"]
    (tmp_path / "e.MD").write_text("one\n\ntwo")
    assert read_documents(tmp_path / "e.MD") == ["one", "two"]


@pytest.mark.parametrize("name", ["a.csv", "a.parquet", "a"])
def test_files_of_other_kinds_are_not_taken_for_prose(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text('"text"\n"one"\n')
    with pytest.raises(CalibrationError, match=r"is not read; allowed: text, mixed, a \.txt, \.jsonl or \.json file"):
        read_documents(tmp_path / name)


@pytest.mark.parametrize("content", ["[1]", '[{"content": "x"}]', "[{]", '["text"]'])
def test_a_malformed_json_list_is_refused(content: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(CalibrationError, match=r"a\.json(\[0\]: expected a JSON object| is not readable as JSON)"):
        read_documents(tmp_path / "a.json")


@pytest.mark.parametrize("line", ["{", "3", "[]", "null", '{"content": "x"}', '"text"'])
def test_a_malformed_json_line_is_refused_by_number(line: str, tmp_path: Path) -> None:
    path = tmp_path / "corpus.jsonl"
    path.write_text(json.dumps({"text": "fine"}) + f"\n{line}\n")
    with pytest.raises(CalibrationError, match=r"corpus\.jsonl:2: expected a JSON object with a `text` field"):
        read_documents(path)


@pytest.mark.parametrize("value", ["3", "null", '["a"]'])
def test_a_text_that_is_no_text_is_refused(value: str) -> None:
    with pytest.raises(CalibrationError, match="here: `text` is neither a string nor a list of messages"):
        document_of(f'{{"text": {value}}}', "here")


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    with pytest.raises(CalibrationError, match="is not a datasets folder: "):
        read_documents(tmp_path)


def test_a_dataset_without_text_is_refused(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    datasets.Dataset.from_dict({"content": LINES}).save_to_disk(str(tmp_path / "saved"))
    with pytest.raises(CalibrationError, match="no column 'text'; it has content"):
        read_documents(tmp_path / "saved")


def test_a_window_longer_than_the_model_takes_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"calibration\.length: windows of 200 tokens, but the model takes 128"):
        draw(calibration(length=200), tokenizer, 128)


# -- one window a document -------------------------------------------------------------------------


@pytest.fixture
def lines(tmp_path: Path) -> Path:
    """Forty documents of different lengths, as JSON lines."""
    path = tmp_path / "documents.jsonl"
    words = builtin_text()[0].split()
    texts = [" ".join(words[i : i + 8 + i]) for i in range(40)]
    path.write_text("".join(json.dumps({"text": text, "body": "so " * 50}) + "\n" for text in texts))
    return path


def test_a_window_of_one_document_is_cut_but_never_padded(lines: Path, tokenizer: Any) -> None:
    tokens = draw(calibration(str(lines), layout="documents", samples=9), tokenizer, 128)
    assert sum(len(ids) for ids in tokens.windows) == 9
    assert len({ids.shape[1] for ids in tokens.windows}) == len(tokens.windows) > 1
    assert max(ids.shape[1] for ids in tokens.windows) == 40
    assert all(bool((ids[:, 0] == tokenizer.bos_token_id).all()) for ids in tokens.windows)
    assert not any(bool((ids == tokenizer.pad_token_id).any()) for ids in tokens.windows)
    assert "documents up to 9x40" in tokens.name


def test_more_documents_than_there_are_is_refused(lines: Path, tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"has \d+ documents of at least 8 tokens beside .*; 40 are needed"):
        draw(calibration(str(lines), layout="documents", samples=40), tokenizer, 128)


def test_another_field_is_read_when_asked(lines: Path) -> None:
    assert read_documents(lines, "body")[0] == "so " * 50


# -- conversations ---------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}<s>{{ m['role'] }}: {{ m['content'] }}</s>{% endfor %}"


@pytest.fixture
def instruct(tokenizer: Any) -> Any:
    import copy

    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATE
    return own


def test_a_conversation_goes_through_the_template(instruct: Any) -> None:
    said = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
    (ids,) = encode([said], instruct, chat=True)
    assert instruct.decode(ids) == instruct.decode(instruct("<s>user: one</s><s>assistant: two</s>")["input_ids"])


def test_a_plain_text_is_what_a_user_said(instruct: Any) -> None:
    assert encode(["one"], instruct, chat=True) == encode([[{"role": "user", "content": "one"}]], instruct, chat=True)


def test_messages_of_a_file_are_read_and_named(instruct: Any, tmp_path: Path) -> None:
    path = tmp_path / "chat.jsonl"
    turn = [{"role": "user", "content": "one two three " * 20}]
    path.write_text((json.dumps({"messages": turn}) + "\n") * 30)
    tokens = draw(calibration(str(path), chat=True, layout="documents"), instruct, 128)
    assert tokens.name == "chat.jsonl chat documents up to 5x40 seed 0"


def test_a_tokenizer_without_a_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match="the tokenizer of this model has no chat template"):
        encode(["one"], tokenizer, chat=True)


def test_a_conversation_is_not_read_as_text(tokenizer: Any) -> None:
    with pytest.raises(CalibrationError, match=r"set calibration\.chat to true"):
        encode([[{"role": "user", "content": "one"}]], tokenizer)


@pytest.mark.parametrize("value", ['[{"role": "user"}]', "[]", '[{"role": 1, "content": "x"}]'])
def test_a_malformed_conversation_is_refused(value: str) -> None:
    with pytest.raises(CalibrationError, match="here: "):
        document_of(f'{{"messages": {value}}}', "here", "messages")


# -- datasets --------------------------------------------------------------------------------------


def test_a_split_of_a_saved_dataset_is_read(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    parts = {name: datasets.Dataset.from_dict({"text": [name] * 3}) for name in ("train", "rest")}
    datasets.DatasetDict(parts).save_to_disk(str(tmp_path / "saved"))
    assert read_documents(tmp_path / "saved", split="rest") == ["rest"] * 3
    with pytest.raises(CalibrationError, match="no split 'test'; it has rest, train"):
        read_documents(tmp_path / "saved", split="test")


def test_a_folder_of_json_lines_is_a_dataset(tmp_path: Path) -> None:
    pytest.importorskip("datasets")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')
    assert read_documents(tmp_path / "data") == ["one", "two"]


def test_the_hub_is_asked_by_name_and_configuration(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    asked: list[Any] = []

    def load(*names: Any, **options: Any) -> list[dict[str, str]]:
        asked.append((names, options))
        return [{"text": "one"}]

    monkeypatch.setattr(datasets, "load_dataset", load)
    assert read_documents("hub:someone/wiki:raw", split="test") == ["one"]
    assert asked == [(("someone/wiki", "raw"), {"split": "test", "streaming": True})]


def test_a_hub_that_cannot_be_reached_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")

    def fail(*_: Any, **__: Any) -> None:
        raise ConnectionError("no route\nto host")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    with pytest.raises(CalibrationError, match=r"hub:someone/wiki cannot be loaded: no route to host$"):
        read_documents("hub:someone/wiki")
