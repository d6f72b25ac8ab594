"""The suite through lm-eval: BOS, subsets, agreement with the training script's own scorer and with plain lm-eval."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import compress.builtin.facts
from compress.builtin.documents import Question, closed_book, in_context
from compress.builtin.facts import facts
from compress.builtin.gates import exact_match
from compress.errors import ArtifactError
from compress_evals import questions, run
from compress_evals.comparison import compare
from compress_evals.folders import model_name
from compress_evals.quiet import quiet
from compress_evals.results import Results
from compress_evals.scorer import Scorer
from compress_evals.suite import FACTS

WEIGHTS = Path(compress.builtin.facts.__file__).parent / "weights"
LIMIT = 48


@pytest.fixture(scope="module")
def progress() -> list[str]:
    return []


@pytest.fixture(scope="module")
def results(model: Any, tokenizer: Any, progress: list[str]) -> Iterator[Results]:
    yield run.evaluate(model, tokenizer, name="tiny", limit=LIMIT, batch_size=16, on_progress=progress.append)


def asked(results: Results, questions: list[Question], task: str) -> list[Question]:
    by_id = {question.id: question for question in questions}
    return [by_id[row.id] for row in results.rows[task]]


def right(results: Results, task: str) -> list[bool]:
    return [row.scores["acc"] == 1.0 for row in results.rows[task]]


@pytest.mark.slow
def test_every_task_is_measured_with_its_interval(results: Results, progress: list[str]) -> None:
    assert list(results.tasks) == [task.name for task in FACTS.tasks]
    assert all(result.n == LIMIT == len(results.rows[task]) for task, result in results.tasks.items())
    assert all(m.low <= m.value <= m.high for result in results.tasks.values() for m in result.metrics.values())
    assert len(progress) == len(FACTS.tasks)


def test_greedy_match_equals_the_gates_item_by_item(results: Results, model: Any, tokenizer: Any) -> None:
    questions = asked(results, closed_book(facts("evaluation"), "trained"), "facts_trained")
    expected = exact_match(model, tokenizer, questions)
    assert right(results, "facts_trained") == expected


def test_the_tiny_model_knows_some_and_not_all(model: Any, tokenizer: Any) -> None:
    # without this the equality above would hold between two scorers that always say no
    questions = closed_book(facts("evaluation"), "trained")[:16]
    with_bos = exact_match(model, tokenizer, questions)
    assert 3 <= sum(with_bos) <= 16


def test_greedy_match_equals_the_gates_on_learned_questions(
    model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(questions, "subset", lambda documents, limit, seed: list(range(limit)))
    results = run.evaluate(model, tokenizer, name="tiny", limit=32, only=["facts_trained"])
    expected = exact_match(
        model, tokenizer, asked(results, closed_book(facts("evaluation"), "trained"), "facts_trained")
    )
    assert any(expected) and not all(expected)
    assert right(results, "facts_trained") == expected


def test_prompts_begin_with_bos_once_in_scoring_and_generation(model: Any, tokenizer: Any) -> None:
    scorer = Scorer(model, run.beginning_with_bos(tokenizer), 4)
    context, continuation = scorer._encode_pair("Question: a Answer:", " b.")
    assert context[0] == tokenizer.bos_token_id and tokenizer.bos_token_id not in context[1:] + continuation
    ids, mask = scorer.tok_batch_encode(["Question: a Answer:", "Question: a longer one Answer:"])
    assert [row[keep.bool()][0].item() for row, keep in zip(ids, mask, strict=True)] == [tokenizer.bos_token_id] * 2
    assert (ids == tokenizer.bos_token_id).sum() == 2


@pytest.mark.parametrize("template", ["<s> $A </s>", "$A </s>", None])
def test_no_prompt_ends_before_its_answer(template: str | None, tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing

    ending = copy.deepcopy(tokenizer)
    if template is None:
        ending.add_bos_token = ending.add_eos_token = True
    else:
        specials = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
        ending.backend_tokenizer.post_processor = TemplateProcessing(single=template, special_tokens=specials)
    assert ending("a").input_ids[-1] == tokenizer.eos_token_id
    text, plain = "Question: a Answer:", run.beginning_with_bos(tokenizer)
    prepared = run.beginning_with_bos(ending)
    assert prepared(text).input_ids == plain(text).input_ids
    assert ending("a").input_ids[-1] == tokenizer.eos_token_id  # the caller's is left alone


def test_the_callers_tokenizer_is_left_alone(tokenizer: Any) -> None:
    assert run.beginning_with_bos(tokenizer) is not tokenizer
    assert tokenizer("a").input_ids[0] != tokenizer.bos_token_id
    prepared = run.beginning_with_bos(tokenizer)
    assert run.beginning_with_bos(prepared) is prepared


def test_a_tokenizer_without_bos_is_used_as_it_is(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    assert run.beginning_with_bos(bare) is bare


def test_evaluating_does_not_reseed(model: Any, tokenizer: Any) -> None:
    before = np.random.get_state()[1].tolist(), torch.get_rng_state()
    run.evaluate(model, tokenizer, name="tiny", limit=2, only=["facts_context1"])
    assert np.random.get_state()[1].tolist() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])


def test_evaluating_is_silent(model: Any, tokenizer: Any, capfd: pytest.CaptureFixture[str]) -> None:
    run.evaluate(model, tokenizer, name="tiny", limit=2, only=["facts_context1", "facts_generate"])
    assert capfd.readouterr() == ("", "")


@pytest.mark.slow
def test_a_model_of_nans_scores_zero_everywhere(model: Any, tokenizer: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    found = run.evaluate(broken, tokenizer, name="nan", limit=4)
    assert [result.score.value for result in found.tasks.values()] == [0.0] * len(FACTS.tasks)


def test_the_subset_is_seeded_nested_and_in_proportion_to_tiers() -> None:
    tiers = ["head"] * 100 + ["torso"] * 200 + ["tail"] * 100
    documents = [{"id": f"trained:r:{i}", "tier": tier} for i, tier in enumerate(tiers)]
    chosen = questions.subset(documents, 40, seed=0)
    assert chosen == sorted(chosen) == questions.subset(documents, 40, seed=0)
    assert [sum(documents[i]["tier"] == tier for i in chosen) for tier in ("head", "torso", "tail")] == [10, 20, 10]
    assert set(questions.subset(documents, 20, seed=0)) < set(chosen)
    assert questions.subset(documents, 40, seed=1) != chosen
    assert questions.subset(documents, None, seed=0) == questions.subset(documents, 500, seed=0) == list(range(400))


def test_a_limit_asks_about_the_same_facts_in_every_wording(results: Results) -> None:
    asked_about = [
        {row.id.partition(":")[2] for row in results.rows[task]}
        for task in ("facts_trained", "facts_cloze", "facts_open")
    ]
    assert asked_about[0] == asked_about[1] == asked_about[2]


def test_rows_are_the_questions_that_were_scored(results: Results) -> None:
    worlds = {question.id: question for question in in_context(3, 400)}
    assert all(row.id in worlds and row.cluster == worlds[row.id].cluster for row in results.rows["facts_context3"])
    assert all(row.said is not None for row in results.rows["facts_generate"])
    assert len({row.hash for row in results.rows["facts_trained"]}) == LIMIT


def test_prompts_longer_than_the_context_are_counted(model: Any, tokenizer: Any) -> None:
    options: dict[str, Any] = {"limit": 6, "only": ["facts_context8"]}
    short = copy.deepcopy(model)
    short.config.max_position_embeddings = 60
    assert run.evaluate(short, tokenizer, name="short", **options).tasks["facts_context8"].truncated == 6
    assert run.evaluate(model, tokenizer, name="long", **options).tasks["facts_context8"].truncated == 0


@pytest.mark.slow
def test_plain_lm_eval_gives_the_same_score(model: Any, tokenizer: Any) -> None:
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    ours = run.evaluate(model, tokenizer, name="tiny", only=["facts_context1"])
    with quiet():
        plain = simple_evaluate(
            model=HFLM(
                pretrained=model, tokenizer=run.beginning_with_bos(tokenizer), batch_size=64, add_bos_token=True
            ),
            tasks=["facts_context1"],
            task_manager=TaskManager(include_path=str(FACTS.folder), include_defaults=False),
            bootstrap_iters=0,
        )
    assert plain["results"]["facts_context1"]["acc,none"] == ours.tasks["facts_context1"].score.value


def test_a_model_against_itself_matches_or_asks_for_more(results: Results) -> None:
    comparison = compare(results, results)
    assert all(cell.paired.flips == 0 and cell.p_holm == 1 for cell in comparison.tasks.values())
    assert {cell.paired.verdict for cell in comparison.tasks.values()} <= {"matching", "inconclusive"}


def test_a_task_file_that_cannot_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "facts.yaml").write_text("group: facts\ntask: [facts_trained]\nmetadata: {version: 1}\n")
    (tmp_path / "facts_trained.yaml").write_text("task: facts_trained\n  broken: [\n")
    with pytest.raises(ArtifactError, match=r"could not read the task files of .*facts_trained"):
        run.load_tasks(replace(FACTS, folder=tmp_path))


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="the built-in model's weights are not packaged yet")
def test_the_builtin_model_scores_as_its_gates_say() -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    # float32: in bfloat16 the batch's shape alone flips about one answer in a thousand
    builtin = AutoModelForCausalLM.from_pretrained(WEIGHTS, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(WEIGHTS)
    forms = ("trained", "question", "cloze")
    results = run.evaluate(builtin, tokenizer, name="builtin", limit=60, only=[f"facts_{form}" for form in forms])
    for form in forms:
        questions = asked(results, closed_book(facts("evaluation"), form), f"facts_{form}")
        assert right(results, f"facts_{form}") == exact_match(builtin, tokenizer, questions)
    assert results.tasks["facts_trained"].score.value > 0.9


def test_a_model_is_called_by_its_folder_however_that_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "llama" / "small").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "llama" / "small")
    called = [model_name(source) for source in ("..", ".", "../small", "builtin")]
    assert called == ["llama", "small", "small", "builtin"]  # never where results would leave their folder
