"""Questions, prepared without any model: availability, provenance, chat templates, lengths and hashes."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from compress.errors import RecipeError
from compress_evals import questions
from compress_evals.questions import Exam, lengths, prepare, prompt_and_then, wanted
from compress_evals.results import Data
from compress_evals.suite import FACTS, KICK, Suite

TEMPLATE = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}[assistant]"


def needing(*names: str) -> Suite:
    """The facts, whose tasks called so need real data."""
    tasks = tuple(replace(t, needs=("freebaseqa/eval",)) if t.name in names else t for t in FACTS.tasks)
    return replace(FACTS, tasks=tasks)


def exam(tokenizer: Any, suite: Suite = FACTS, only: str = "facts_context1", **options: Any) -> Exam:
    return prepare(suite, tokenizer, only=[only], limit=6, **options)


def test_a_task_whose_data_are_missing_is_skipped_and_says_why(tokenizer: Any) -> None:
    found = prepare(needing("facts_copy"), tokenizer, only=["facts_copy", "facts_context1"], limit=4)
    assert [asked.task.name for asked in found.tasks] == ["facts_context1"]
    skipped = found.skipped["facts_copy"]
    assert (skipped.title, skipped.family) == ("Copy a list", "instructions")
    assert "freebaseqa/eval" in skipped.reason and "--online" in skipped.reason


def test_if_nothing_is_left_the_ways_out_are_named(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match=r"freebaseqa/eval.*--data-dir FOLDER.*--online.*--suite facts"):
        prepare(needing("facts_copy"), tokenizer, only=["facts_copy"])


def test_a_reason_that_many_tasks_share_is_said_once(tokenizer: Any) -> None:
    with pytest.raises(RecipeError) as error:
        prepare(KICK, tokenizer)
    assert str(error.value).startswith(
        "kick: no task can be asked: freebaseqa/eval, triviaqa/no_context, nq/questions and 14 more: "
        "no data folder was given, and --online was not given; give --data-dir FOLDER"
    )
    assert questions.grouped(["a: none", "b: broken", "c: none", "a: none"]) == "a, c: none; b: broken"


def test_data_that_are_had_are_named(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "freebaseqa").mkdir()
    (tmp_path / "freebaseqa" / "eval.jsonl").write_text('{"question": "q"}\n')
    [asked] = exam(tokenizer, needing("facts_context1"), data_dir=tmp_path).tasks
    assert (asked.data.source, asked.data.name) == ("data folder", "freebaseqa/eval.jsonl")
    assert exam(tokenizer).tasks[0].data.source == "built in"


def test_a_task_that_does_not_exist_is_named_with_its_nearest(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match=r"no task 'facts_contxt1'; did you mean 'facts_context1'"):
        exam(tokenizer, only="facts_contxt1")


@pytest.mark.slow
def test_lengths_are_those_of_what_lm_eval_encodes(model: Any, tokenizer: Any) -> None:
    from compress_evals.scorer import Scorer

    for only in ("facts_context8", "facts_mc", "facts_generate"):
        found = exam(tokenizer, only=only)
        scorer, [asked] = Scorer(model, found.tokenizer, 4), found.tasks
        needed = [
            max(
                len(scorer.tok_encode(prompt)) + then["max_gen_toks"]
                if isinstance(then, dict)
                else sum(map(len, scorer._encode_pair(prompt, then))) - 1
                for prompt, then in requests
            )
            for requests in asked.requests
        ]
        assert lengths(asked, found.tokenizer) == needed


def test_a_chat_template_wraps_every_prompt_once(tokenizer: Any) -> None:
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    plain, wrapped = exam(tokenizer), exam(chatting, chat_template=True)
    assert plain.chat_template is None and len(str(wrapped.chat_template)) == 64
    assert wrapped.tasks[0].prompt(0) == f"<s>[user]{plain.tasks[0].prompt(0)}[assistant]"
    assert plain.tasks[0].sha256 != wrapped.tasks[0].sha256
    scored = [f"{prompt}{then}" for [(prompt, then)] in wrapped.tasks[0].requests]
    bare = [len(ids) for ids in chatting(scored, add_special_tokens=False).input_ids]
    assert lengths(wrapped.tasks[0], wrapped.tokenizer) == [length - 1 for length in bare]  # no second BOS


def test_a_target_after_a_chat_template_begins_without_a_space(tokenizer: Any) -> None:
    chatting = copy.deepcopy(tokenizer)
    chatting.chat_template = TEMPLATE
    for chosen, begins in ((exam(tokenizer), " "), (exam(chatting, chat_template=True), "")):
        target = prompt_and_then(chosen.tasks[0].requests[0][0])[1]
        assert isinstance(target, str) and target == begins + target.strip() != ""


def test_a_tokenizer_without_a_chat_template_is_refused(tokenizer: Any) -> None:
    with pytest.raises(RecipeError, match="--chat-template"):
        exam(tokenizer, chat_template=True)


@pytest.mark.slow
def test_what_is_wanted_is_the_first_answer_or_the_right_choice(tokenizer: Any) -> None:
    for only in ("facts_context1", "facts_mc", "facts_generate"):
        [asked] = exam(tokenizer, only=only).tasks
        for i in range(6):
            assert wanted(asked, i).rstrip(".") == asked.document(i)["answer"]


def test_what_is_wanted_of_two_beginnings_is_one_of_them(tokenizer: Any, tmp_path: Path) -> None:
    row = {
        "context_options": ["The cup fell because Ann", "The cup fell because Bo"],
        "continuation": "ran.",
        "gold": 1,
    }
    (tmp_path / "winogrande").mkdir()
    (tmp_path / "winogrande" / "validation.jsonl").write_text(json.dumps(row))
    [asked] = prepare(KICK, tokenizer, only=["kick_winogrande"], data_dir=tmp_path).tasks
    assert wanted(asked, 0) == "The cup fell because Bo"


def edited(tmp_path: Path, name: str, old: str, new: str) -> Suite:
    folder = shutil.copytree(FACTS.folder, tmp_path / "facts")
    text = (folder / name).read_text()
    assert old in text
    (folder / name).write_text(text.replace(old, new))
    return replace(FACTS, folder=folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("functions.py", '"target": f" {question.answer}."', '"target": f" {question.answer}!"'),  # a document
        ("functions.py", "bool(is_greedy) and", "True and"),  # the scoring
        ("_base.yaml", "functions.greedy_match", "functions.strict_choice"),  # another scoring
        ("_base.yaml", "doc_to_text: prompt", 'doc_to_text: "{{prompt}} "'),  # the prompt
        ("_base.yaml", "doc_to_target: target", 'doc_to_target: "{{target}}!"'),
    ],
)
def test_an_edit_of_documents_prompts_or_scoring_is_another_hash(
    tokenizer: Any, tmp_path: Path, name: str, old: str, new: str
) -> None:
    before, same = exam(tokenizer).tasks[0].sha256, exam(tokenizer).tasks[0].sha256
    assert before == same
    assert exam(tokenizer, edited(tmp_path, name, old, new)).tasks[0].sha256 != before


def test_an_edit_of_generation_options_is_another_hash(tokenizer: Any, tmp_path: Path) -> None:
    suite = edited(tmp_path, "facts_generate.yaml", "max_gen_toks: 32", "max_gen_toks: 16")
    assert (
        exam(tokenizer, suite, "facts_generate").tasks[0].sha256
        != exam(tokenizer, only="facts_generate").tasks[0].sha256
    )


@pytest.mark.parametrize("edited", ["metrics/answers.py", "tasks/facts/functions.py"])
def test_an_edit_of_what_suites_share_is_another_hash(
    edited: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    before = questions.code(KICK)
    for folder in ("metrics", "tasks"):
        shutil.copytree(questions.PACKAGE / folder, tmp_path / folder)
    monkeypatch.setattr(questions, "PACKAGE", tmp_path)
    assert questions.code(KICK) == before
    (tmp_path / edited).write_text("")
    assert questions.code(KICK) != before


def test_only_what_code_does_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in ("metrics", "tasks"):
        shutil.copytree(questions.PACKAGE / folder, tmp_path / folder)
    monkeypatch.setattr(questions, "PACKAGE", tmp_path)
    facts = replace(FACTS, folder=tmp_path / "tasks" / "facts")
    (tmp_path / "metrics" / "new.py").write_text('"""One."""\ndef f():\n    """Two."""\n    return None\n')
    before = questions.code(facts)
    for same in ("def f():\n    return None", '"""1"""\ndef f( ):  # a comment\n    """2"""\n\n    return (None)\n'):
        (tmp_path / "metrics" / "new.py").write_text(same)
        assert questions.code(facts) == before
    for other in ("def f():\n    return", "def f():\n    return False", "def f():\n    return 'Two.'"):
        (tmp_path / "metrics" / "new.py").write_text(other)
        assert questions.code(facts) != before
    (tmp_path / "metrics" / "new.py").unlink()
    before = questions.code(facts)
    with (tmp_path / "tasks" / "facts" / "_base.yaml").open("a") as stream:
        stream.write("# any byte of another file counts\n")
    assert questions.code(facts) != before


def test_a_tokenizers_identity_is_not_changed_by_using_it(tokenizer: Any) -> None:
    before = questions.identity(tokenizer)
    tokenizer(["a", "a b c"], padding="longest", truncation=True, max_length=2)
    assert questions.identity(tokenizer) == before
    other = copy.deepcopy(tokenizer)
    other.add_tokens(["<new>"])
    assert questions.identity(other) != before


def test_a_sample_is_fixed_and_part_of_what_is_asked(tokenizer: Any) -> None:
    whole = prepare(FACTS, tokenizer, only=["facts_trained"], limit=40)
    part = questions.sample(whole.tasks[0], whole, 10)
    assert len(part.chosen) == 10 and set(part.chosen) <= set(whole.tasks[0].chosen)
    assert part.requests == questions.sample(whole.tasks[0], whole, 10).requests
    assert [part.document(i)["prompt"] for i in range(10)] == [part.prompt(i) for i in range(10)]
    assert isinstance(part.data, Data)


def test_a_task_that_generates_more_than_a_context_is_skipped_and_says_so(tokenizer: Any) -> None:
    found = prepare(FACTS, tokenizer, only=["facts_generate", "facts_mc"], limit=4)
    assert questions.within(found, 512) == found
    short = questions.within(found, 32)
    assert [asked.task.name for asked in short.tasks] == ["facts_mc"]
    assert short.skipped["facts_generate"].reason == "it generates up to 32 tokens, and the model's context is 32"
    with pytest.raises(RecipeError, match="no task fits this model: facts_generate"):
        questions.within(exam(tokenizer, only="facts_generate"), 32)
