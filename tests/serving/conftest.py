"""Fixtures: a tiny server with three tenants that answer differently, in this process and over loopback."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

import compress
from compress import Signs
from compress.runtime.tenants import Difference, Tenants
from compress.serving.app import Limits, Server, make_app

CHAT = "{% for m in messages %}{{ m['role'] }} {{ m['content'] }} {% endfor %}assistant"


def difference(model: Any, seed: int) -> Difference:
    """A delta with signs at every site, large enough to change the answers, and with norms of its own."""
    generator = torch.Generator().manual_seed(seed)
    sites = {n: m.weight for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"}
    weights = {
        n: Signs(torch.rand(w.shape, generator=generator) > 0.5, torch.full((1, 1), 0.1)) for n, w in sites.items()
    }
    norms = {n: p.detach() * 1.5 for n, p in model.named_parameters() if p.ndim == 1}
    return Difference.of(weights, norms)


@pytest.fixture(scope="session")
def loaded(tiny_llama: Path) -> tuple[Any, Any]:
    """The model and its tokenizer."""
    from transformers import AutoTokenizer

    return compress.load(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama, local_files_only=True)


@pytest.fixture
def make_server(loaded: tuple[Any, Any]) -> Iterator[Callable[..., Server]]:
    """`make_server(chat=False, **limits)`: a server with the base `tiny` and the tenants a, b and c."""
    servers: list[Server] = []

    def make(chat: bool = False, budget: int | None = None, **limits: Any) -> Server:
        model, tokenizer = copy.deepcopy(loaded[0]), copy.deepcopy(loaded[1])
        tokenizer.chat_template = CHAT if chat else None
        tenants = Tenants(model, {name: difference(model, seed) for seed, name in enumerate("abc")}, budget)
        servers.append(Server(tenants, tokenizer, "tiny", Limits(**limits)))
        return servers[-1]

    yield make
    for server in servers:
        server.engine.close()


@asynccontextmanager
async def client_of(server: Server) -> Any:
    """A client that talks to the application in this process, while it lives."""
    app = make_app(server)
    async with app.router.lifespan_context(app):
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://server", timeout=30) as client:
            yield client


@pytest.fixture
def talk() -> Callable[[Server, Callable[[httpx.AsyncClient], Awaitable[Any]]], Any]:
    """`talk(server, act)`: the result of `act(client)`, with the server running meanwhile."""

    def run(server: Server, act: Callable[[httpx.AsyncClient], Awaitable[Any]]) -> Any:
        async def whole() -> Any:
            async with client_of(server) as client:
                return await act(client)

        return asyncio.run(whole())

    return run
