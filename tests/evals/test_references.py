"""Stored dense references: the same figures as with both models in memory, or a lower bound if they are truncated."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import SafetensorError

from compress.errors import ArtifactError, RecipeError
from compress_evals import fidelity as fidelity_module
from compress_evals import references
from compress_evals.cache import Cache
from compress_evals.fidelity import Fidelity, all_windows, compare_windows, measure_fidelity
from compress_evals.questions import Exam, prepare
from compress_evals.references import hold
from compress_evals.subject import Subject
from compress_evals.suite import FACTS

TEXT = "The capital of Chad is N'Djamena. Größe 12 – naïve. " * 30


@pytest.fixture(autouse=True)
def fewer_questions(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = fidelity_module.closed_book
    monkeypatch.setattr(fidelity_module, "closed_book", lambda table, form: whole(table, form)[:20])


@pytest.fixture(scope="module")
def exam(tokenizer: Any) -> Exam:
    return prepare(FACTS, tokenizer, only=["facts_context1"], limit=4)


@pytest.fixture(scope="module")
def damaged(model: Any) -> Any:
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(0.5)
    return other


def fidelity(dense: Subject, compressed: Subject, exam: Exam, cache: Cache, text: str) -> Fidelity:
    held = hold(dense, exam, cache, text)
    dense.release()
    return references.fidelity(held, compressed, exam, cache)


def subject(name: str, model: Any) -> Subject:
    return Subject(name, lambda: model, device="cpu", identity=name * 8)


def unloadable(name: str) -> Subject:
    def load() -> Any:
        raise AssertionError(f"{name} was loaded")

    return Subject(name, load, device="cpu", identity=name * 8)


def test_the_figures_are_those_of_both_models_in_memory(
    model: Any, damaged: Any, tokenizer: Any, exam: Exam, tmp_path: Path
) -> None:
    ours = fidelity(subject("dense", model), subject("small", damaged), exam, Cache(tmp_path), TEXT)
    assert ours == measure_fidelity(model, damaged, tokenizer, text=TEXT)
    assert ours.top is None and ours.kl.value > 0


def test_a_stored_reference_needs_no_dense_model_and_a_stored_figure_none_at_all(
    model: Any, damaged: Any, exam: Exam, tmp_path: Path
) -> None:
    dense = subject("dense", model)
    first = fidelity(dense, subject("small", damaged), exam, Cache(tmp_path), TEXT)
    again = fidelity(unloadable("dense"), unloadable("small"), exam, Cache(tmp_path), TEXT)
    assert again == first
    itself = fidelity(unloadable("dense"), subject("same", model), exam, Cache(tmp_path), TEXT)
    assert (itself.kl.value, itself.top1) == (0.0, 1.0)


def test_another_text_or_model_is_another_reference(model: Any, damaged: Any, exam: Exam, tmp_path: Path) -> None:
    for name, of, text in (("a", model, TEXT), ("b", damaged, TEXT), ("a", model, TEXT * 2)):
        fidelity(subject(name, of), subject("small", damaged), exam, Cache(tmp_path), text)
    assert len(list((tmp_path / "references").glob("*.safetensors"))) == 3


def test_a_reference_that_is_damaged_is_measured_again(model: Any, damaged: Any, exam: Exam, tmp_path: Path) -> None:
    fidelity(subject("dense", model), subject("small", damaged), exam, Cache(tmp_path), TEXT)
    [path] = (tmp_path / "references").glob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    notes: list[str] = []
    itself = fidelity(subject("dense", model), subject("same", model), exam, Cache(tmp_path, say=notes.append), TEXT)
    assert itself.kl.value == 0.0
    assert [path.name in note for note in notes] == [True]


def test_cut_to_the_likeliest_tokens_kl_is_that_of_the_coarser_distributions(
    model: Any, damaged: Any, tokenizer: Any, exam: Exam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "LARGEST", 1)
    ours = fidelity(subject("dense", model), subject("small", damaged), exam, Cache(tmp_path), TEXT)
    pieces, _ = all_windows(tokenizer, TEXT)
    whole = measure_fidelity(model, damaged, tokenizer, text=TEXT)
    assert ours.top == references.TOP
    assert ours.kl.value == pytest.approx(naive(model, damaged, pieces), rel=1e-4)
    assert 0 < ours.kl.value < whole.kl.value
    assert (ours.top1, ours.dense_bits_per_byte) == pytest.approx((whole.top1, whole.dense_bits_per_byte), rel=1e-6)
    assert ours.compressed_bits_per_byte == pytest.approx(whole.compressed_bits_per_byte, rel=1e-6)


def naive(dense: Any, compressed: Any, windows: Any) -> float:
    """Mean KL over dense's 64 likeliest tokens and one outcome for all others, token by token in float64."""
    found = []
    for window in windows:
        ids = torch.tensor([window.ids])
        with torch.inference_mode():
            rows = [model(input_ids=ids).logits[0].double().softmax(-1).numpy() for model in (dense, compressed)]
        for p, q in list(zip(*rows, strict=True))[:-1]:
            kept = np.argsort(-p)[: references.TOP]
            coarse = [np.r_[x[kept], 1 - x[kept].sum()] for x in (p, q)]
            found.append(float((coarse[0] * np.log(coarse[0] / coarse[1])).sum()))
    return float(np.mean(found))


def test_a_model_against_itself_is_at_no_distance_when_cut(
    model: Any, exam: Exam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(references, "LARGEST", 1)
    found = fidelity(subject("dense", model), subject("same", model), exam, Cache(tmp_path), TEXT)
    assert (found.kl.value, found.top1, found.answer_top1) == (0.0, 1.0, 1.0)


def test_tokens_that_are_tied_are_the_same_likeliest_token_when_cut(
    model: Any, exam: Exam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tied = copy.deepcopy(model)
    head = tied.get_output_embeddings().weight
    with torch.no_grad():
        head[len(head) // 2 :] = head[: len(head) // 2]  # every token has a twin, as bfloat16 makes some
    monkeypatch.setattr(references, "LARGEST", 1)
    found = fidelity(subject("dense", tied), subject("same", tied), exam, Cache(tmp_path), TEXT)
    assert (found.kl.value, found.top1, found.answer_top1) == (0.0, 1.0, 1.0)


def test_a_disk_that_is_full_is_said_to_be_and_keeps_nothing(
    model: Any, exam: Exam, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(tensors: Any, path: Path, about: Any) -> None:
        path.write_bytes(b"half")
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(references, "save_file", full)
    with pytest.raises(RecipeError, match=r"--cache: .* cannot be written: .*No space left on device"):
        hold(subject("dense", model), exam, Cache(tmp_path), TEXT)
    assert list((tmp_path / "references").iterdir()) == []


def test_models_of_different_vocabularies_are_refused(model: Any, exam: Exam, tmp_path: Path) -> None:
    wider = copy.deepcopy(model)
    wider.resize_token_embeddings(720)
    with pytest.raises(ArtifactError, match="700 and 720 tokens"):
        fidelity(subject("dense", model), subject("wide", wider), exam, Cache(tmp_path), TEXT)


def test_windows_are_compared_in_their_order(model: Any, damaged: Any, tokenizer: Any, tmp_path: Path) -> None:
    windows = dict(zip(("text", "answers"), all_windows(tokenizer, TEXT), strict=True))
    held = references.of(subject("dense", model), windows, Cache(tmp_path), {"test": 1})
    for name, listed in windows.items():
        ours, theirs = held.compare(damaged, name), compare_windows(model, damaged, listed)
        assert all(np.array_equal(a.kl, b.kl) for a, b in zip(ours, theirs, strict=True))
