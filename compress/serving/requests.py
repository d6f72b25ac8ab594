"""Reads and checks requests: bodies up to a size limit, with unsupported fields rejected rather than ignored."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect

from compress.serving.errors import Refusal
from compress.serving.sampling import Sampling

Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """Options of a stream: whether it ends with the token usage."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False


class Asked(BaseModel):
    """The fields that both kinds of completion request share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    n: Literal[1] | None = None
    user: str | None = Field(None, max_length=1024)  # accepted for compatibility; a name for logs, which are not kept

    def sampling(self) -> Sampling:
        """How tokens are chosen; the default temperature is 1, as in OpenAI's API."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )

    def stops(self) -> list[str]:
        """The stop strings as a list."""
        return [self.stop] if isinstance(self.stop, str) else list(self.stop or ())

    def wanted(self) -> int | None:
        """The largest number of tokens asked for, or None."""
        return self.max_tokens


class Completion(Asked):
    """A completion request: a text to continue, or its tokens."""

    prompt: str | list[int] | Annotated[list[str], Field(min_length=1, max_length=1)]


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "user", "assistant"]
    content: str


class Chat(Asked):
    """A chat request: a conversation to continue."""

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)

    def wanted(self) -> int | None:
        """The largest number of tokens asked for, or None; `max_completion_tokens` takes precedence."""
        return self.max_completion_tokens or self.max_tokens


Kind = TypeVar("Kind", bound=Asked)


async def body_of(request: Request, limit: int) -> bytes:
    """The body; raises Refusal 413 as soon as it exceeds the limit, whatever its Content-Length header says.

    Raises Refusal 400 if the client disconnects before the end.
    """
    told = request.headers.get("content-length", "")
    too_long = Refusal(413, f"the body is longer than {limit} bytes", code="request_too_large")
    if told.isdecimal() and int(told[:20]) > limit:
        raise too_long
    parts, size = [], 0
    try:
        async for part in request.stream():
            size += len(part)
            if size > limit:
                raise too_long
            parts.append(part)
    except ClientDisconnect as error:
        raise Refusal(400, "the client disconnected before the end of the body") from error
    return b"".join(parts)


def parsed(body: bytes, kind: type[Kind]) -> Kind:
    """The request in a body; raises Refusal 400 that names the first error."""
    try:
        value: Any = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, "the body is not JSON", code="invalid_json") from error
    if not isinstance(value, dict):
        raise Refusal(400, "the body is not a JSON object", code="invalid_json")
    try:
        return kind.model_validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"][:1])[:100]
        said = "is not supported here" if first["type"] == "extra_forbidden" else first["msg"]
        raise Refusal(400, f"{place}: {said}", param=place, code="invalid_value") from error
