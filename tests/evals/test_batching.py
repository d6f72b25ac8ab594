"""The batch size: which sizes are tried, how they are halved, and that the result is cached."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from compress.errors import PlanError, RecipeError, out_of_memory
from compress_evals import batching
from compress_evals.cache import Cache
from compress_evals.questions import Exam, prepare
from compress_evals.subject import Subject
from compress_evals.suite import FACTS


class Small:
    """A model that runs out of memory with more than `most` rows."""

    device = "cpu"
    config = SimpleNamespace(vocab_size=10)

    def __init__(self, most: int, error: Exception | None = None) -> None:
        self.most, self.seen = most, []
        self.error = error or RuntimeError("CUDA out of memory. Tried to allocate 2 GiB")

    def __call__(self, ids_BT: torch.Tensor) -> SimpleNamespace:
        self.seen.append(tuple(ids_BT.shape))
        if len(ids_BT) > self.most:
            raise self.error
        return SimpleNamespace(logits=torch.zeros(*ids_BT.shape, 10))


@pytest.mark.slow
def test_the_longest_questions_are_tried_and_halved_until_they_fit() -> None:
    model = Small(20)
    assert batching.fitting(model, 7, 1000, 64, None) == 16
    assert model.seen == [(64, 7), (32, 7), (16, 7)]


def test_no_more_rows_are_tried_than_there_are_questions() -> None:
    model = Small(20)
    assert batching.fitting(model, 7, 5, 64, None) == 64
    assert model.seen == [(5, 7)]


def test_where_running_out_ends_the_process_the_size_is_computed_first() -> None:
    model = Small(64)
    row = 7 * 10 * batching.COPIES
    assert batching.fitting(model, 7, 1000, 64, 2 * 8 * row) == 8
    assert model.seen == [(8, 7)]


@pytest.mark.slow
def test_a_model_that_does_not_fit_is_an_error_and_other_errors_are_not_caught() -> None:
    with pytest.raises(PlanError, match="one question at a time"):
        batching.fitting(Small(0), 7, 1000, 64, None)
    with pytest.raises(RuntimeError, match="shapes"):
        batching.fitting(Small(0, RuntimeError("shapes differ")), 7, 1000, 64, None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "said",
    [
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "cusolver error: CUSOLVER_STATUS_ALLOC_FAILED",
        "std::bad_alloc",
        "DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes.",
    ],
)
def test_libraries_say_in_their_own_words_that_memory_ran_out(said: str) -> None:
    assert out_of_memory(RuntimeError(said)) and not out_of_memory(RuntimeError("CUBLAS_STATUS_EXECUTION_FAILED"))


def test_what_ran_out_of_memory_is_run_again_at_half() -> None:
    tried, said = [], []

    def run(size: int) -> str:
        tried.append(size)
        if size > 8:
            raise MemoryError
        return "done"

    assert batching.halving(32, run, said.append) == ("done", 8)
    assert tried == [32, 16, 8]
    assert said == [
        "note: out of memory; retrying with batch size 16",
        "note: out of memory; retrying with batch size 8",
    ]


@pytest.mark.slow
def test_the_size_found_is_stored_and_needs_no_model(model: Any, tokenizer: Any, tmp_path: Path) -> None:
    exam: Exam = prepare(FACTS, tokenizer, only=["facts_context1"], limit=4)
    first = batching.find(Subject("tiny", lambda: model, device="cpu", identity="a"), exam, Cache(tmp_path))

    def refused() -> Any:
        raise AssertionError("the model was loaded")

    assert batching.find(Subject("tiny", refused, device="cpu", identity="a"), exam, Cache(tmp_path)) == first == 64


@pytest.mark.parametrize("text", ["0", "-1", "many", "1.5", "", "999999"])
def test_a_batch_size_is_auto_or_a_number(text: str) -> None:
    assert (batching.parse("auto"), batching.parse("12")) == ("auto", 12)
    with pytest.raises(RecipeError, match="--batch-size"):
        batching.parse(text)


def test_free_memory_is_known_here_or_not_at_all(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "meminfo").write_text("MemTotal:  100 kB\nMemAvailable:    48 kB\n")
    monkeypatch.setattr(batching, "MEMINFO", tmp_path / "meminfo")
    assert batching.free_memory() == 48 * 1024
    monkeypatch.setattr(batching, "MEMINFO", tmp_path / "nowhere")
    assert batching.free_memory() is None
