"""Reads and checks requests: bodies up to a size limit, with unsupported fields rejected rather than ignored.

A field that is null, or has a value that changes no answer here (NEUTRAL), counts as not given: clients send them.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from fastapi import Request
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect

from compress.serving.errors import Refusal
from compress.serving.sampling import Sampling

NEUTRAL: dict[str, tuple[Any, ...]] = {  # of fields that are not supported: the values that change no answer
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "logprobs": (False,),  # not 0, which asks a completion for those of its tokens
    "top_logprobs": (0,),
    "echo": (False,),
    "best_of": (1,),
    "store": (False,),
    "service_tier": ("auto", "default"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "tools": ([],),
    "functions": ([],),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "parallel_tool_calls": (False, True),  # without tools there are no calls
    "tool_calls": ([],),
    "annotations": ([],),
}


def stated(value: Any) -> Any:
    """The fields of an object without those that are null or neutral; anything else as it is."""
    if not isinstance(value, dict):
        return value
    return {name: given for name, given in value.items() if given is not None and not is_neutral(name, given)}


def is_neutral(name: str, given: Any) -> bool:
    """Whether a value is neutral for a field; a boolean is no number."""
    return any(given == value and isinstance(given, bool) == isinstance(value, bool) for value in NEUTRAL.get(name, ()))


def listed(value: Any) -> Any:
    """A text as a list of itself, and a list as it is."""
    if not isinstance(value, (str, list)):
        raise PydanticCustomError("text_or_list", "Input should be a text or a list")
    return [value] if isinstance(value, str) else value


def parts(value: Any) -> Any:
    """The content of a message as a list of parts."""
    return [{"type": "text", "text": value}] if isinstance(value, str) else listed(value)


def turn(value: Any) -> Any:
    """What is stated of a message; an assistant's without content says nothing."""
    given = stated(value)
    return {"content": [], **given} if isinstance(given, dict) and given.get("role") == "assistant" else given


def only(value: Any) -> Any:
    """The prompt, a text or tokens, which may be in a list of its own."""
    prompt = value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], (str, list)) else value
    if isinstance(prompt, str) or (isinstance(prompt, list) and all(type(token) is int for token in prompt)):
        return prompt
    raise PydanticCustomError("prompt", "Input should be one text or one list of tokens")


Stop = Annotated[str, Field(min_length=1, max_length=256)]


class StreamOptions(BaseModel):
    """Options of a stream: whether it ends with the token usage."""

    model_config = ConfigDict(extra="forbid", strict=True)
    include_usage: bool = False
    include_obfuscation: Literal[False] = False


class Asked(BaseModel):
    """The fields that both kinds of completion request share."""

    model_config = ConfigDict(extra="forbid", strict=True)
    model: str = Field(max_length=256)
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=100)
    top_p: float | None = Field(None, gt=0, le=1)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: Annotated[list[Stop], Field(max_length=16), BeforeValidator(listed)] = []
    stream: bool | None = None
    stream_options: Annotated[StreamOptions, BeforeValidator(stated)] | None = None
    n: Literal[1] | None = None
    # accepted for compatibility: names and labels for what is not kept here, logs, caches and answers
    user: str | None = Field(None, max_length=1024)
    safety_identifier: str | None = Field(None, max_length=1024)
    prompt_cache_key: str | None = Field(None, max_length=1024)
    metadata: dict[str, str] | None = None

    def sampling(self) -> Sampling:
        """How tokens are chosen; the default temperature is 1, as in OpenAI's API."""
        return Sampling(
            temperature=1.0 if self.temperature is None else self.temperature,
            top_p=1.0 if self.top_p is None else self.top_p,
            seed=self.seed,
        )

    def wanted(self) -> int | None:
        """The largest number of tokens asked for, or None."""
        return self.max_tokens


class Completion(Asked):
    """A completion request: a text to continue, or its tokens."""

    prompt: Annotated[str | list[int], BeforeValidator(only)]


class Part(BaseModel):
    """A part of a message's content, which can only be text."""

    model_config = ConfigDict(extra="forbid", strict=True)
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One message of a conversation."""

    model_config = ConfigDict(extra="forbid", strict=True)
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[Annotated[Part, BeforeValidator(stated)]], BeforeValidator(parts)]
    name: str | None = None

    def said(self) -> dict[str, str]:
        """The message for a chat template, with its parts joined as by templates that take parts: with nothing between.

        `developer` is the later name of `system`. The template gets the name of a speaker as well, and may ignore it.
        """
        role = "system" if self.role == "developer" else self.role
        said = {"role": role, "content": "".join(part.text for part in self.content)}
        return said if self.name is None else {**said, "name": self.name}


class Chat(Asked):
    """A chat request: a conversation to continue."""

    messages: list[Annotated[Message, BeforeValidator(turn)]] = Field(min_length=1)
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
        return kind.model_validate(stated(value))
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"])[1:101]
        said = "is not supported here" if first["type"] == "extra_forbidden" else first["msg"]
        if first["type"] == "literal_error" and isinstance(first["input"], (str, int)):
            said += f", not {first['input']!r:.100}"
        raise Refusal(400, f"{place}: {said}", param=place, code="invalid_value") from error
