"""The server as a process: deltas from folders, real connections, disconnecting clients, and a clean shutdown."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file, save_file

import compress
from compress import Calibration, Delta, Magnitude, Recipe, RecipeError
from compress.commands.serve import deltas_of, url_of
from compress.errors import ArtifactError
from compress.kv import KV
from compress.serving import process as process_
from compress.serving.app import Limits, Server
from compress.serving.errors import Refusal
from compress.serving.languages import own_languages, tokenizer_of
from compress.serving.requests import Chat
from compress.tenants import load_tenants
from compress_evals import folders as folders_

START = "import typer; from compress.commands.serve import serve; typer.run(serve)"
FEW = Calibration(samples=2, length=16)
# one client, because each reads all certificates of the system; its connections are not used again
HTTP = httpx.Client(verify=False, limits=httpx.Limits(max_connections=None, max_keepalive_connections=0))


@pytest.fixture(scope="module")
def folders(tiny_llama: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Deltas of two fine-tunes, and the whole fine-tunes under the same names with `-whole`."""
    from transformers import AutoModelForCausalLM

    out = tmp_path_factory.mktemp("deltas")
    found = {}
    for seed, name in enumerate("ab"):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama, local_files_only=True, dtype="auto")
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)
        model.save_pretrained(out / f"{name}-tuned")
        recipe = Recipe(passes=(Magnitude(sparsity=0.5),), calibration=FEW, delta=Delta(base=str(tiny_llama)))
        found[name] = compress.run(out / f"{name}-tuned", recipe, out / name).out
        found[f"{name}-whole"] = out / f"{name}-tuned"
    return found


@pytest.mark.slow
def test_folders_answer_as_the_models_they_denote(tiny_llama: Path, folders: dict[str, Path]) -> None:
    tenants = load_tenants(tiny_llama, {name: folders[name] for name in "ab"})
    ids = torch.tensor([[5, 9, 31, 7]] * 3)
    got = tenants(ids, ["b", None, "a"]).logits
    tenants.drop("a")
    tenants.add("a", folders["a"])
    assert torch.equal(tenants(ids, ["b", None, "a"]).logits, got)
    models = [compress.load(folders["b"], base=tiny_llama), compress.load(tiny_llama)]
    models.append(compress.load(folders["a"], base=tiny_llama))
    for row, model in enumerate(models):
        with torch.inference_mode():
            want = model(input_ids=ids[:1]).logits[0]
        assert float((got[row] - want).norm() / want.norm()) < 1e-5


def bare(folder: Path) -> Path:
    """The same model in files whose tensor names lack the model's prefix, as those of GPT-2 on the hub do."""
    held = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("transformer."): tensor for name, tensor in held.items()},
              folder / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    return folder


def test_deltas_of_files_whose_names_lack_the_models_prefix(
    model_folder: Callable[..., Path], hugging_face: Callable[[Path], Any], tmp_path: Path
) -> None:
    base, tuned = (bare(shutil.copytree(model_folder("gpt2"), tmp_path / name)) for name in ("base", "tuned"))
    held = load_file(tuned / "model.safetensors")
    torch.manual_seed(0)
    save_file({name: tensor + 0.05 * torch.randn_like(tensor) for name, tensor in held.items()},
              tuned / "model.safetensors", metadata={"format": "pt"})  # fmt: skip
    recipe = Recipe(passes=(Magnitude(sparsity=0.5),), calibration=FEW, delta=Delta(base=str(base)))
    out = compress.run(tuned, recipe, tmp_path / "out").out
    ids, want = torch.tensor([[5, 9, 31, 7]] * 2), compress.load(out, base=base)
    with torch.inference_mode():
        got = load_tenants(base, {"a": out})(ids, ["a", None]).logits
        wanted = [model(input_ids=ids).logits[0] for model in (want, hugging_face(base))]
    for row, meant in zip(got, wanted, strict=True):
        assert float((row - meant).norm() / meant.norm()) < 1e-5


def test_a_base_under_other_names_than_its_fine_tune_is_told_what_to_do(
    model_folder: Callable[..., Path], tmp_path: Path
) -> None:
    base = bare(shutil.copytree(model_folder("gpt2"), tmp_path / "base"))
    recipe = Recipe(passes=(Magnitude(sparsity=0.5),), calibration=FEW, delta=Delta(base=str(base)))
    with pytest.raises(ArtifactError, match=r"has 'h\.0\.attn.*: load it with transformers and save it again"):
        compress.run(model_folder("gpt2"), recipe, tmp_path / "out")


def test_another_base_is_refused(folders: dict[str, Path], tiny_llama: Path) -> None:
    with pytest.raises(ArtifactError, match="not the base"):
        load_tenants(folders["a-whole"], {"a": folders["a"]})
    with pytest.raises(ArtifactError, match="not a Compress artifact"):
        load_tenants(tiny_llama, {"a": folders["a-whole"]})


def test_a_fine_tune_is_spoken_to_in_its_own_language(
    tiny_llama: Path, folders: dict[str, Path], tmp_path: Path
) -> None:
    """Its template, and the token that ends its answers, are not its base's; one without such files has the base's."""
    tuned = shutil.copytree(folders["a-whole"], tmp_path / "tuned")
    tokenizer = tokenizer_of(tiny_llama)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}{% endfor %}"  # type: ignore[attr-defined]
    tokenizer.save_pretrained(tuned)  # type: ignore[attr-defined]
    (tuned / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 9]}))
    recipe = Recipe(passes=(Magnitude(sparsity=0.5),), calibration=FEW, delta=Delta(base=str(tiny_llama)))
    named = {"a": compress.run(tuned, recipe, tmp_path / "out").out, "b": folders["b"]}
    tenants, base = load_tenants(tiny_llama, named), tokenizer_of(tiny_llama)
    server = Server(tenants, base, "tiny", Limits(), own_languages(tiny_llama, named, base))
    said = {"model": "a", "messages": [{"role": "user", "content": "x"}]}
    assert server.tokens(Chat.model_validate(said))
    assert {7, 9} <= server.language_of("a").ends and not {7, 9} & server.language_of("b").ends
    with pytest.raises(Refusal, match="tokenizer of b has no chat template"):
        server.tokens(Chat.model_validate({**said, "model": "b"}))


def test_a_vocabulary_of_any_name_is_a_fine_tunes_own(
    tiny_llama: Path, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, read = shutil.copytree(folders["a-whole"], tmp_path / "tuned"), tokenizer_of(tiny_llama)
    for file in tuned.glob("tokenizer*"):
        file.unlink()
    (tuned / "spiece.model").write_bytes(b"pieces")
    monkeypatch.setattr("compress.plan.tokenizer_of", lambda folder: None)
    recipe = Recipe(passes=(Magnitude(sparsity=0.5),), delta=Delta(base=str(tiny_llama)))
    out = compress.run(tuned, recipe, tmp_path / "out").out
    monkeypatch.setattr("compress.serving.languages.tokenizer_of", lambda folder, told: read)
    assert own_languages(tiny_llama, {"a": out}, object())["a"].tokenizer is read


@pytest.mark.parametrize("kv", [None, KV(bits=4, group=12, residual=24)])
def test_a_smaller_cache_that_is_not_used_is_said(
    kv: Any, cli: Callable[..., tuple[int, str, str]], tiny_llama: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    out = compress.run(tiny_llama, Recipe(passes=(Magnitude(sparsity=0.5),), kv=kv), tmp_path / "out").out
    monkeypatch.setattr(process_, "serve_forever", lambda *_: None)
    code, said, err = cli("serve", out, "--port", free_port())
    assert (code, said) == (0, "") and ("key-value cache of this model is not used" in err) == bool(kv)


def test_a_tokenizer_that_fails_without_a_word_is_refused(tiny_llama: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def silent(*_: Any, **__: Any) -> Any:
        raise ValueError

    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", silent)
    for read in (tokenizer_of, folders_.tokenizer_of):
        with pytest.raises(ArtifactError, match="its tokenizer cannot be loaded: ValueError"):
            read(tiny_llama)


def test_names_on_the_command_line() -> None:
    assert deltas_of(["a.b-c_1=x=y"]) == {"a.b-c_1": Path("x=y")}
    for wrong in ("a", "=x", "a=", "a/b=x", "é=x", f"{'a' * 65}=x", "a\n=x"):
        with pytest.raises(RecipeError, match="name=FOLDER"):
            deltas_of([wrong])
    with pytest.raises(RecipeError, match="twice"):
        deltas_of(["a=x", "a=y"])


def test_an_address_of_ipv6_is_said_as_clients_take_it() -> None:
    assert [url_of(host, 8000) for host in ("::1", "localhost")] == ["http://[::1]:8000", "http://localhost:8000"]


@pytest.mark.parametrize("key", ["", " ", "k\n", " k", "schlüssel"])
def test_a_key_that_no_client_can_send_is_refused(key: str, cli: Callable[..., tuple[int, str, str]]) -> None:
    """Such as one read from a file with its last line break: a server with it refuses everybody."""
    code, _, err = cli("serve", "builtin", "--api-key", key)
    assert code == 2 and err.startswith("error: --api-key: must be printable ASCII") and err.count("\n") == 1


def test_a_port_in_use_is_told_before_anything_is_loaded(
    tiny_llama: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.tenants.load_tenants", lambda *_, **__: pytest.fail("loaded"))
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert cli("serve", tiny_llama, "--port", port) == (2, "", f"error: --port: {port} is in use\n")
    code, out, err = cli("serve", tiny_llama, "--host", "256.1.1.1")
    assert (code, out, err.count("\n")) == (2, "", 1) and "--host: '256.1.1.1' is not an address" in err


def test_the_base_is_loaded_where_the_user_says(
    tiny_llama: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    def loaded(*_: Any, **options: Any) -> None:
        raise RecipeError(f"loaded with {options}")

    monkeypatch.setattr("compress.tenants.load_tenants", loaded)
    monkeypatch.setattr("compress.plan.usable", torch.device)
    for device, options in (("cpu", {}), ("cuda:1", {"device_map": "cuda:1"})):
        found = cli("serve", tiny_llama, "--port", free_port(), "--device", device)
        assert found == (2, "", f"error: loaded with {options}\n")


def test_a_device_that_is_not_there_is_told_before_anything_is_loaded(
    tiny_llama: Path, cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("compress.tenants.load_tenants", lambda *_, **__: pytest.fail("loaded"))
    for device in ("gpu", "cuda:999"):
        code, out, err = cli("serve", tiny_llama, "--port", free_port(), "--device", device)
        assert (code, out, err.count("\n")) == (2, "", 1) and err.startswith(f"error: --device: {device!r} is ")


def test_it_is_said_to_serve_once_it_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process_, "make_app", lambda server: server)
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    monkeypatch.setattr(process_.uvicorn.Server, "run", lambda *_: None)
    said: list[None] = []
    with process_.bound("127.0.0.1", 0) as listeners, process_.bound(*listeners[0].getsockname()) as late:
        address = listeners[0].getsockname()
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(address)
        server: Any = None
        process_.serve_forever(server, listeners, 1, lambda: said.append(socket.create_connection(address).close()))
        with pytest.raises(RecipeError, match="is in use"):  # neither listened when they were bound
            process_.serve_forever(server, late, 1, lambda: pytest.fail("said"))
    assert said == [None]


def free_port() -> int:
    """A port that nobody has now."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        return int(probe.getsockname()[1])


def test_a_name_is_served_at_all_of_its_addresses(monkeypatch: pytest.MonkeyPatch) -> None:
    """But for those that this machine has not, as ::1 in many containers; if it has none, that is said."""
    stream = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
    told = ["127.0.0.1", "192.0.2.1", "127.0.0.2", "127.0.0.1"]  # the second is nobody's, RFC 5737
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(*stream, (host, 0)) for host in told])
    with process_.bound("name", 0) as listeners:
        assert [one.getsockname()[0] for one in listeners] == ["127.0.0.1", "127.0.0.2"]
    told[:] = ["192.0.2.1"]
    with (
        pytest.raises(RecipeError, match="--host: 'name' is not an address of this machine: "),
        process_.bound("name", 0),
    ):
        pytest.fail("bound")


# -- a real process ---------------------------------------------------------------------------------------


@pytest.fixture
def process(tiny_llama: Path, folders: dict[str, Path]) -> Iterator[Callable[..., tuple[subprocess.Popen[bytes], str]]]:
    """`process(*options)`: a running server and its address."""
    started: list[subprocess.Popen[bytes]] = []

    def start(*options: str) -> tuple[subprocess.Popen[bytes], str]:
        port = free_port()
        deltas = [option for name in "ab" for option in ("--delta", f"{name}={folders[name]}")]
        command = [sys.executable, "-c", START, str(tiny_llama), *deltas, "--port", str(port), *options]
        started.append(subprocess.Popen(command, stderr=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}))
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            try:
                if HTTP.get(f"{address}/health", timeout=1).status_code == 200:
                    return started[-1], address
            except httpx.TransportError:
                time.sleep(0.05)
        raise TimeoutError("the server did not come up")

    yield start
    for one in started:
        one.kill()
        one.wait()


def asked(model: str, **more: object) -> dict[str, object]:
    return {"model": model, "prompt": [5, 6, 7], "temperature": 0, "max_tokens": 100, **more}


def count(address: str, gauge: str) -> float:
    """The value of `compress_running` or `compress_waiting`."""
    text = HTTP.get(f"{address}/metrics").text
    return float(next(line.split()[1] for line in text.splitlines() if line.startswith(f"compress_{gauge} ")))


@pytest.mark.slow
def test_clients_go_away_lie_and_the_server_ends_what_runs(
    process: Callable[..., tuple[subprocess.Popen[bytes], str]],
) -> None:
    server, address = process("--max-body", "100KB")
    with HTTP.stream("POST", f"{address}/v1/completions", json=asked("a", stream=True)) as response:
        next(response.iter_lines())  # and goes away
    host, port = address.removeprefix("http://").split(":")
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
    body = json.dumps(asked("b")).encode()
    with socket.create_connection((host, int(port))) as gone:
        gone.sendall(f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body)
    with socket.create_connection((host, int(port)), timeout=20) as lying:
        lying.sendall(f"{head}Content-Length: 10000000\r\n\r\n".encode())
        assert b" 413 " in lying.recv(1000)
    with socket.create_connection((host, int(port)), timeout=20) as chunked:
        chunked.sendall(f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + b"1d4c0\r\n" + b"x" * 120_000)
        assert b" 413 " in chunked.recv(1000)
    until = time.monotonic() + 20
    while count(address, "running") and time.monotonic() < until:
        time.sleep(0.02)
    assert count(address, "running") == 0
    with HTTP.stream("POST", f"{address}/v1/completions", json=asked("a", stream=True), timeout=20) as response:
        lines = response.iter_lines()
        next(lines)
        server.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
    assert server.wait(20) == 0
    with pytest.raises(httpx.TransportError):
        HTTP.get(f"{address}/health", timeout=1)


@pytest.mark.slow
def test_an_interrupt_with_nothing_to_do_ends_at_once(
    process: Callable[..., tuple[subprocess.Popen[bytes], str]],
) -> None:
    server, address = process("--api-key", "k")
    assert HTTP.get(f"{address}/v1/models").status_code == 401
    assert HTTP.get(f"{address}/v1/models", headers={"Authorization": "Bearer k"}).status_code == 200
    server.send_signal(signal.SIGINT)
    assert server.wait(20) == 0


@pytest.mark.slow
def test_clients_hear_of_what_is_not_done_at_the_deadline(
    process: Callable[..., tuple[subprocess.Popen[bytes], str]],
) -> None:
    """uvicorn would cut their connections."""
    server, address = process("--max-batch", "1", "--deadline", "1")
    with ThreadPoolExecutor(64) as pool:
        found = [pool.submit(HTTP.post, f"{address}/v1/completions", json=asked("a"), timeout=60) for _ in range(64)]
        while sum(one.done() for one in found) + sum(count(address, it) for it in ("running", "waiting")) < len(found):
            time.sleep(0.01)  # a connection that was not accepted by then would be reset
        server.send_signal(signal.SIGTERM)
        answers = [one.result() for one in found]
    late = [answer.json()["error"]["message"] for answer in answers if answer.status_code != 200]
    assert late and set(late) == {"the server is shutting down"}
    assert server.wait(20) == 0
