"""The HTTP interface: checks requests, queues them, and streams or returns the answers.

`model` in a request names the tenant; the base has a name of its own. No contents of requests are stored.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse, StreamingResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException

from compress.errors import RecipeError
from compress.runtime.tenants import Tenants
from compress.serving.answers import Answer, event
from compress.serving.engine import Closed, Engine, Full
from compress.serving.errors import Refusal
from compress.serving.metrics import Metrics
from compress.serving.requests import Asked, Chat, Completion, body_of, parsed
from compress.serving.running import Piece, Sequence, check_cache
from compress.serving.text import Text

BEFORE = 5  # tokens of a prompt with which the text that continues it is decoded
LENGTHS = ("max_position_embeddings", "max_seq_len", "seq_length")  # config keys for the length of the context


@dataclass(frozen=True, kw_only=True)
class Limits:
    """The limits of a server: waiting and running sequences, tokens per answer, bytes per body; and its API key."""

    max_queue: int = 256
    max_batch: int = 32
    max_tokens: int = 1024
    max_body: int = 1_000_000
    api_key: str | None = None


@dataclass(frozen=True, kw_only=True)
class Language:
    """A model's tokenizer and the tokens that end a text."""

    tokenizer: Any
    ends: frozenset[int]

    @staticmethod
    def of(tokenizer: Any, told: Any) -> Language:
        """The language of a tokenizer; `told` is the EOS token id of the model's settings: an int, several, or None.

        A text ends at any of these tokens and at the tokenizer's own EOS token.
        """
        found: set[int] = set()
        for end in (told, getattr(tokenizer, "eos_token_id", None)):
            found |= set(end) if isinstance(end, (list, tuple)) else set() if end is None else {int(end)}
        return Language(tokenizer=tokenizer, ends=frozenset(found))

    def opened(self, text: str) -> list[int]:
        """The tokens of a text to be continued, without the EOS token that some tokenizers append."""
        ids = [int(token) for token in self.tokenizer(text)["input_ids"]]
        said = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        added = ids[-1:] == [getattr(self.tokenizer, "eos_token_id", None)] != said[-1:]
        return ids[:-1] or ids if added else ids


class Server:
    """A base and its tenants behind an engine; `own` holds the languages of tenants that do not use the base's."""

    def __init__(
        self, tenants: Tenants, tokenizer: Any, name: str, limits: Limits, own: Mapping[str, Language] | None = None
    ) -> None:
        """Raises RecipeError for a base that cannot be served."""
        check_cache(tenants.model)
        self.tenants, self.tokenizer, self.name, self.limits = tenants, tokenizer, name, limits
        self.own = own or {}
        self.engine = Engine(tenants, max_batch=limits.max_batch, max_queue=limits.max_queue)
        self.metrics = Metrics(self.engine, tenants)
        self.context = context_of(tenants.model)
        self.language = Language.of(tokenizer, getattr(tenants.model.generation_config, "eos_token_id", None))
        self.started = int(time.time())

    # -- from a request to a sequence ---------------------------------------------------------------------

    def models(self) -> list[str]:
        """The names of the base and then of the tenants."""
        return [self.name, *self.tenants.names()]

    def tenant(self, model: str) -> str | None:
        """The tenant that a request names, or None for the base; raises Refusal 404 if there is no such model."""
        if model not in self.models():
            raise Refusal(404, f"the model {model[:100]!r} does not exist", param="model", code="model_not_found")
        return None if model == self.name else model

    def language_of(self, model: str) -> Language:
        """The language of a served model: its own, or the base's."""
        return self.own.get(model, self.language)

    def tokens(self, asked: Asked) -> list[int]:
        """The tokens of the prompt; raises Refusal 400 if it is not valid."""
        if isinstance(asked, Chat):
            return self.chat_tokens(asked)
        prompt = asked.prompt if isinstance(asked, Completion) else ""
        if isinstance(prompt, str):
            return self.language_of(asked.model).opened(unbroken(prompt, "prompt"))
        rows = self.tenants.model.get_input_embeddings().num_embeddings
        if not all(0 <= token < rows for token in prompt):
            raise Refusal(400, f"prompt: tokens must be whole numbers from 0 to {rows - 1}", param="prompt")
        return prompt

    def chat_tokens(self, asked: Chat) -> list[int]:
        """The tokens of a conversation, by the tokenizer's chat template, which transformers runs in a sandbox.

        Raises Refusal 400 if there is no template or it rejects the messages.
        """
        tokenizer = self.language_of(asked.model).tokenizer
        if not getattr(tokenizer, "chat_template", None):
            raise Refusal(
                400, f"the tokenizer of {asked.model} has no chat template; use /v1/completions", param="model"
            )
        said = [message.said() for message in asked.messages]
        try:
            text = tokenizer.apply_chat_template(said, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # a template may raise any kind of error to reject messages
            raise Refusal(400, "messages: the chat template rejects them", param="messages") from error
        return [int(token) for token in tokenizer(unbroken(text, "messages"), add_special_tokens=False)["input_ids"]]

    def sequence(self, asked: Asked, emit: Callable[[Piece], None]) -> Sequence:
        """The sequence for the engine; raises Refusal if the request is not valid."""
        tenant, language = self.tenant(asked.model), self.language_of(asked.model)
        prompt = self.tokens(asked)
        place = "messages" if isinstance(asked, Chat) else "prompt"
        rows = self.tenants.model.get_input_embeddings().num_embeddings
        if max(prompt, default=0) >= rows:
            said = f"{place}: the tokenizer of {asked.model} makes token {max(prompt)} of it; the model has {rows}"
            raise Refusal(400, said, param=place)
        if not prompt:
            raise Refusal(400, f"{place}: is empty", param=place)
        room = self.context - len(prompt)
        if room < 1:
            said = f"{place}: {len(prompt)} tokens leave no room in a context of {self.context}"
            raise Refusal(400, said, param=place, code="context_length_exceeded")
        wanted = asked.wanted()
        if wanted is not None and wanted > self.limits.max_tokens:
            raise Refusal(400, f"max_tokens: this server allows at most {self.limits.max_tokens}", param="max_tokens")
        return Sequence(
            prompt=prompt,
            tenant=tenant,
            limit=min(room, wanted or self.limits.max_tokens),
            sampling=asked.sampling(),
            text=Text(language.tokenizer, asked.stop, prompt[-BEFORE:] if isinstance(asked, Completion) else ()),
            ends=language.ends,
            emit=emit,
        )

    # -- answering ----------------------------------------------------------------------------------------

    async def answer(self, request: Request, kind: type[Asked]) -> Response:
        """Answer a completion or chat request; raises Refusal, with 429 if the queue is full and 503 at shutdown."""
        body = await body_of(request, self.limits.max_body)
        asked = parsed(body, kind)
        loop, pieces = asyncio.get_running_loop(), asyncio.Queue[Piece]()

        def emit(piece: Piece) -> None:
            loop.call_soon_threadsafe(pieces.put_nowait, piece)

        sequence = await asyncio.to_thread(self.sequence, asked, emit)
        try:
            self.engine.submit(sequence)
        except Full as error:
            self.metrics.requests.labels(asked.model, "refused").inc()
            raise Refusal(429, "too many requests are waiting; try again soon", code="queue_full", retry=1) from error
        except Closed as error:
            raise Refusal(503, "the server is shutting down", retry=5) from error
        self.metrics.tokens.labels(asked.model, "prompt").inc(len(sequence.prompt))
        answer = Answer(asked.model, issubclass(kind, Chat), len(sequence.prompt))
        if asked.stream:
            told = asked.stream_options is not None and asked.stream_options.include_usage
            made = self.stream(answer, sequence, pieces, told)
            return StreamingResponse(made, media_type="text/event-stream", headers={"Cache-Control": "no-cache"})
        return await self.whole(request, answer, sequence, pieces)

    async def whole(
        self, request: Request, answer: Answer, sequence: Sequence, pieces: asyncio.Queue[Piece]
    ) -> Response:
        """The complete answer; the sequence is cancelled if the client disconnects."""
        gone = asyncio.create_task(disconnected(request))
        text, start, last = [], time.monotonic(), Piece()
        try:
            while last.finish is None and last.error is None:
                next_piece = asyncio.create_task(pieces.get())
                done, _ = await asyncio.wait({next_piece, gone}, return_when=asyncio.FIRST_COMPLETED)
                if next_piece not in done:
                    next_piece.cancel()
                    raise Refusal(400, "the client disconnected")
                last = next_piece.result()
                text.append(last.text)
        finally:
            gone.cancel()
            sequence.cancelled = True
            self.count(answer, sequence, last, start)
        if last.error is not None:
            raise Refusal(500, last.error)
        return JSONResponse(answer.whole("".join(text), str(last.finish), last.tokens))

    async def stream(
        self, answer: Answer, sequence: Sequence, pieces: asyncio.Queue[Piece], told: bool
    ) -> AsyncIterator[bytes]:
        """The events of an answer; closing the iterator early, as when the client disconnects, cancels the sequence."""
        first, start, last = True, time.monotonic(), Piece()
        try:
            while last.finish is None and last.error is None:
                last = await pieces.get()
                if last.error is not None:
                    yield event(Refusal(500, last.error).body())
                else:
                    yield event(answer.chunk(last.text, last.finish, first))
                first = False
            if told and last.error is None:
                yield event(answer.counted(last.tokens))
            yield event("[DONE]")
        finally:
            sequence.cancelled = True
            self.count(answer, sequence, last, start)

    def count(self, answer: Answer, sequence: Sequence, last: Piece, start: float) -> None:
        """Add a finished request to the metrics."""
        outcome = last.finish or ("failed" if last.error else "cancelled")
        self.metrics.requests.labels(answer.model, outcome).inc()
        self.metrics.tokens.labels(answer.model, "completion").inc(sequence.made)
        self.metrics.seconds.observe(time.monotonic() - start)


def unbroken(text: str, place: str) -> str:
    """The text; raises Refusal 400 for half of a surrogate pair, which JSON can encode but tokenizers fail on."""
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise Refusal(400, f"{place}: contains half of a surrogate pair, which is not a character", param=place)
    return text


def context_of(model: Any) -> int:
    """The length of a model's context in tokens; raises RecipeError if its config does not state one."""
    config = model.config.get_text_config()
    found = next((told for told in (getattr(config, name, None) for name in LENGTHS) if told), None)
    if found is None:
        raise RecipeError(
            f"{type(model).__name__}: its config has none of {', '.join(LENGTHS)}, so its context length is unknown"
        )
    return int(found)


async def disconnected(request: Request) -> None:
    """Return once the client has disconnected."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def authorised(request: Request, key: str | None) -> bool:
    """Whether a request carries the API key, compared in constant time; always True if no key is set."""
    if key is None:
        return True
    scheme, _, given = request.headers.get("authorization", "").partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(given.strip().encode(), key.encode())


def make_app(server: Server) -> FastAPI:
    """The FastAPI application; it starts the engine when it starts and closes it when it stops."""

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        server.engine.start()
        yield
        await asyncio.to_thread(server.engine.close)

    app = FastAPI(title="compress serve", docs_url=None, redoc_url=None, openapi_url=None, lifespan=lifespan)

    @app.middleware("http")
    async def guard(request: Request, proceed: Callable[[Request], Awaitable[Response]]) -> Response:
        if request.url.path != "/health" and not authorised(request, server.limits.api_key):
            return Refusal(401, "wrong or missing API key", code="invalid_api_key").response()
        return await proceed(request)

    @app.exception_handler(Refusal)
    async def refused(_: Request, refusal: Refusal) -> Response:
        return refusal.response()

    @app.exception_handler(HTTPException)
    async def not_here(_: Request, error: HTTPException) -> Response:
        return Refusal(error.status_code, str(error.detail)).response()

    @app.get("/health")
    async def health() -> dict[str, str]:
        if not server.engine.thread.is_alive():
            raise Refusal(503, "the engine is not running")
        return {"status": "ok"}

    @app.get("/metrics")
    async def metrics() -> Response:
        return Response(generate_latest(server.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    told = {"object": "model", "created": server.started, "owned_by": "compress"}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": name, **told} for name in server.models()]}

    @app.get("/v1/models/{name:path}")
    async def model(name: str) -> dict[str, Any]:
        server.tenant(name)
        return {"id": name, **told}

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await server.answer(request, Completion)

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await server.answer(request, Chat)

    return app
