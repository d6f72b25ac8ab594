"""Fixtures that bound the cost of hostile input and check how it is refused."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from compress import CompressError

MEMORY = 1 << 30  # bytes of address space that an attempt may use in addition to those of this process
SECONDS = 60  # of CPU time, because a machine may be busy
Json = dict[str, Any]
Edit = Callable[[Json], object]


def late(*_: Any) -> None:
    raise TimeoutError(f"an attempt took {SECONDS} seconds")


@contextmanager
def bounds() -> Iterator[None]:
    """Within this context, an allocation above MEMORY fails, and so does anything above SECONDS of CPU time."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    before = signal.signal(signal.SIGPROF, late)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGESIZE") + MEMORY, hard))
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


@pytest.fixture
def bounded() -> Any:
    """`with bounded():` an allocation above MEMORY fails, and so does anything that takes longer than SECONDS."""
    return bounds


@pytest.fixture
def refuse(tmp_path: Path, tally: Any) -> Callable[..., str]:
    """`refuse(attempt)`: the message, which must be one visible line of a CompressError; no new file may be left."""

    def check(attempt: Callable[[], object], kind: str, what: str) -> str:
        before = sorted(tmp_path.rglob("*"))
        with tally(kind, what):
            with bounds(), pytest.raises(CompressError) as caught:
                attempt()
            message = str(caught.value)
            assert message and message.isprintable() and len(message) <= 2000
            assert sorted(tmp_path.rglob("*")) == before
        return message

    return check


@pytest.fixture
def canary(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A file that hostile code would create; it must not exist at the end."""
    path = tmp_path_factory.mktemp("canary") / "sang"
    yield path
    assert not path.exists(), "code of a hostile file was run"


@pytest.fixture
def single(tiny_llama: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_llama, tmp_path / "model"))


@pytest.fixture
def sharded(model_folder: Any, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder("llama", sharded=True), tmp_path / "model"))


@pytest.fixture
def edit_json() -> Callable[[Path, Edit], None]:
    def change(path: Path, edit: Edit) -> None:
        content = json.loads(path.read_text())
        edit(content)
        path.write_text(json.dumps(content))

    return change


@pytest.fixture
def sign() -> Callable[[Path], None]:
    """Rewrite the recorded hashes to match the artifact's current files, as an attacker would."""
    from compress.artifact import seal

    def write(folder: Path) -> None:
        told = json.loads((folder / "compress.json").read_text())
        told["files"] = {name: hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in told["files"]}
        told["sha256"] = seal(told)
        (folder / "compress.json").write_text(json.dumps(told))

    return write


@pytest.fixture
def quick() -> Callable[[], float]:
    """Seconds since the test began."""
    began = time.monotonic()
    return lambda: time.monotonic() - began
