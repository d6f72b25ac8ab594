"""Rows come from the given folder and match its manifest, and nothing is downloaded unless it was asked for."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from compress.errors import ArtifactError, RecipeError
from compress_evals import data
from compress_evals.data import HUB, Unavailable, available, read, subset
from compress_evals.results import Data


def put(folder: Path, name: str, content: str) -> bytes:
    """Write a file of a data folder, and give its bytes."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    raw = content.encode()
    path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
    return path.read_bytes()


def manifest(folder: Path, name: str, sha256: str) -> None:
    (folder / "manifest.json").write_text(json.dumps([{"file": name, "sha256": sha256}]))


@pytest.mark.parametrize("ending", [".jsonl", ".jsonl.gz"])
def test_rows_of_json_lines_are_read_with_their_hash(tmp_path: Path, ending: str) -> None:
    raw = put(tmp_path, f"set/test{ending}", '{"a": 1}\n{"a": 2}\n')
    found = read("set/test", tmp_path, online=False)
    assert found.rows == [{"a": 1}, {"a": 2}]
    assert (found.source, found.name) == ("data folder", f"set/test{ending}")
    assert found.sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize("ending", [".txt", ".txt.gz"])
def test_a_text_is_a_row_a_line(tmp_path: Path, ending: str) -> None:
    put(tmp_path, f"set/eval{ending}", "one | 1\n\ntwo | 2\n")
    assert read("set/eval", tmp_path, online=False).rows == [{"text": "one | 1"}, {"text": "two | 2"}]


def test_only_a_newline_ends_a_line(tmp_path: Path) -> None:
    texts = ["a\u2028b", "c\u0085d"]
    lines = "\n".join(json.dumps({"text": text}, ensure_ascii=False) for text in texts)
    put(tmp_path, "set/test.jsonl", lines)
    assert len(lines.splitlines()) == 4
    assert [row["text"] for row in read("set/test", tmp_path, online=False).rows] == texts


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}\n{"a": \n', "line 2 is not JSON"),
        ('{"a": 1}\n\n[1, 2]\n', "line 3 is not a JSON object"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, content: str, message: str) -> None:
    put(tmp_path, "set/test.jsonl", content)
    with pytest.raises(ArtifactError, match=message):
        read("set/test", tmp_path, online=False)


def test_bytes_that_are_no_text_or_no_archive_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"fine\n\xff\xfe\n")
    (tmp_path / "b.txt.gz").write_bytes(b"not gzip")
    with pytest.raises(ArtifactError, match=r"a\.txt: line 2 is not UTF-8"):
        read("a", tmp_path, online=False)
    with pytest.raises(ArtifactError, match=r"b\.txt\.gz: cannot be read"):
        read("b", tmp_path, online=False)


def test_a_file_that_is_not_the_manifests_is_refused(tmp_path: Path) -> None:
    raw = put(tmp_path, "set/test.jsonl.gz", '{"a": 1}\n')
    manifest(tmp_path, "set/test.jsonl.gz", "0" * 64)
    with pytest.raises(ArtifactError) as error:
        read("set/test", tmp_path, online=False)
    assert all(part in str(error.value) for part in ("set/test.jsonl.gz", hashlib.sha256(raw).hexdigest(), "0" * 64))
    with pytest.raises(ArtifactError, match="sha256"):
        available(["set/test"], tmp_path, online=False)


def test_a_manifest_that_agrees_and_one_that_is_broken(tmp_path: Path) -> None:
    good, bad = tmp_path / "good", tmp_path / "bad"
    raw = put(good, "test.jsonl", '{"a": 1}\n')
    manifest(good, "test.jsonl", hashlib.sha256(raw).hexdigest())
    assert read("test", good, online=False).rows == [{"a": 1}]
    put(bad, "test.jsonl", '{"a": 1}\n')
    (bad / "manifest.json").write_text('{"file": 1}')
    with pytest.raises(ArtifactError, match=r"manifest\.json: is not a list"):
        read("test", bad, online=False)


def test_nothing_outside_the_folder_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    put(folder, "set/test.jsonl", "{}\n")
    put(tmp_path, "secret.jsonl", "{}\n")
    os.symlink(tmp_path / "secret.jsonl", folder / "set" / "link.jsonl")
    for name in ("../secret", "set/link", str(tmp_path / "secret")):
        with pytest.raises(ArtifactError, match="leads outside the data folder"):
            read(name, folder, online=False)


def test_a_folder_that_is_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"--data-dir: .* is not a folder"):
        read("set/test", tmp_path / "nowhere", online=False)


def test_what_cannot_be_had_says_why(tmp_path: Path) -> None:
    with pytest.raises(Unavailable, match=r"mmlu/test: no data folder was given, and --online was not given"):
        read("mmlu/test", None, online=False)
    with pytest.raises(Unavailable, match=f"^mmlu/test: not in the data folder {tmp_path}, and --online was not given"):
        read("mmlu/test", tmp_path, online=False)
    with pytest.raises(Unavailable, match=r"freebaseqa/eval: not in .* no equivalent copy"):
        read("freebaseqa/eval", tmp_path, online=True)


def test_provenance_covers_everything_that_a_task_needs(tmp_path: Path) -> None:
    digests = [hashlib.sha256(put(tmp_path, name, text)).hexdigest() for name, text in (("a.jsonl", "{}\n"),)]
    assert available(["a"], tmp_path, online=False) == Data(source="data folder", name="a.jsonl", sha256=digests[0])
    digests.append(hashlib.sha256(put(tmp_path, "b.txt", "x\n")).hexdigest())
    both = available(["a", "b"], tmp_path, online=False)
    assert both == Data(
        source="data folder", name="a.jsonl, b.txt", sha256=hashlib.sha256("\n".join(digests).encode()).hexdigest()
    )
    reason = available(["a", "c"], tmp_path, online=False)
    assert isinstance(reason, str) and reason.startswith("c: not in the data folder")


def test_a_file_is_read_once(tmp_path: Path) -> None:
    put(tmp_path, "set/test.jsonl", "{}\n")
    first = read("set/test", tmp_path, online=False)
    assert read("set/test", tmp_path, online=False) is first


HUB_ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "triviaqa/no_context": (
        {"question": "Who?", "answer": {"value": "Onion", "aliases": ["Onion", "Onions"]}, "question_id": "x"},
        {"context": "Question: Who?\nAnswer:", "answer": "Onion", "aliases": ["Onion", "Onions"]},
    ),
    "nq/questions": ({"question": "who", "answer": ["a", "b"]}, {"question": "who", "answers": ["a", "b"]}),
    "mmlu/test": (
        {"question": "q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2},
        {"question": "q", "subject": "anatomy", "choices": ["a", "b", "c", "d"], "answer": 2},
    ),
    "arc/easy_test": (
        {"question": "q", "choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"},
        {"query": "Question: q", "choices": ["a", "b"], "gold": 1},
    ),
    "piqa/validation": (
        {"goal": "dresser", "sol1": "a", "sol2": "b", "label": 1},
        {"query": "Question: dresser\n", "choices": ["a", "b"], "gold": 1},
    ),
    "winogrande/validation": (
        {"sentence": "Sarah met Maria so _ left.", "option1": "Sarah", "option2": "Maria", "answer": "2"},
        {
            "context_options": ["Sarah met Maria so Sarah", "Sarah met Maria so Maria"],
            "continuation": "left.",
            "gold": 1,
        },
    ),
    "boolq/validation": (
        {"question": "is it", "passage": "It is.", "label": 1, "idx": 0},
        {"query": "Passage: It is.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1},
    ),
    "hellaswag/validation": (
        {
            "activity_label": "Roofing",
            "ctx_a": "A man is on a roof [title] He",
            "ctx_b": "he",
            "endings": ["[step] sits.", "falls."],
            "label": "1",
        },
        {"query": "Roofing: A man is on a roof. He He", "choices": ["sits.", "falls."], "gold": 1},
    ),
    "ifeval/input_data": (
        {"key": 1, "prompt": "p", "instruction_id_list": ["a"], "kwargs": [{"num": 3, "other": None}]},
        {"key": 1, "prompt": "p", "instruction_id_list": ["a"], "kwargs": [{"num": 3}]},
    ),
}


@pytest.mark.parametrize("name", HUB_ROWS)
def test_a_row_of_the_hub_becomes_one_of_the_folders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    theirs, ours = HUB_ROWS[name]
    asked = []

    def load_dataset(*arguments: Any, **options: Any) -> list[dict[str, Any]]:
        asked.append((arguments, options))
        return [theirs]

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    data._from_hub.cache_clear()
    found = read(name, None, online=True)
    data._from_hub.cache_clear()
    assert found.rows == [ours]
    assert asked == [((HUB[name].path, HUB[name].config), {"split": HUB[name].split})]  # no trust_remote_code
    assert (
        found.source == "hub" and found.sha256 == hashlib.sha256(json.dumps(ours, sort_keys=True).encode()).hexdigest()
    )


def test_a_hub_that_fails_or_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*arguments: Any, **options: Any) -> None:
        raise ConnectionError("no route\nto the hub")

    monkeypatch.setattr("datasets.load_dataset", offline)
    reason = available(["gsm8k/test"], None, online=True)
    assert reason == "gsm8k/test: the hub's openai/gsm8k/main/test could not be read: no route"
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: [{"text": "x"}])
    with pytest.raises(ArtifactError, match=r"nq/questions: the hub's .* no longer has the expected columns"):
        read("nq/questions", None, online=True)


def test_the_folder_is_asked_before_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.load_dataset", lambda *a, **k: pytest.fail("the hub was asked"))
    put(tmp_path, "nq/oracle.jsonl", '{"question": "q"}\n')
    assert read("nq/questions", tmp_path, online=True).name == "nq/oracle.jsonl"


def test_a_subset_is_in_proportion_nested_and_the_same_for_every_wording() -> None:
    documents = [{"id": f"open:{i}", "tier": "a" if i < 300 else "b"} for i in range(400)]
    chosen = subset(documents, 40, seed=0)
    assert sum(i < 300 for i in chosen) == 30
    assert set(chosen) < set(subset(documents, 80, seed=0))
    assert chosen == subset([{**d, "id": d["id"].replace("open", "closed")} for d in documents], 40, seed=0)
