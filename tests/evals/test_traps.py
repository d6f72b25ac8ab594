"""Pitfalls of lm-eval (observed in 0.4.13), one test each: none of them can lead to a wrong number here.

Pitfalls that other files test: an offline hub, and lines that `str.splitlines` would split (test_data.py); prompts
longer than the context, and a run that reseeds or prints (test_run.py); unpaired comparisons (test_stats.py).
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.errors import ArtifactError
from compress_evals import run
from compress_evals.data import read
from compress_evals.suite import FACTS, KICK, TASKS
from compress_evals.tasks.facts import functions as facts_functions
from compress_evals.tasks.kick import functions as kick_functions

FILES = sorted(TASKS.rglob("*.yaml"))
SOURCES = sorted(TASKS.parent.rglob("*.py"))
GENERATES = "facts_generate"


def config(path: Path) -> dict[str, Any]:
    """A task file with what it includes, as lm-eval reads it."""
    from lm_eval.tasks._yaml_loader import load_yaml

    return dict(load_yaml(path))


@pytest.fixture(scope="module")
def tasks() -> dict[str, dict[str, Any]]:
    found = [config(path) for path in FILES]
    return {each["task"]: each for each in found if isinstance(each.get("task"), str)}


@pytest.fixture(scope="module")
def stranger(model: Any) -> Any:
    """A model of the same shape that says other things."""
    other = copy.deepcopy(model)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.copy_(torch.randn_like(parameter) / 8)
    return other


def said(model: Any, tokenizer: Any, **options: Any) -> list[str | None]:
    results = run.evaluate(model, tokenizer, name="tiny", limit=8, only=[GENERATES], **options)
    return [row.said for row in results.rows[GENERATES]]


def test_a_second_model_is_not_given_the_first_ones_answers(
    model: Any, stranger: Any, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # use_cache knows no model and cache_requests no data: neither may leave a file anywhere that it would
    from lm_eval.caching import cache

    monkeypatch.chdir(tmp_path)
    beside = sorted(Path(cache.PATH).glob("**/*")) if Path(cache.PATH).exists() else []
    first, second = said(model, tokenizer), said(stranger, tokenizer)
    assert all(a != b for a, b in zip(first, second, strict=True))
    assert said(model, tokenizer) == first
    assert list(tmp_path.iterdir()) == []
    assert (sorted(Path(cache.PATH).glob("**/*")) if Path(cache.PATH).exists() else []) == beside


def test_lm_evals_caches_are_named_nowhere() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCES}
    callers = {path: text for path, text in texts.items() if "from lm_eval" in text}
    assert callers
    for path, text in callers.items():
        assert not re.search(r"use_cache=(?!False)|cache_requests=(?!False)", text), path


def test_a_task_file_that_lm_eval_drops_is_an_error(tmp_path: Path) -> None:
    for path in KICK.folder.iterdir():
        if path.is_file():
            (tmp_path / path.name).write_bytes(path.read_bytes())
    (tmp_path / "kick_piqa.yaml").write_text("task: kick_piqa\n  broken: [\n")
    with pytest.raises(ArtifactError, match=r"could not read the task files of .*kick_piqa"):
        run.load_tasks(replace(KICK, folder=tmp_path))


def test_no_task_file_says_a_thing_twice() -> None:
    # PyYAML takes the last of two equal keys without a word; this reader refuses them
    from ruamel.yaml import YAML

    for path in FILES:
        assert YAML(typ="rt").load(path), path


@pytest.mark.slow
def test_no_path_depends_on_where_one_stands(
    tasks: dict[str, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert len(run.load_tasks(FACTS)) == len(FACTS.tasks)
    for name, found in tasks.items():
        assert callable(found["custom_dataset"]), name
        assert "dataset_path" not in found and "data_files" not in found.get("dataset_kwargs", {}), name


def test_documents_are_a_dataset_with_columns(tmp_path: Path) -> None:
    from datasets import Dataset

    (tmp_path / "piqa").mkdir()
    (tmp_path / "piqa" / "validation.jsonl").write_text('{"query": "q", "choices": ["a", "b"], "gold": 1}\n')
    for made in (facts_functions.load("copy", n=2), kick_functions.load("piqa", data_dir=str(tmp_path))):
        assert list(made) == ["test"] and isinstance(made["test"], Dataset)
        assert {"id", "cluster", "tier", "prompt", "target"} <= set(made["test"].features)


def test_scores_are_computed_here_and_half_stays_half(tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    # several targets and a metric in Python: lm-eval makes 1.0 of 0.5, and looks at the first document only
    from lm_eval.tasks import TaskManager

    assert all(callable(found["process_results"]) for found in tasks.values())
    (tmp_path / "nq").mkdir()
    (tmp_path / "nq" / "oracle.jsonl").write_text('{"question": "q", "answers": ["red house", "blue", "green"]}\n')
    manager = TaskManager(include_path=str(KICK.folder), include_defaults=False, metadata={"data_dir": str(tmp_path)})
    task = manager.load(["kick_nq_closed"])["tasks"]["kick_nq_closed"]
    assert task.multiple_target == 0
    assert task.process_results(task.eval_docs[0], ["red door"])["f1"] == 0.5
    assert task.process_results(task.eval_docs[0], ["green"])["em"] == 1.0


def test_a_target_that_looks_like_python_stays_text(tasks: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    # a template's text "[1, 2]" becomes a list, "7" a number: so fields are columns, never templates
    from lm_eval.tasks import TaskManager

    for name, found in tasks.items():
        for field in ("doc_to_text", "doc_to_target", "doc_to_choice"):
            assert re.fullmatch(r"\w+", found.get(field, "none")), (name, field)
    (tmp_path / "nq").mkdir()
    (tmp_path / "nq" / "oracle.jsonl").write_text('{"question": "[1, 2]", "answers": ["[1, 2]"]}\n')
    manager = TaskManager(include_path=str(KICK.folder), include_defaults=False, metadata={"data_dir": str(tmp_path)})
    task = manager.load(["kick_nq_closed"])["tasks"]["kick_nq_closed"]
    assert task.doc_to_target(task.eval_docs[0]) == " [1, 2]"
    assert task.doc_to_text(task.eval_docs[0]).endswith("Q: [1, 2]\nA:")


@pytest.mark.slow
def test_no_metric_is_fetched(tasks: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch) -> None:
    import evaluate

    monkeypatch.setattr(evaluate, "load", lambda *arguments, **options: pytest.fail(f"fetched {arguments}"))
    run.load_tasks(FACTS)
    assert all(metric["aggregation"] == "mean" for found in tasks.values() for metric in found["metric_list"])


@pytest.mark.slow
def test_a_limit_is_not_the_first_questions(model: Any, tokenizer: Any) -> None:
    results = run.evaluate(model, tokenizer, name="tiny", limit=8, only=["facts_context1"])
    ids = [document["id"] for document in run.load_tasks(FACTS)["facts_context1"].eval_docs]
    asked = [row.id for row in results.rows["facts_context1"]]
    assert asked != ids[:8] and set(asked) < set(ids)


def test_stops_are_newlines_and_not_two_characters(tasks: dict[str, dict[str, Any]]) -> None:
    stops = {stop for found in tasks.values() for stop in found.get("generation_kwargs", {}).get("until", [])}
    assert "\n" in stops and not any("\\" in stop for stop in stops)
    kick = {stop for name, found in tasks.items() if name.startswith("kick") for stop in found.get(
        "generation_kwargs", {}).get("until", [])}  # fmt: skip
    assert all(stop.startswith("\n") for stop in kick)  # "." or "," stands in right answers


def test_generation_is_greedy(tasks: dict[str, dict[str, Any]]) -> None:
    generating = [found for found in tasks.values() if found["output_type"] == "generate_until"]
    assert generating and all(found["generation_kwargs"]["do_sample"] is False for found in generating)


def test_a_chat_template_that_was_not_asked_for_is_not_applied(model: Any, tokenizer: Any) -> None:
    chatty = copy.deepcopy(tokenizer)
    chatty.chat_template = "{% for m in messages %}<user>{{ m['content'] }}{% endfor %}"
    plain = run.evaluate(model, tokenizer, name="tiny-chat-instruct", limit=8, only=[GENERATES])
    found = run.evaluate(model, chatty, name="tiny-chat-instruct", limit=8, only=[GENERATES])
    assert found.engine.chat_template is None
    assert found.tasks[GENERATES].task_hash == plain.tasks[GENERATES].task_hash
    assert [row.said for row in found.rows[GENERATES]] == [row.said for row in plain.rows[GENERATES]]


@pytest.mark.slow
def test_the_batch_size_is_stored_and_changes_nothing_in_float32(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"name": "tiny", "limit": 8, "only": [GENERATES, "facts_mc"]}
    one, many = (run.evaluate(model, tokenizer, batch_size=size, **options) for size in (1, 8))
    assert (one.engine.batch_size, many.engine.batch_size) == (1, 8)
    for task in one.tasks:
        assert [row.scores for row in one.rows[task]] == [row.scores for row in many.rows[task]]


def test_no_code_of_a_data_set_is_run() -> None:
    for path in [*SOURCES, *FILES]:
        assert not re.search(r"trust_remote_code\W+\s*True", path.read_text(encoding="utf-8")), path


def test_lines_of_the_real_questions_are_not_broken(kick_data: Path) -> None:
    import gzip

    text = gzip.decompress((kick_data / "triviaqa" / "no_context.jsonl.gz").read_bytes()).decode()
    assert len(text.splitlines()) == 3001
    assert len(read("triviaqa/no_context", kick_data, online=False).rows) == 3000
