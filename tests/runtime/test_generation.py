"""Decoding with a static cache gives the tokens of transformers' own generation, also when it is repeated."""

from __future__ import annotations

from collections.abc import Callable
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import compress
from compress import RecipeError
from compress.runtime.generation import Decoder

PROMPT, NEW = 9, 20


def prompt(seed: int = 0) -> Tensor:
    return torch.randint(4, 211, (1, PROMPT), generator=torch.Generator().manual_seed(seed))


def usual(model: Any, ids_BT: Tensor) -> Tensor:
    """What `generate` gives."""
    options = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    model.generation_config.eos_token_id = None  # else it may not choose this token
    found: Tensor = model.generate(ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
    return found[:, PROMPT:]


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma", "qwen2"])
def test_tokens_are_those_of_generate(family: str, model_folder: Callable[..., Path]) -> None:
    model = compress.load(model_folder(family))
    decoder = Decoder(model, PROMPT + NEW)
    for seed in (0, 1, 0):  # a new prompt leaves nothing of the last one
        assert torch.equal(decoder.generate(prompt(seed), NEW), usual(model, prompt(seed)))


def test_a_compressed_model_steps_alike(llama_artifact: Path) -> None:
    model = compress.load(llama_artifact)
    assert torch.equal(Decoder(model, PROMPT + NEW).generate(prompt(), NEW), usual(model, prompt()))


def test_a_cache_of_its_own_is_kept(llama_artifact: Path) -> None:
    model = compress.load(llama_artifact, kv={"bits": 8, "group": 4, "residual": 4})
    decoder = Decoder(model, PROMPT + NEW)
    assert torch.equal(decoder.generate(prompt(), NEW), usual(model, prompt()))
    assert type(decoder.cache).__name__ == "QuantizedCache"
    assert decoder.cache_bytes() > 0


def test_a_model_without_a_static_cache_is_refused(llama_artifact: Path) -> None:
    model = compress.load(llama_artifact)
    model.config.layer_types = ["unheard of"] * 2
    with pytest.raises(RecipeError, match="--generate: LlamaForCausalLM has no static cache"):
        Decoder(model, PROMPT + NEW)


def test_buffers_stay_where_they_are(llama_artifact: Path) -> None:
    """What a captured graph needs: every step reads and writes the same memory."""
    decoder = Decoder(compress.load(llama_artifact), PROMPT + NEW)
    decoder.generate(prompt(), 2)

    def places() -> list[int]:
        layers = decoder.cache.layers
        return [t.data_ptr() for t in (decoder.token_B1, *(x for layer in layers for x in (layer.keys, layer.values)))]

    before = places()
    decoder.generate(prompt(1), NEW)
    assert places() == before


def test_nothing_is_captured_on_a_cpu(llama_artifact: Path) -> None:
    decoder = Decoder(compress.load(llama_artifact), PROMPT + NEW)
    decoder.capture(prompt())
    assert decoder.graph is None


def test_prompt_and_steps_are_timed_apart(llama_artifact: Path) -> None:
    ticks = count()
    decoder = Decoder(compress.load(llama_artifact), PROMPT + NEW)
    steps = [0]
    step = decoder.step

    def counted() -> None:
        steps[0] += 1
        step()
        next(ticks)

    decoder.step = counted  # type: ignore[method-assign]
    assert decoder.timed(prompt(), 5, clock=lambda: float(next(ticks))) == (1.0, 5.0)
    assert steps == [4]
