"""The same texts are encoded by the same tokenizer once: it took a fifth of each run of a tiny model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Encode = Callable[..., list[list[int]]]


def once(encode: Encode) -> Encode:
    """`calibration.encode`, which remembers what it gave for plain texts and a tokenizer that can be written down."""
    known: dict[int, list[list[int]]] = {}

    def remembering(documents: list[Any], tokenizer: Any, chat: bool = False) -> list[list[int]]:
        if chat or not hasattr(tokenizer, "backend_tokenizer") or not all(isinstance(d, str) for d in documents):
            return encode(documents, tokenizer, chat)
        opening = f"{tokenizer.bos_token_id} {tokenizer.eos_token_id} {tokenizer.backend_tokenizer.to_str()}"
        key = hash((opening, tuple(documents)))
        if key not in known:
            known[key] = encode(documents, tokenizer, chat)
        return known[key]

    return remembering
