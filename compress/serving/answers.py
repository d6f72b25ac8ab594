"""Answers in OpenAI's shapes: one object, or a stream of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """The parts that all objects of one answer share."""

    model: str
    chat: bool
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def head(self, chunk: bool) -> dict[str, Any]:
        """What every object begins with."""
        if self.chat:
            kind, name = "chat.completion.chunk" if chunk else "chat.completion", f"chatcmpl-{self.name}"
        else:
            kind, name = "text_completion", f"cmpl-{self.name}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def usage(self, made: int) -> dict[str, int]:
        """Tokens counted."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def whole(self, text: str, finish: str, made: int) -> dict[str, Any]:
        """The answer at once."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self.head(False), "choices": [choice], "usage": self.usage(made)}

    def chunk(self, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        """Some of the answer."""
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"delta": {**({"role": "assistant"} if first else {}), **({"content": text} if text else {})}}
        return {**self.head(True), "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]}

    def counted(self, made: int) -> dict[str, Any]:
        """The last object of a stream that was asked to tell the usage."""
        return {**self.head(True), "choices": [], "usage": self.usage(made)}


def event(value: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
