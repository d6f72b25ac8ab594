"""KL, top-1 agreement and bits per byte against closed forms, and a model compared with itself."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from compress.builtin.documents import Question, closed_book
from compress.builtin.facts import facts
from compress.errors import ArtifactError
from compress_evals.fidelity import (
    Estimate,
    Tokens,
    Window,
    answer_window,
    compare_windows,
    evaluation_text,
    mean_kl,
    measure_fidelity,
    ratio,
    text_windows,
    token_distances,
)
from compress_evals.stats import stretch

TEXT = "The capital of Chad is N'Djamena. Größe 12 – naïve. " * 30


def questions() -> list[Question]:
    return closed_book(facts("evaluation"), "trained")[:20]


def test_a_model_is_identical_to_itself(model: Any, tokenizer: Any) -> None:
    found = measure_fidelity(model, model, tokenizer, text=TEXT, questions=questions(), length=64, iters=200)
    assert (found.kl.value, found.kl_p99, found.top1, found.answer_kl.value, found.answer_top1) == (0, 0, 1, 0, 1)
    assert (found.bits_per_byte_difference.low, found.bits_per_byte_difference.high) == (0, 0)
    assert found.dense_bits_per_byte == found.compressed_bits_per_byte > 0


def test_two_token_distributions_have_their_closed_form() -> None:
    p, q = 0.9, 0.6
    dense, compressed = (torch.tensor([[math.log(x), math.log(1 - x)]]) for x in (p, q))
    found = token_distances(dense, compressed, torch.tensor([1]))
    expected = p * math.log(p / q) + (1 - p) * math.log((1 - p) / (1 - q))
    assert found.kl[0] == pytest.approx(expected, rel=1e-5)
    assert (found.dense_loss[0], found.compressed_loss[0]) == pytest.approx(
        (-math.log(1 - p), -math.log(1 - q)), rel=1e-5
    )
    assert found.same[0] == 1.0


def test_kl_is_dense_first() -> None:
    dense, compressed = torch.tensor([[0.0, -math.inf]]), torch.tensor([[0.0, 0.0]])
    assert token_distances(dense, compressed, torch.tensor([0])).kl[0] == pytest.approx(math.log(2))
    assert token_distances(compressed, dense, torch.tensor([0])).kl[0] == math.inf


def test_a_model_of_nans_is_infinitely_far_and_agrees_nowhere(model: Any, tokenizer: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    found = measure_fidelity(model, broken, tokenizer, text=TEXT, questions=questions(), length=64, iters=200)
    assert found.kl.value == found.kl_p50 == found.answer_kl.value == found.compressed_bits_per_byte == math.inf
    assert found.top1 == found.answer_top1 == 0.0
    assert math.isfinite(found.dense_bits_per_byte)


def test_so_is_everything_from_a_dense_model_of_nans(model: Any, tokenizer: Any) -> None:
    broken = copy.deepcopy(model)
    with torch.no_grad():
        broken.model.norm.weight.fill_(math.nan)
    for other in (model, broken):
        found = measure_fidelity(broken, other, tokenizer, text=TEXT, questions=questions(), length=64, iters=200)
        assert found.kl.value == found.dense_bits_per_byte == found.bits_per_byte_difference.value == math.inf


def test_a_damaged_model_is_farther_away(model: Any, tokenizer: Any) -> None:
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    found = measure_fidelity(model, damaged, tokenizer, text=TEXT, questions=questions(), length=64, iters=200)
    assert 0 < found.kl.low < found.kl.value < found.kl.high
    assert found.kl_p50 <= found.kl_p99
    assert found.answer_kl.value > 0


def test_windows_begin_with_bos_and_cover_every_byte_once(tokenizer: Any) -> None:
    windows = text_windows(tokenizer, TEXT, 64)
    assert sum(window.size for window in windows) == len(TEXT.encode())
    assert all(window.ids[0] == tokenizer.bos_token_id and window.scored_from == 1 for window in windows)
    assert [token for window in windows for token in window.ids[1:]] == tokenizer(
        TEXT, add_special_tokens=False
    ).input_ids
    assert max(len(window.ids) for window in windows) == 64


def test_without_a_bos_the_first_token_is_context(tokenizer: Any) -> None:
    bare = copy.deepcopy(tokenizer)
    bare.bos_token = None
    windows = text_windows(bare, "The capital of Chad is N'Djamena.", 64)
    first = len(tokenizer.decode(windows[0].ids[:1]).encode())
    assert windows[0].size == len(b"The capital of Chad is N'Djamena.") - first
    assert len(windows[0].ids) - windows[0].scored_from == len(windows[0].ids) - 1


def test_only_the_answer_is_scored(tokenizer: Any) -> None:
    window = answer_window(tokenizer, questions()[0])
    assert tokenizer.decode(window.ids[window.scored_from :]) == f" {questions()[0].answer}."


def test_batching_changes_neither_order_nor_values(model: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    windows = [answer_window(tokenizer, question) for question in questions()]
    damaged = copy.deepcopy(model)
    with torch.no_grad():
        damaged.model.layers[1].mlp.up_proj.weight.mul_(0.7)
    together = compare_windows(model, damaged, windows)
    monkeypatch.setattr("compress_evals.fidelity._LOGITS", 1)
    alone = compare_windows(model, damaged, windows)
    # float32 sums of 64 terms in another order: relative 64 * 2^-24, on losses of about 10
    assert np.concatenate([t.dense_loss for t in together]) == pytest.approx(
        np.concatenate([t.dense_loss for t in alone]), rel=1e-4, abs=1e-4
    )
    assert [len(t.kl) for t in together] == [len(w.ids) - w.scored_from for w in windows]


def test_bits_per_byte_of_a_uniform_model_are_log_two_of_its_vocabulary(tokenizer: Any) -> None:
    class Uniform:
        device = "cpu"
        config = SimpleNamespace(vocab_size=len(tokenizer))

        def __call__(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, len(tokenizer)))

    found = measure_fidelity(Uniform(), Uniform(), tokenizer, text=TEXT, questions=questions(), iters=100)
    tokens = len(tokenizer(TEXT, add_special_tokens=False).input_ids)
    assert found.tokens == tokens
    assert found.dense_bits_per_byte == pytest.approx(tokens * math.log2(len(tokenizer)) / len(TEXT.encode()), rel=1e-6)


def test_models_of_different_vocabularies_are_refused(model: Any) -> None:
    other = SimpleNamespace(device="cpu")
    narrow = lambda input_ids, use_cache: SimpleNamespace(logits=torch.zeros(*input_ids.shape, 5))  # noqa: E731
    with pytest.raises(ArtifactError, match="5 tokens"):
        compare_windows(model, _callable(narrow, other), [Window(ids=(0, 5, 6), scored_from=1, size=2)])


def test_an_empty_text_is_refused(model: Any, tokenizer: Any) -> None:
    with pytest.raises(ArtifactError, match="text of at least two tokens"):
        measure_fidelity(model, model, tokenizer, text="", questions=questions())


def test_ratio_weighs_windows_by_their_size() -> None:
    found = ratio(np.array([1.0, 3.0]), np.array([1.0, 9.0]), iters=500, seed=0)
    assert found.value == pytest.approx(0.4)
    wider = stretch(2)  # resampled means are 1/3, .4 or 1
    assert (found.low, found.high) == pytest.approx((0.4 - wider * (0.4 - 1 / 3), 0.4 + wider * 0.6))


def test_one_window_tells_nothing_about_others() -> None:
    tokens = Tokens(kl=np.array([0.2, 0.4]), same=np.ones(2), dense_loss=np.ones(2), compressed_loss=np.ones(2))
    assert mean_kl([tokens], iters=100, seed=0) == Estimate(value=pytest.approx(0.3), low=0.0, high=math.inf)
    few = mean_kl([tokens, tokens, replace(tokens, kl=np.zeros(2))], iters=500, seed=0)
    assert few.low == 0 < few.value < few.high


def test_the_evaluation_text_is_packaged() -> None:
    assert len(evaluation_text()) > 20_000


def _callable(function: Any, attributes: Any) -> Any:
    class Model:
        device = attributes.device

        def __call__(self, **inputs: Any) -> Any:
            return function(**inputs)

    return Model()
