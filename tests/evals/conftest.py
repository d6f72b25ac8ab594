"""Fixtures: a tiny model that has learned some of the questions, and handmade results."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from compress.builtin.documents import closed_book
from compress.builtin.facts import facts
from compress_evals.results import Data, Engine, Metric, ModelFacts, Results, Row, TaskResult, task_hash
from compress_evals.stats import mean_interval

ROOT = Path(__file__).parents[2]
LEARNED = 16  # questions the tiny model is trained on; it knows most of these and none of the others


@pytest.fixture(scope="session")
def kick_data() -> Path:
    """The folder of public data sets, which the project does not ship."""
    folder = Path(os.environ.get("KICK_DATA_DIR") or ROOT.parent / "shared" / "data" / "kick")
    if not (folder / "manifest.json").is_file():
        pytest.skip("no folder of real questions: set KICK_DATA_DIR")
    return folder


@pytest.fixture(scope="session")
def tokenizer() -> Any:
    """A byte-level BPE with single digits and no post-processor, like the built-in model's."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=["<s>", "</s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    texts = [f"{question.prompt} {question.answer}." for question in closed_book(facts(), "trained")]
    bpe.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token="<s>", eos_token="</s>", pad_token="<pad>", model_max_length=512
    )


@pytest.fixture(scope="session")
def model(tokenizer: Any) -> Any:
    """A two-layer float32 Llama that answers some trained questions correctly after a BOS token."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        num_hidden_layers=2,
        intermediate_size=128,
        num_attention_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    tiny = LlamaForCausalLM(config)
    questions = closed_book(facts("evaluation"), "trained")[:LEARNED]
    prompts = [len(tokenizer(f"<s>{question.prompt}").input_ids) for question in questions]
    rows = [tokenizer(f"<s>{question.prompt} {question.answer}.").input_ids for question in questions]
    ids = torch.full((len(rows), max(map(len, rows))), tokenizer.pad_token_id)
    labels = torch.full_like(ids, -100)
    for i, (begin, row) in enumerate(zip(prompts, rows, strict=True)):
        ids[i, : len(row)] = torch.tensor(row)
        labels[i, begin : len(row)] = torch.tensor(row[begin:])
    rule = torch.optim.AdamW(tiny.parameters(), lr=8e-3)
    for _ in range(35):
        tiny(input_ids=ids, labels=labels).loss.backward()
        rule.step()
        rule.zero_grad()
    return tiny.eval()


@pytest.fixture(scope="session")
def make_results() -> Callable[..., Results]:
    """Make results from per-question scores by task, as if they had been measured."""

    def make(
        name: str, scores: Mapping[str, Sequence[float]], clusters: Sequence[str] | None = None, **model: Any
    ) -> Results:
        rows = {
            task: tuple(
                Row(
                    id=f"{task}:{i}",
                    cluster=clusters[i] if clusters else f"{task}:{i}",
                    tier="head" if i % 2 else "tail",
                    hash=hashlib.sha256(f"{task}:{i}".encode()).hexdigest(),
                    scores={"acc": float(score)},
                )
                for i, score in enumerate(values)
            )
            for task, values in scores.items()
        }
        return Results(
            created="2024-01-01T00:00:00+00:00",
            seed=0,
            limit=None,
            model=ModelFacts.model_validate({"name": name, "parameters": 1000, **model}),
            engine=Engine(
                suite="facts",
                lm_eval="0.4.13",
                torch="2.13.0",
                transformers="5.23.0",
                device="cpu",
                dtype="float32",
                batch_size=64,
                max_length=512,
                bos=True,
            ),
            tasks={task: _task(task, task_rows) for task, task_rows in rows.items()},
            seconds=1.0,
            rows=rows,
        )

    return make


def _task(name: str, rows: Sequence[Row]) -> TaskResult:
    scores = [row.scores["acc"] for row in rows]
    low, high = mean_interval(scores)
    return TaskResult(
        title=f"Title of {name}",
        family="closed book" if name == "facts_trained" else name,
        headline="acc",
        chance=0.0,
        version="1",
        n=len(rows),
        shots=0,
        task_hash=task_hash(rows),
        metrics={"acc": Metric(value=sum(scores) / len(scores), low=low, high=high)},
        tiers={},
        truncated=0,
        seconds=0.1,
        data=Data(source="built in", name="made by hand", sha256="0" * 64),
    )
