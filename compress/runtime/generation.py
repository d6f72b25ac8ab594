"""Greedy generation for timing: one forward pass over the prompt, then steps of one token with fixed buffers.

The key-value cache is static, so that on a GPU a step can be captured as one CUDA graph and replayed; on the CPU the
same step runs eagerly. A model with an attached cache (quantized or latent) keeps using it; such a cache grows, so its
steps cannot be captured. Not yet run on a GPU. Shape suffixes: B batch, T tokens.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import StaticCache

from compress.errors import RecipeError
from compress.runtime.kv import own_cache

WARM = 3  # warm-up steps before a capture, as PyTorch's notes on CUDA graphs require


class Decoder:
    """Generates with one model, whose static cache has room for `length` tokens.

    Raises RecipeError for a model that supports no static cache, unless it has a cache of its own.
    """

    def __init__(self, model: Any, length: int) -> None:
        self.model, self.device = model, torch.device(model.device)
        self.new_cache = own_cache(model)
        self.cache = self.new_cache() if self.new_cache else static_cache(model, length + WARM + 1)
        self.token_B1 = torch.zeros(1, 1, dtype=torch.long, device=self.device)
        short = "logits_to_keep" in signature(model.forward).parameters
        self.options = {"use_cache": True, **({"logits_to_keep": 1} if short else {})}
        self.graph: Any = None

    @torch.no_grad()
    def advance(self, ids_BT: Tensor) -> None:
        """Append tokens to those in the cache, and write the next token to `token_B1`."""
        logits_BTV = self.model(input_ids=ids_BT, past_key_values=self.cache, **self.options).logits
        self.token_B1.copy_(logits_BTV[:, -1:].argmax(-1))

    def prefill(self, ids_BT: Tensor) -> None:
        """Clear the cache and process a prompt."""
        if self.new_cache:
            self.cache = self.new_cache()
        else:
            self.cache.reset()
        self.advance(ids_BT)

    def step(self) -> None:
        """Generate one more token."""
        if self.graph is None:
            self.advance(self.token_B1)
        else:
            self.graph.replay()

    def capture(self, ids_BT: Tensor) -> None:
        """Capture one step as a CUDA graph; the cache contents are lost. Does nothing without a GPU or static cache."""
        if self.device.type != "cuda" or self.new_cache:
            return
        self.prefill(ids_BT)
        with torch.cuda.device(self.device):  # a graph is captured on the current device
            side = torch.cuda.Stream(self.device)
            side.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(side):
                for _ in range(WARM):
                    self.advance(self.token_B1)
            torch.cuda.current_stream(self.device).wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.advance(self.token_B1)
        self.graph = graph

    def generate(self, ids_BT: Tensor, new: int) -> Tensor:
        """The `new` tokens that follow a prompt, [1, new]."""
        self.prefill(ids_BT)
        found = [self.token_B1.clone()]
        for _ in range(new - 1):
            self.step()
            found.append(self.token_B1.clone())
        return torch.cat(found, 1)

    def timed(self, ids_BT: Tensor, new: int, clock: Callable[[], float] = time.perf_counter) -> tuple[float, float]:
        """Seconds for the prompt with the first new token, and seconds for the other `new - 1` tokens."""
        self.wait()
        began = clock()
        self.prefill(ids_BT)
        self.wait()
        read = clock()
        for _ in range(new - 1):
            self.step()
        self.wait()
        return read - began, clock() - read

    def wait(self) -> None:
        """Wait until the device has finished."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def cache_bytes(self) -> int:
        """Bytes of the cache: keys and values, or what a compressed cache stores instead."""
        if hasattr(self.cache, "nbytes"):
            return int(self.cache.nbytes())
        held = [value for layer in self.cache.layers for value in vars(layer).values() if isinstance(value, Tensor)]
        return sum(value.nbytes for value in held)


def static_cache(model: Any, length: int) -> StaticCache:
    """An empty static cache; raises RecipeError for a model that does not support one."""
    try:
        return StaticCache(config=model.config, max_cache_len=length)
    except (KeyError, TypeError, AttributeError, ValueError) as error:  # a layer type that has no static cache
        raise RecipeError(f"--generate: {type(model).__name__} has no static cache: {error}") from error


__all__ = ["Decoder"]
