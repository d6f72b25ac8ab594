"""`compress serve`: serves a base model and many deltas of it over HTTP, with an OpenAI-compatible API."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from compress.commands.output import bytes_of, quiet_loading, screen
from compress.errors import RecipeError

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY = re.compile(r"[!-~]([ -~]*[!-~])?")  # printable ASCII without outer spaces, which a header transmits unchanged
WHOLE = "note: the smaller key-value cache of this model is not used here; keys and values are kept whole"
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    base: Annotated[
        str,
        typer.Argument(help="folder of the model to serve, dense or compressed, or `builtin`; the base of all deltas"),
    ],
    delta: Annotated[
        list[str] | None, typer.Option("--delta", help="name=FOLDER of a delta or a LoRA adapter; repeatable")
    ] = None,
    host: Annotated[
        str, typer.Option(help="address or host name to listen on; 0.0.0.0 accepts connections from the network")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="COMPRESS_API_KEY", help="bearer token that clients must send")
    ] = None,
    max_queue: Annotated[
        int, typer.Option(min=1, help="requests that may wait; further ones are answered with 429")
    ] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="sequences computed together")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="most tokens per answer")] = 1024,
    max_body: Annotated[str, typer.Option(help="largest request body, such as 1MB")] = "1MB",
    device: Annotated[str, typer.Option(help="where to compute: cpu, cuda, cuda:1")] = "cpu",
    budget: Annotated[
        str | None, typer.Option(help="memory for deltas, such as 2GB; default: keep all of them in memory")
    ] = None,
    deadline: Annotated[int, typer.Option(min=1, help="seconds that running requests have to finish at shutdown")] = 30,
) -> None:
    """Serve a base model and its fine-tunes over an OpenAI-compatible HTTP API.

    Every request names its model; requests for different fine-tunes are computed in one batch.
    """
    require_serving()
    named = deltas_of(delta or [])
    body, most = bytes_of(max_body, "--max-body"), None if budget is None else bytes_of(budget, "--budget")
    if api_key is not None and KEY.fullmatch(api_key) is None:
        raise RecipeError("--api-key: must be printable ASCII, not empty, and without spaces at either end")

    from compress.model.source import display_name, locate, read_json
    from compress.plan import placed
    from compress.serving.app import Limits, Server
    from compress.serving.languages import own_languages, tokenizer_of
    from compress.serving.process import bound, serve_forever
    from compress.tenants import load_tenants

    folder = locate(base)
    name = display_name(folder)
    if name in named:
        raise RecipeError(f"--delta: {name!r} is the name of the base; give the delta another name")
    there = placed(device)
    limits = Limits(max_queue=max_queue, max_batch=max_batch, max_tokens=max_tokens, max_body=body, api_key=api_key)
    quiet_loading()
    with bound(host, port) as listeners:  # a port in use is reported before anything is loaded
        tokenizer, tenants = tokenizer_of(folder), load_tenants(folder, named, most, **there)
        if "kv" in (read_json(folder / "config.json", "the configuration").get("quantization_config") or {}):
            screen().print(WHOLE, markup=False)
        server = Server(tenants, tokenizer, name, limits, own_languages(folder, named, tokenizer))
        said = f"serving {', '.join(server.models())} at {url_of(host, port)}"
        serve_forever(server, listeners, deadline, lambda: screen().print(said, markup=False))


def require_serving() -> None:
    """Raise RecipeError if the extra `serve` is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise RecipeError(f"serving needs {', '.join(missing)}: pip install {' '.join(missing)}")


def url_of(host: str, port: int) -> str:
    """The URL under which clients reach the server; an IPv6 address is put in brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def deltas_of(given: list[str]) -> dict[str, Path]:
    """The folders by name from options `name=FOLDER`; raises RecipeError for anything else, or a name given twice."""
    found: dict[str, Path] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not equals or not folder or NAME.fullmatch(name) is None:
            raise RecipeError(f"--delta: {one!r} is not name=FOLDER; a name is 1 to 64 of A-Z a-z 0-9 . _ -")
        if name in found:
            raise RecipeError(f"--delta: {name!r} is given twice")
        found[name] = Path(folder)
    return found
