"""The cache bench: feeding tokens through a plain cache equals one forward pass, and quantization has an effect."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import compress
from compress.runtime.kv import QuantizedCache
from compress_evals.fidelity import Window
from compress_evals.kv import behind, distances, right, scored_logits

WINDOWS = [
    Window(ids=tuple(torch.randint(4, 200, (size,), generator=torch.Generator().manual_seed(size)).tolist()),
           scored_from=since, size=1)
    for size, since in ((21, 1), (13, 9), (30, 28))
]  # fmt: skip


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return compress.load(tiny_llama)


def plain() -> Any:
    from transformers import DynamicCache

    return DynamicCache()


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_a_plain_cache_gives_the_logits_of_one_forward(model: Any, assert_close: Any, chunk: int) -> None:
    for window, got in zip(WINDOWS, scored_logits(model, WINDOWS, plain, chunk), strict=True):
        with torch.inference_mode():
            want = model(torch.tensor([window.ids]), use_cache=False).logits[0, window.scored_from - 1 : -1]
        assert_close("logits", got, want, 1e-5)


def test_rounding_shows_only_once_something_is_rounded(model: Any) -> None:
    make = partial(QuantizedCache, model.config, bits=2, group=4, residual=8)
    want, got = (scored_logits(model, WINDOWS, cache, 1) for cache in (plain, make))
    first, short, late = (found.kl for found in distances(WINDOWS, want, got))
    assert max(first[:8]) < 1e-6 < min(first[8:])  # eight tokens are rounded when the ninth sees them
    assert short.shape == (4,)
    assert late.min() > 1e-6


def test_an_answer_is_right_only_as_a_whole() -> None:
    window = Window(ids=(5, 6, 7), scored_from=1, size=1)
    said = torch.nn.functional.one_hot(torch.tensor([6, 7]), 9).float()
    assert right([window], [said]).value == 1
    assert right([window], [said.flip(0)]).value == right([window], [said[[0, 0]]]).value == 0


def test_a_question_behind_others_keeps_its_answer() -> None:
    first = [Window(ids=ids, scored_from=1, size=9) for ids in ((1, 9), (1, 8, 7))]
    found = behind(first, Window(ids=(1, 5, 6), scored_from=2, size=4))
    assert found == Window(ids=(1, 9, 1, 8, 7, 1, 5, 6), scored_from=7, size=4)
