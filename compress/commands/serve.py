"""`compress serve`: one base model and many deltas of it behind an HTTP server that OpenAI's clients know."""

from __future__ import annotations

import re
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Annotated

import typer

from compress.commands.output import bytes_of, quiet_loading, screen
from compress.errors import ArtifactError, RecipeError

if TYPE_CHECKING:
    from compress.serving.app import Language

NAME = re.compile(r"[A-Za-z0-9._-]{1,64}")
KEY = re.compile(r"[!-~]([ -~]*[!-~])?")  # what arrives in a header as it was sent
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")
NEEDED = ("fastapi", "uvicorn", "prometheus_client")


def serve(
    base: Annotated[str, typer.Argument(help="the model all deltas are of: a folder, or `builtin`")],
    delta: Annotated[list[str] | None, typer.Option("--delta", help="name=FOLDER, once for each fine-tune")] = None,
    host: Annotated[str, typer.Option(help="address to listen at; 0.0.0.0 is open to the network")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535)] = 8000,
    api_key: Annotated[
        str | None, typer.Option("--api-key", envvar="COMPRESS_API_KEY", help="what clients must send as bearer")
    ] = None,
    max_queue: Annotated[int, typer.Option(min=1, help="requests that may wait; more get 429")] = 256,
    max_batch: Annotated[int, typer.Option(min=1, help="sequences computed together")] = 32,
    max_tokens: Annotated[int, typer.Option(min=1, help="tokens an answer may have")] = 1024,
    max_body: Annotated[str, typer.Option(help="largest request, such as 1MB")] = "1MB",
    budget: Annotated[str | None, typer.Option(help="bytes of deltas in memory, such as 2GB; default: all")] = None,
    deadline: Annotated[int, typer.Option(min=1, help="seconds that running requests get at shutdown")] = 30,
) -> None:
    """Serve a base model and its fine-tunes: every request names its model, all share each step of computing."""
    require_serving()
    named = deltas_of(delta or [])
    body, most = bytes_of(max_body, "--max-body"), None if budget is None else bytes_of(budget, "--budget")
    if api_key is not None and KEY.fullmatch(api_key) is None:
        raise RecipeError("--api-key: is empty, has space around it, or characters that a header cannot hold")

    from compress.model.source import display_name, locate
    from compress.serving.app import Limits, Server
    from compress.serving.process import bound, serve_forever
    from compress.tenants import load_tenants

    folder = locate(base)
    name = display_name(folder)
    if name in named:
        raise RecipeError(f"--delta: {name!r} is the name of the base; give the delta another one")
    limits = Limits(max_queue=max_queue, max_batch=max_batch, max_tokens=max_tokens, max_body=body, api_key=api_key)
    quiet_loading()
    with bound(host, port) as listener:  # a port in use is told before anything is loaded
        tokenizer, tenants = tokenizer_of(folder), load_tenants(folder, named, most)
        server = Server(tenants, tokenizer, name, limits, own_languages(folder, named, tokenizer))
        said = f"serving {', '.join(server.models())} at http://{host}:{port}"
        serve_forever(server, listener, deadline, lambda: screen().print(said, markup=False))


def require_serving() -> None:
    """Raise RecipeError if the extra `serve` is not installed."""
    missing = [name for name in NEEDED if find_spec(name) is None]
    if missing:
        raise RecipeError(f"serving needs {', '.join(missing)}: pip install 'compress-llm[serve]'")


def deltas_of(given: list[str]) -> dict[str, Path]:
    """Name -> folder, of `name=FOLDER`; raises RecipeError for anything else."""
    found: dict[str, Path] = {}
    for one in given:
        name, equals, folder = one.partition("=")
        if not equals or not folder or NAME.fullmatch(name) is None:
            raise RecipeError(f"--delta: {one!r} is not name=FOLDER; a name is 1 to 64 of A-Z a-z 0-9 . _ -")
        if name in found:
            raise RecipeError(f"--delta: {name!r} is given twice")
        found[name] = Path(folder)
    return found


def own_languages(base: Path, deltas: Mapping[str, Path], tokenizer: object) -> dict[str, Language]:
    """The languages of the fine-tunes that differ from their base in a file beside the weights.

    `tokenizer` is the base's, which those keep that have none. Raises ArtifactError for one that cannot be read.
    """
    from compress.artifact import Artifact
    from compress.model.source import locate, read_json
    from compress.serving.app import Language
    from compress.writer import copy_companions, copy_shared, is_companion, write_json

    found: dict[str, Language] = {}
    for name, given in deltas.items():
        delta = Artifact(locate(given), base)
        if not any(map(is_companion, delta.provenance["files"])):
            continue
        with TemporaryDirectory() as made:  # a tokenizer is read from one folder, and a delta leaves files to its base
            beside = Path(made)
            copy_shared(delta, beside)
            copy_companions(delta.path, beside)
            write_json(beside / "config.json", {k: v for k, v in delta.config.items() if k != "quantization_config"})
            own = (
                tokenizer_of(beside, delta.path)
                if any((beside / name).is_file() for name in VOCABULARIES)
                else tokenizer
            )
            settings = beside / "generation_config.json"
            told = read_json(settings, "the generation config") if settings.is_file() else delta.config
        found[name] = Language.of(own, told.get("eos_token_id"))
    return found


def tokenizer_of(folder: Path, told: Path | None = None) -> object:
    """The tokenizer in a model folder; raises ArtifactError, which names `told`, if there is none that can be read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a damaged folder breaks transformers in many ways
        raise ArtifactError(
            f"{told or folder}: its tokenizer cannot be loaded: {str(error).splitlines()[0][:200]}"
        ) from error
