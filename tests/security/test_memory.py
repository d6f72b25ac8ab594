"""A run that runs out of memory ends with one line and exit code 3, keeps finished blocks, and names a remedy."""

from __future__ import annotations

import os
import resource
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from compress.model.travellers import Travellers

pytestmark = pytest.mark.usefixtures("frozen")
SAID = "error: out of memory: "
SOME = 48 << 20  # bytes; the calibration windows of the built-in model alone take more


@pytest.mark.slow
@pytest.mark.parametrize(
    ("error", "after"),
    [
        (MemoryError("on purpose"), 0),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"), 0),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), 0),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory: you tried"), 9),
    ],
    ids=["Python", "torch", "a GPU", "torch after a block"],
)
def test_a_forward_that_runs_out_of_memory(
    error: Exception, after: int, tiny_llama: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = Travellers.through, []

    def through(self: Travellers, *given: Any, **options: Any) -> Any:
        calls.append(self)
        if len(calls) > after:
            raise error
        return real(self, *given, **options)

    monkeypatch.setattr(Travellers, "through", through)
    sized = ["--set", "calibration.samples=4", "--set", "calibration.length=32", "--set", "passes.1.group=8"]
    code, printed, said = cli("run", "wanda-2of4-gptq-int4", "--model", tiny_llama, "--out", tmp_path / "o", *sized)
    assert (code, printed) == (3, "")
    assert said.splitlines()[-1].startswith(SAID) and said.splitlines()[-1].endswith("fewer or shorter samples help")
    assert [path.name for path in tmp_path.iterdir()] == (["o.partial"] if after else [])  # a block was finished


@pytest.mark.slow
def test_a_real_limit_of_memory(tmp_path: Path, llama_artifact: Path, cli: Any) -> None:
    """`llama_artifact` has loaded all modules: the limit is met by tensors."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * os.sysconf("SC_PAGESIZE")
    resource.setrlimit(resource.RLIMIT_AS, (held + SOME, hard))
    try:
        many = ["--set", "calibration.samples=512", "--set", "calibration.length=256"]
        code, _, said = cli("run", "wanda-2of4-gptq-int4", "--model", "builtin", "--out", tmp_path / "o", *many)
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert code == 3 and said.splitlines()[-1].startswith(SAID) and "Traceback" not in said
    assert list(tmp_path.iterdir()) == []


def test_a_model_that_does_not_fit_is_not_called_damaged(
    llama_artifact: Path, tiny_llama: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any, **__: Any) -> None:
        raise RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr("compress.model.architecture.auto_class", lambda _: SimpleNamespace(from_pretrained=full))
    code, _, said = cli("bench", llama_artifact, "--generate", "--base", tiny_llama)
    assert (code, said.splitlines()[-1]) == (3, f"{SAID}CUDA out of memory. Tried to allocate 2.00 GiB")
