"""The server: every answer comes from the right tenant, and all errors have the same form."""

from __future__ import annotations

import asyncio
import copy
import json
import threading
import time
import weakref
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import Any

import httpx
import pytest
import torch
from transformers import AutoTokenizer

import compress
from compress import Dense
from compress.model.source import locate
from compress.runtime.tenants import Difference, Tenants
from compress.serving import engine
from compress.serving.app import BEFORE, Language, Limits, Server, context_of
from compress.serving.engine import Engine
from compress.serving.errors import Refusal
from compress.serving.requests import Chat, Completion, parsed
from compress.serving.running import Piece, Sequence
from compress.serving.sampling import Sampling
from compress.serving.text import Text

MODELS = ("tiny", "a", "b", "c")
Talk = Callable[..., Any]
Make = Callable[..., Server]


def ask(model: str = "a", prompt: Any = (5, 6, 7), **more: Any) -> dict[str, Any]:
    """A request for a greedy completion."""
    asked = {
        "model": model,
        "prompt": list(prompt) if isinstance(prompt, tuple) else prompt,
        "temperature": 0,
        "max_tokens": 8,
    }
    return {**asked, **more}


def solo(server: Server, asked: dict[str, Any]) -> str:
    """What the tenant says when it is alone."""
    name = None if asked["model"] == "tiny" else asked["model"]
    tokens = server.tenants.generate([asked["prompt"]], [name], asked["max_tokens"], stop=2)[0]
    before = asked["prompt"][-BEFORE:]
    decode = partial(server.tokenizer.decode, skip_special_tokens=True)
    return str(decode([*before, *tokens]))[len(decode(before)) :]


async def streamed(client: httpx.AsyncClient, path: str, asked: dict[str, Any]) -> list[Any]:
    """The objects of a stream, which must end with [DONE]."""
    async with client.stream("POST", path, json={**asked, "stream": True}) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
    assert lines[-1] == "[DONE]"
    return [json.loads(line) for line in lines[:-1]]


@pytest.mark.slow
def test_sixty_mixed_requests_get_their_own_answers(make_server: Make, talk: Talk) -> None:
    server = make_server(max_batch=16)
    prompts = [[int(t) for t in torch.randint(4, 200, (2 + n % 9,))] for n in range(60)]
    asked = [ask(MODELS[n % 4], prompt, max_tokens=3 + n % 7) for n, prompt in enumerate(prompts)]
    want = [solo(server, one) for one in asked]

    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/v1/completions", json=one) for one in asked))

    answers = talk(server, act)
    assert [a.status_code for a in answers] == [200] * 60
    assert [a.json()["model"] for a in answers] == [one["model"] for one in asked]
    assert [a.json()["choices"][0]["text"] for a in answers] == want
    assert len(set(want)) > 30


def test_tenants_answer_differently_and_take_turns_within_a_budget(make_server: Make, talk: Talk) -> None:
    free = make_server()
    one = free.tenants.entries["a"].difference.nbytes
    server = make_server(budget=one)
    asked = [ask(model) for model in MODELS for _ in range(3)]
    want = [solo(free, each) for each in asked]

    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/v1/completions", json=each) for each in asked))

    assert [a.json()["choices"][0]["text"] for a in talk(server, act)] == want
    assert len(set(want)) == 4
    assert server.tenants.delta_bytes() <= one


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@pytest.mark.parametrize("more", [{}, {"temperature": 1, "top_p": 0.8, "seed": 3}])
def test_a_stream_says_what_the_whole_answer_says(
    path: str, more: dict[str, Any], make_server: Make, talk: Talk
) -> None:
    chat = "chat" in path
    asked = ask("b", max_tokens=12, **more)
    if chat:
        asked = {**asked, "messages": [{"role": "user", "content": "the king"}]}
        del asked["prompt"]

    async def act(client: httpx.AsyncClient) -> tuple[Any, list[Any], list[Any]]:
        whole = (await client.post(path, json=asked)).json()
        told = {**asked, "stream_options": {"include_usage": True}}
        return whole, await streamed(client, path, asked), await streamed(client, path, told)

    whole, chunks, told = talk(make_server(chat=True), act)
    choices = [chunk["choices"][0] for chunk in chunks]
    text = "".join(c["delta"].get("content", "") if chat else c["text"] for c in choices)
    assert text == (whole["choices"][0]["message"]["content"] if chat else whole["choices"][0]["text"]) != ""
    assert [c["finish_reason"] for c in choices[:-1]] == [None] * (len(choices) - 1)
    assert choices[-1]["finish_reason"] == whole["choices"][0]["finish_reason"]
    assert told[-1]["usage"] == whole["usage"] and told[-1]["choices"] == []
    assert whole["object"] == ("chat.completion" if chat else "text_completion")


@pytest.mark.slow
def test_a_seed_repeats_an_answer_and_another_changes_it(make_server: Make, talk: Talk) -> None:
    async def act(client: httpx.AsyncClient) -> list[str]:
        asked = [ask(temperature=1.5, seed=seed, max_tokens=16) for seed in (1, 1, 2)]
        return [(await client.post("/v1/completions", json=a)).json()["choices"][0]["text"] for a in asked]

    first, second, third = talk(make_server(), act)
    assert first == second != third


def test_a_text_goes_on_behind_its_prompt_with_its_space(make_server: Make) -> None:
    """A decoder that drops the space at the beginning of a text would join the words of prompt and answer."""
    tokenizer = make_server().tokenizer
    ids = tokenizer("the king the king", add_special_tokens=False).input_ids
    prompt, made = ids[: len(ids) // 2], ids[len(ids) // 2 :]
    whole, text = tokenizer.decode(ids), Text(tokenizer, before=prompt[-BEFORE:])
    assert tokenizer.decode(prompt) + "".join(map(text.add, made)) + text.finish() == whole
    plain = Text(tokenizer)
    assert "".join(map(plain.add, made)) + plain.finish() == tokenizer.decode(made) == whole[-len("the king") :]


def test_an_end_token_that_is_no_special_one_is_not_part_of_the_answer(make_server: Make) -> None:
    tokenizer, said = make_server().tokenizer, list[Piece]()
    made, end = tokenizer("the king", add_special_tokens=False).input_ids, tokenizer.convert_tokens_to_ids("t")
    asked = Sequence(prompt=[5], tenant=None, limit=99, sampling=Sampling(), text=Text(tokenizer),
                     ends=frozenset({end}), emit=said.append)  # fmt: skip
    assert [asked.take(token) for token in [*made, end]] == [False] * len(made) + [True]
    assert "".join(piece.text for piece in said) == tokenizer.decode(made) and said[-1].tokens == len(made) + 1


def test_a_temperature_next_to_nothing_is_the_likeliest_token(make_server: Make, talk: Talk) -> None:
    """Scores divided by it are beyond any number; that must not fail the request, nor those that run beside it."""
    asked = [ask(temperature=temperature) for temperature in (0, 5e-324, 1e-308)]

    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/v1/completions", json=one) for one in asked))

    likeliest, *others = (answer.json()["choices"] for answer in talk(make_server(), act))
    assert all(choices == likeliest for choices in others)


def test_usage_counts_and_the_reason_to_end(make_server: Make, talk: Talk) -> None:
    server = make_server()
    text = solo(server, ask(max_tokens=20))
    stop = text[len(text) // 2 : len(text) // 2 + 3]

    async def act(client: httpx.AsyncClient) -> list[Any]:
        asked = (ask(max_tokens=4), ask(max_tokens=20, stop=stop), ask(max_tokens=20, stop=["@@", stop]))
        return [(await client.post("/v1/completions", json=a)).json() for a in asked]

    short, stopped, listed = talk(server, act)
    assert short["usage"] == {"prompt_tokens": 3, "completion_tokens": 4, "total_tokens": 7}
    assert short["choices"][0]["finish_reason"] == "length"
    assert stopped["choices"][0] == listed["choices"][0]
    assert stopped["choices"][0]["finish_reason"] == "stop"
    assert stopped["choices"][0]["text"] == text[: text.index(stop)]


def test_models_health_and_metrics(make_server: Make, talk: Talk) -> None:
    async def act(client: httpx.AsyncClient) -> tuple[Any, ...]:
        await client.post("/v1/completions", json=ask("c", max_tokens=5))
        return tuple([await client.get(path) for path in ("/v1/models", "/health", "/metrics")])

    models, health, metrics = talk(make_server(), act)
    assert [m["id"] for m in models.json()["data"]] == list(MODELS)
    assert health.json() == {"status": "ok"}
    assert 'compress_requests_total{model="c",outcome="length"} 1.0' in metrics.text
    assert 'compress_tokens_total{kind="completion",model="c"} 5.0' in metrics.text
    assert "compress_delta_bytes" in metrics.text


@pytest.mark.parametrize(
    ("name", "status"), [("tiny", 200), ("b", 200), ("nobody", 404), ("some%2Fbody", 404), ("some/body", 404)]
)
def test_one_model_is_told_of_as_in_the_list(name: str, status: int, make_server: Make, talk: Talk) -> None:
    async def act(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        return await client.get(f"/v1/models/{name}"), await client.get("/v1/models")

    one, listed = talk(make_server(), act)
    assert one.status_code == status
    told = one.json()
    assert told in listed.json()["data"] or told["error"]["code"] == "model_not_found"


# -- what means the same ----------------------------------------------------------------------------------

HELLO = [{"role": "user", "content": "x"}]
BARE: dict[type[Any], dict[str, Any]] = {
    Completion: {"model": "a", "prompt": [5, 6]},
    Chat: {"model": "a", "messages": HELLO},
}
# an assistant's turn as `message.model_dump()` of OpenAI's client library, version 3.57, gives it
DUMPED = {"role": "assistant", "content": "yes", "refusal": None, "annotations": None, "audio": None,
          "function_call": None, "tool_calls": None}  # fmt: skip


def read(kind: type[Any], **more: Any) -> Any:
    """What the server makes of a request with these fields."""
    return parsed(json.dumps({**BARE[kind], **more}).encode(), kind)


@pytest.mark.parametrize("kind", BARE)
@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(field, None) for field in ("max_tokens", "stop", "n", "stream_options", "suffix", "logprobs", "anything")],
        *[("presence_penalty", 0), ("presence_penalty", 0.0), ("frequency_penalty", 0), ("logit_bias", {})],
        *[("logprobs", False), ("top_logprobs", 0), ("echo", False), ("best_of", 1), ("store", False)],
        *[("service_tier", "auto"), ("service_tier", "default"), ("response_format", {"type": "text"})],
        *[("tools", []), ("functions", []), ("tool_choice", "none"), ("tool_choice", "auto")],
        *[("parallel_tool_calls", True), ("modalities", ["text"])],
    ],
)
def test_what_asks_for_nothing_counts_as_not_given(kind: type[Any], field: str, value: Any) -> None:
    assert read(kind, **{field: value}) == read(kind)


@pytest.mark.parametrize(
    ("kind", "field", "value", "same"),
    [
        (Completion, "prompt", [[5, 6]], [5, 6]),
        (Completion, "prompt", ["x y"], "x y"),
        (Completion, "stop", "x", ["x"]),
        (Completion, "stream_options", {"include_usage": None, "include_obfuscation": False}, {}),
        (Chat, "messages", [{"role": "user", "content": [{"type": "text", "text": "x"}]}], HELLO),
        (Chat, "messages", [*HELLO, DUMPED], [*HELLO, {"role": "assistant", "content": "yes"}]),
        (Chat, "messages", [{**DUMPED, "annotations": [], "tool_calls": []}], [DUMPED]),
    ],
)
def test_two_forms_of_a_field_mean_the_same(kind: type[Any], field: str, value: Any, same: Any) -> None:
    assert read(kind, **{field: value}) == read(kind, **{field: same})


def test_labels_are_accepted() -> None:
    labels = {"user": "me", "safety_identifier": "s", "prompt_cache_key": "k", "metadata": {"run": "7"}}
    assert labels.items() <= read(Chat, **labels).model_dump().items()


@pytest.mark.parametrize(
    ("message", "want"),
    [
        ({"role": "developer", "content": "x"}, {"role": "system", "content": "x"}),
        ({"role": "user", "content": [{"type": "text", "text": text} for text in ("x", " y")]},
         {"role": "user", "content": "x y"}),
        ({"role": "user", "content": "x", "name": "Ann"}, {"role": "user", "content": "x", "name": "Ann"}),
        ({**DUMPED, "content": None}, {"role": "assistant", "content": ""}),
    ],
)  # fmt: skip
def test_the_template_gets_a_message_in_its_plainest_form(message: dict[str, Any], want: dict[str, str]) -> None:
    assert read(Chat, messages=[message]).messages[0].said() == want


def test_what_clients_send_is_answered_like_the_plain_request(make_server: Make, talk: Talk) -> None:
    plain = {"model": "a", "max_tokens": 4, "temperature": 0}
    fields = {**plain, "presence_penalty": 0, "logit_bias": {}, "tools": [], "store": False, "n": 1, "stop": None}
    same = [
        ("completions", {**plain, "prompt": [5, 6]}, {**fields, "prompt": [[5, 6]], "echo": False, "suffix": None}),
        (
            "chat/completions",
            {**plain, "messages": [*HELLO, {"role": "assistant", "content": "yes"}]},
            {**fields, "messages": [{"role": "user", "content": [{"type": "text", "text": "x"}]}, DUMPED]},
        ),
    ]

    async def act(client: httpx.AsyncClient) -> list[list[httpx.Response]]:
        return [[await client.post(f"/v1/{path}", json=body) for body in pair] for path, *pair in same]

    for want, got in talk(make_server(chat=True), act):
        assert want.status_code == got.status_code == 200
        assert got.json()["choices"] == want.json()["choices"] and got.json()["usage"] == want.json()["usage"]


# -- what is refused --------------------------------------------------------------------------------------

IMAGE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,"}}
CALLED = {**DUMPED, "content": None, "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f"}}]}


@pytest.mark.parametrize(
    ("kind", "field", "value", "place", "said"),
    [
        (Completion, "presence_penalty", 0.5, "presence_penalty", "is not supported here"),
        (Completion, "presence_penalty", False, "presence_penalty", "is not supported here"),
        (Completion, "logprobs", 0, "logprobs", "is not supported here"),
        (Completion, "echo", True, "echo", "is not supported here"),
        (Completion, "best_of", 2, "best_of", "is not supported here"),
        (Completion, "suffix", "x", "suffix", "is not supported here"),
        (Completion, "n", 2, "n", "Input should be 1, not 2"),
        (Completion, "n", [2], "n", "Input should be 1"),
        (Completion, "prompt", None, "prompt", "Field required"),
        (Completion, "prompt", ["x", "y"], "prompt", "Input should be one text or one list of tokens"),
        (Completion, "prompt", [[5], [6]], "prompt", "Input should be one text or one list of tokens"),
        (Completion, "prompt", [[[5]]], "prompt", "Input should be one text or one list of tokens"),
        (Completion, "prompt", [5, True], "prompt", "Input should be one text or one list of tokens"),
        (Completion, "stop", 5, "stop", "Input should be a text or a list"),
        (Completion, "stop", ["x"] * 17, "stop", "List should have at most 16 items after validation, not 17"),
        (Completion, "stop", ["x", 5], "stop[1]", "Input should be a valid string"),
        (Completion, "stream_options", {"x": 1}, "stream_options.x", "is not supported here"),
        (Chat, "stream_options", {"include_obfuscation": True}, "stream_options.include_obfuscation",
         "Input should be False, not True"),
        (Chat, "logprobs", True, "logprobs", "is not supported here"),
        (Chat, "response_format", {"type": "json_object"}, "response_format", "is not supported here"),
        (Chat, "tools", [{"type": "function"}], "tools", "is not supported here"),
        (Chat, "store", True, "store", "is not supported here"),
        (Chat, "service_tier", "priority", "service_tier", "is not supported here"),
        (Chat, "top_k", 5, "top_k", "is not supported here"),
        (Chat, "messages", ["x"], "messages[0]", "Input should be a valid dictionary or instance of Message"),
        (Chat, "messages", [*HELLO, CALLED], "messages[1].tool_calls", "is not supported here"),
        (Chat, "messages", [{**DUMPED, "refusal": "no"}], "messages[0].refusal", "is not supported here"),
        (Chat, "messages", [{"role": "user", "content": None}], "messages[0].content", "Field required"),
        (Chat, "messages", [{"role": "user", "content": 5}], "messages[0].content",
         "Input should be a text or a list"),
        (Chat, "messages", [{"role": "user", "content": [IMAGE]}], "messages[0].content[0].type",
         "Input should be 'text', not 'image_url'"),
        (Chat, "messages", [{"role": "user", "content": ["x"]}], "messages[0].content[0]",
         "Input should be a valid dictionary or instance of Part"),
        (Chat, "messages", [{"role": "tool", "content": "x"}], "messages[0].role",
         "Input should be 'system', 'developer', 'user' or 'assistant', not 'tool'"),
    ],
)  # fmt: skip
def test_what_is_not_supported_is_named(kind: type[Any], field: str, value: Any, place: str, said: str) -> None:
    with pytest.raises(Refusal) as caught:
        read(kind, **{field: value})
    assert caught.value.message == f"{place}: {said}"
    assert (caught.value.status, caught.value.param, caught.value.code) == (400, place, "invalid_value")


WRONG: dict[str, tuple[str, Any, int, str]] = {  # path, body, status, what is said
    "unknown model": ("completions", ask("nobody"), 404, "does not exist"),
    "no model": ("completions", {"prompt": "x"}, 400, "model"),
    "not JSON": ("completions", b"{", 400, "not JSON"),
    "deep JSON": ("completions", b"[" * 100_000, 400, "not JSON"),
    "not UTF-8": ("completions", b"\xff\xfe{}", 400, "not JSON"),
    "not an object": ("completions", b"[1]", 400, "not a JSON object"),
    "empty body": ("completions", b"", 400, "not JSON"),
    "empty prompt": ("completions", ask(prompt=[]), 400, "is empty"),
    "two prompts": ("completions", ask(prompt=["x", "y"]), 400, "prompt"),
    "half a character": ("completions", ask(prompt="\ud800"), 400, "half of a surrogate pair"),
    "half of one in a list": ("completions", ask(prompt=["x\udfff"]), 400, "half of a surrogate pair"),
    "token too large": ("completions", ask(prompt=[5, 10**9]), 400, "whole numbers"),
    "prompt too long": ("completions", ask(prompt=[5] * 128), 400, "context of 128"),
    "two answers": ("completions", ask(n=2), 400, "n:"),
    "unknown field": ("completions", ask(logit_bias={"5": 1}), 400, "not supported"),
    "negative": ("completions", ask(max_tokens=-1), 400, "max_tokens"),
    "too many": ("completions", ask(max_tokens=10**6), 400, "at most 1024"),
    "cold": ("completions", ask(temperature=-1), 400, "temperature"),
    "no number": ("completions", b'{"model": "a", "prompt": "x", "temperature": NaN}', 400, "temperature"),
    "wide": ("completions", ask(top_p=2), 400, "top_p"),
    "no template": ("chat/completions", {"model": "a", "messages": HELLO}, 400, "no chat template"),
    "no messages": ("chat/completions", {"model": "a", "messages": []}, 400, "messages"),
    "role": ("chat/completions", {"model": "a", "messages": [{"role": "tool", "content": "x"}]}, 400, "messages"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_what_is_wrong_is_said_in_one_shape(case: str, make_server: Make, talk: Talk) -> None:
    path, body, status, said = WRONG[case]
    content = body if isinstance(body, bytes) else json.dumps(body).encode()

    async def act(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        return await client.post(f"/v1/{path}", content=content), await client.post("/v1/completions", json=ask())

    answer, after = talk(make_server(), act)
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert after.status_code == 200


def test_half_a_character_of_a_message_is_refused(make_server: Make, talk: Talk) -> None:
    body = {"model": "a", "messages": [*HELLO, {"role": "user", "content": "x\udfff"}], "max_tokens": 2}

    async def act(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/chat/completions", content=json.dumps(body).encode())

    answer = talk(make_server(chat=True), act)
    assert answer.status_code == 400
    assert "messages: contains half of a surrogate pair" in answer.json()["error"]["message"]


def of_kind(kind: str) -> Any:
    """A small model of another family."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 31, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "n_head": 2}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).eval()


@pytest.mark.parametrize(
    ("kind", "said"),
    [("mamba", "its cache does not consist of plain keys and values"), ("bloom", "context length is unknown")],
)
def test_a_base_that_cannot_be_served_is_refused_at_once(kind: str, said: str) -> None:
    with pytest.raises(compress.RecipeError, match=said):
        Server(Tenants(of_kind(kind), {}), None, kind, Limits())


def test_the_longest_text_goes_by_several_names() -> None:
    model = of_kind("bloom")
    model.config.seq_length = 64
    assert context_of(model) == 64


def test_other_paths_and_methods_are_refused_in_the_same_shape(make_server: Make, talk: Talk) -> None:
    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        return [await client.get("/docs"), await client.get("/v1/completions")]

    assert [(a.status_code, set(a.json())) for a in talk(make_server(), act)] == [(404, {"error"}), (405, {"error"})]


def test_the_key_is_asked_for_everywhere_but_health(make_server: Make, talk: Talk) -> None:
    async def act(client: httpx.AsyncClient) -> list[int]:
        right, wrong = {"Authorization": "Bearer open sesame"}, {"Authorization": "Bearer open sesamf"}
        calls = [
            client.post("/v1/completions", json=ask(), headers=h) for h in (right, wrong, {}, {"Authorization": "x"})
        ]
        calls += [client.get("/v1/models"), client.get("/metrics"), client.get("/health")]
        return [(await call).status_code for call in calls]

    assert talk(make_server(api_key="open sesame"), act) == [200, 401, 401, 401, 401, 401, 200]


@pytest.mark.parametrize("lies", ["none", "chunked"])
def test_ten_megabytes_are_not_read(lies: str, make_server: Make, talk: Talk) -> None:
    sent = 0

    async def chunks() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(160):
            sent += 1
            yield b"x" * 65536

    async def act(client: httpx.AsyncClient) -> tuple[httpx.Response, httpx.Response]:
        body = b'{"model": "a", "prompt": "' + b"x" * 10_000_000 + b'"}' if lies == "none" else chunks()
        return await client.post("/v1/completions", content=body), await client.post("/v1/completions", json=ask())

    answer, after = talk(make_server(), act)
    assert answer.status_code == 413
    assert "longer than 1000000 bytes" in answer.json()["error"]["message"]
    assert sent < 40
    assert after.status_code == 200


def test_a_full_queue_says_when_to_come_again(make_server: Make, talk: Talk) -> None:
    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        asked = [ask(max_tokens=60) for _ in range(40)]
        return await asyncio.gather(*(client.post("/v1/completions", json=a) for a in asked))

    answers = talk(make_server(max_queue=2, max_batch=1), act)
    refused = [a for a in answers if a.status_code == 429]
    assert len(refused) + sum(a.status_code == 200 for a in answers) == 40
    assert len(refused) > 10
    assert all(int(a.headers["retry-after"]) >= 1 for a in refused)


# -- what goes wrong ------------------------------------------------------------------------------------------


def test_a_long_prompt_does_not_lengthen_the_short_ones_beside_it(
    make_server: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They were all filled up to it, and computed as if they were as long."""
    server, plain, shapes = make_server(), engine.logits_of, list[tuple[int, int]]()

    def logits(tenants: Tenants, running: Any, ids_BS: torch.Tensor) -> torch.Tensor:
        shapes.append((ids_BS.shape[0], ids_BS.shape[1]))
        return plain(tenants, running, ids_BS)

    monkeypatch.setattr(engine, "logits_of", logits)
    prompts = [list(range(4, 4 + length)) for length in (3, 100, 5, 40, 20, 70)]
    asked = [ask(MODELS[n % 4], prompt, max_tokens=3) for n, prompt in enumerate(prompts)]
    want = [solo(server, one) for one in asked]
    pieces: list[list[Piece]] = [[] for _ in asked]
    for one, heard in zip(asked, pieces, strict=True):
        server.engine.submit(server.sequence(Completion.model_validate(one), heard.append))
    server.engine.start()
    while not all(heard and heard[-1].finish for heard in pieces):
        time.sleep(0.001)
    assert [shape for shape in shapes if shape[1] > 1] == [(3, 20), (2, 70), (1, 100)]
    assert ["".join(piece.text for piece in heard) for heard in pieces] == want


def test_a_failing_step_fails_its_requests_and_no_others(
    make_server: Make, talk: Talk, caplog: pytest.LogCaptureFixture
) -> None:
    server = make_server()
    broken = Difference.of({}, {"model.norm.weight": torch.zeros(48)})

    def unreadable(name: str) -> Any:
        raise OSError(f"{name}: the disk is gone")

    server.tenants.add("broken", replace(broken, tensor=unreadable))
    asked = [ask(model) for model in ("broken", "b", "a", "broken", "tiny")]
    want = [solo(server, one) for one in asked if one["model"] != "broken"]

    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/v1/completions", json=one) for one in asked))

    answers = talk(server, act)
    assert [a.status_code for a in answers] == [500, 200, 200, 500, 200]
    assert [a.json()["choices"][0]["text"] for a in answers if a.status_code == 200] == want
    assert answers[0].json()["error"]["type"] == "server_error"
    assert "failed" in caplog.text


def test_prompts_that_fail_together_are_tried_alone_when_their_memory_is_free(
    make_server: Make, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, together, alive = make_server(), [], []
    join = Engine._join

    def failing(self: Engine, new: list[Any]) -> None:
        large = torch.zeros(8)
        if len(new) > 1:
            together.append(weakref.ref(large))
            raise torch.OutOfMemoryError("CUDA out of memory")
        alive.extend(one() for one in together)
        join(self, new)

    monkeypatch.setattr(Engine, "_join", failing)

    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/v1/completions", json=ask(model)) for model in "abab"))

    assert [answer.status_code for answer in talk(server, act)] == [200] * 4
    assert together and alive and not any(one is not None for one in alive)


def test_a_dropped_tenant_is_unknown_and_the_others_go_on(make_server: Make, talk: Talk) -> None:
    server = make_server()

    async def act(client: httpx.AsyncClient) -> list[int]:
        server.tenants.drop("a")
        return [(await client.post("/v1/completions", json=ask(model))).status_code for model in ("a", "b")]

    assert talk(server, act) == [404, 200]


def test_numbers_that_are_not_finite_are_an_error(make_server: Make, talk: Talk) -> None:
    server = make_server()
    site = "model.layers.0.mlp.down_proj"
    broken = torch.full((48, 72), float("inf"))
    server.tenants.add("broken", Difference.of({site: Dense(broken)}))

    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/v1/completions", json=ask(m)) for m in ("broken", "b", "broken")))

    answers = talk(server, act)
    assert [a.status_code for a in answers] == [500, 200, 500]
    assert "not finite" in answers[0].json()["error"]["message"]


def test_a_tenant_dropped_while_it_answers_fails_alone(make_server: Make, talk: Talk) -> None:
    server = make_server()

    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        asked = (ask(model, max_tokens=100) for model in ("a", "b"))
        both = [asyncio.create_task(client.post("/v1/completions", json=one)) for one in asked]
        while server.engine.active < 2:
            await asyncio.sleep(0.001)
        server.tenants.drop("a")
        return await asyncio.gather(*both)

    answers = talk(server, act)
    assert [a.status_code for a in answers] == [500, 200]
    assert "no longer served" in answers[0].json()["error"]["message"]


def test_a_tenant_dropped_just_before_a_step_waits_until_it_is_done(
    make_server: Make, talk: Talk, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, plain, drops = make_server(), engine.logits_of, list[threading.Thread]()

    def logits(tenants: Any, running: Any, ids_BS: Any) -> Any:
        if not drops and tuple(ids_BS.shape) == (2, 1):  # a step, not the prompts
            drops.append(threading.Thread(target=tenants.drop, args="a"))
            drops[0].start()
            drops[0].join(0.2)  # time enough to get ahead of the step, if it could
        return plain(tenants, running, ids_BS)

    monkeypatch.setattr(engine, "logits_of", logits)

    async def act(client: httpx.AsyncClient) -> list[httpx.Response]:
        return await asyncio.gather(*(client.post("/v1/completions", json=ask(m, max_tokens=100)) for m in "ab"))

    answers = talk(server, act)
    drops[0].join()
    assert [a.status_code for a in answers] == [500, 200]
    assert "no longer served" in answers[0].json()["error"]["message"]


def test_a_cancelled_sequence_leaves_the_batch(make_server: Make, talk: Talk) -> None:
    server = make_server()

    async def act(client: httpx.AsyncClient) -> httpx.Response:
        gone = asyncio.create_task(client.post("/v1/completions", json=ask("a", max_tokens=100)))
        while server.engine.active < 1:
            await asyncio.sleep(0.001)
        gone.cancel()
        answer = await client.post("/v1/completions", json=ask("b"))
        while server.engine.active:
            await asyncio.sleep(0.001)
        return answer

    assert talk(server, act).status_code == 200
    counted = server.metrics.requests.labels("a", "cancelled")._value.get()
    assert counted == 1


@pytest.mark.parametrize("cut", [True, False])
def test_a_client_that_leaves_is_no_failure(cut: bool, make_server: Make, talk: Talk) -> None:
    server, body = make_server(), json.dumps(ask("a", max_tokens=100)).encode()
    told = {"type": "http.request", "body": body[:9] if cut else body, "more_body": cut}
    messages = iter([told])

    async def receive() -> dict[str, Any]:
        return next(messages, {"type": "http.disconnect"})

    async def send(_: Any) -> None:
        pass

    async def act(client: Any) -> None:
        scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": []}
        await client._transport.app(scope, receive, send)

    talk(server, act)
    counted = {o: server.metrics.requests.labels("a", o)._value.get() for o in ("cancelled", "failed")}
    assert counted == {"cancelled": 0 if cut else 1, "failed": 0}


def test_a_prompt_stays_open_whatever_a_tokenizer_adds_behind_texts() -> None:
    from tokenizers.processors import TemplateProcessing

    plain = AutoTokenizer.from_pretrained(locate("builtin"))
    ending = copy.deepcopy(plain)
    specials = [("<s>", plain.bos_token_id), ("</s>", plain.eos_token_id)]
    ending.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=specials)
    assert ending("The end").input_ids[-1] == plain.eos_token_id
    told = Language.of(ending, None)
    inner = plain("The end", add_special_tokens=False).input_ids
    assert told.opened("The end") == [plain.bos_token_id, *inner]
    assert told.opened("") == [plain.bos_token_id]
    assert Language.of(plain, None).opened("The end</s>") == plain("The end</s>").input_ids  # its own stays


def test_a_tokenizer_with_more_entries_than_the_model_is_refused(make_server: Make, talk: Talk) -> None:
    server = make_server()
    tokenizer: Any = server.language_of("tiny").tokenizer
    tokenizer.add_tokens([f"[extra{n}]" for n in range(211)])

    async def act(client: httpx.AsyncClient) -> httpx.Response:
        return await client.post("/v1/completions", json={**ask("tiny"), "prompt": "[extra210]"})

    answer = talk(server, act)
    assert answer.status_code == 400 and "the model has 211" in answer.json()["error"]["message"]
