"""Builds responses in the format of OpenAI's API: one JSON object, or a stream of server-sent events."""

from __future__ import annotations

import json
import time
import uuid
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Answer:
    """Builds the JSON objects of one response; its fields are what they share."""

    model: str
    chat: bool
    prompt_tokens: int
    created: int = field(default_factory=lambda: int(time.time()))
    name: str = field(default_factory=lambda: uuid.uuid4().hex)

    def head(self, chunk: bool) -> dict[str, Any]:
        """The fields with which every object begins."""
        if self.chat:
            kind, name = "chat.completion.chunk" if chunk else "chat.completion", f"chatcmpl-{self.name}"
        else:
            kind, name = "text_completion", f"cmpl-{self.name}"
        return {"id": name, "object": kind, "created": self.created, "model": self.model}

    def usage(self, made: int) -> dict[str, int]:
        """The token counts, when `made` tokens were generated."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": made,
            "total_tokens": self.prompt_tokens + made,
        }

    def whole(self, text: str, finish: str, made: int) -> dict[str, Any]:
        """The complete response as one object."""
        said = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return {**self.head(False), "choices": [choice], "usage": self.usage(made)}

    def chunk(self, text: str, finish: str | None, first: bool) -> dict[str, Any]:
        """One chunk of a streamed response."""
        said: dict[str, Any] = {"text": text}
        if self.chat:
            said = {"delta": {**({"role": "assistant"} if first else {}), **({"content": text} if text else {})}}
        return {**self.head(True), "choices": [{"index": 0, **said, "logprobs": None, "finish_reason": finish}]}

    def counted(self, made: int) -> dict[str, Any]:
        """The last object of a stream for which the client asked for the usage."""
        return {**self.head(True), "choices": [], "usage": self.usage(made)}


def event(value: dict[str, Any] | str) -> bytes:
    """The bytes of one server-sent event."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return f"data: {text}\n\n".encode()
