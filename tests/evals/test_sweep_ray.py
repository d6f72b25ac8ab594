"""The engine that runs the cells of a sweep on Ray writes the same records and files as the local engine."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from compress.errors import RecipeError
from compress_evals.sweep import Progress, Sweep, load, plan, ray, run, running

# writes a result; says it fails at 0.9, is killed at 0.7, and at 0.8 works until its stdin closes
STUB = """
import json, os, sys
from pathlib import Path
work = Path(sys.argv[1])
told = json.loads((work / "job.json").read_text())
[sparsity] = [step["magnitude"]["sparsity"] for step in told["recipe"]["passes"]]
print(told["id"], os.environ["OMP_NUM_THREADS"], os.environ["TOKENIZERS_PARALLELISM"], os.getcwd(), flush=True)
if sparsity == 0.9:
    (work / "error.txt").write_text("it went wrong")
    sys.exit(1)
if sparsity == 0.7:
    os.kill(os.getpid(), 9)
if sparsity == 0.8:
    (work.parent / "pid").write_text(str(os.getpid()))
    os.read(0, 1)
    os.kill(0, 9)
for name in ("dense", told["id"]):
    (work / "results" / name).mkdir(parents=True)
    (work / "results" / name / "results.json").write_text("{}")
"""


# in a process of its own, because Ray leaves to the end of one what a test here may not
DRIVER = "import sys; sys.path.insert(0, sys.argv[1]); import test_sweep_ray as test; test.interrupted(*sys.argv[2:])"


def interrupted(file: str, out: str, engine: str) -> None:
    """Run a sweep, and interrupt it once its last cell is at work."""

    def interrupt(progress: Progress) -> None:
        if progress.done + progress.failed == 3 and (Path(out) / "cells/m-sparsity=0.8/pid").is_file():
            raise KeyboardInterrupt

    running.command = lambda work: [sys.executable, "-c", STUB, str(work)]
    run(load(file), out, jobs=2, engine=engine, on_progress=interrupt)


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    (tmp_path / "s.yaml").write_text(
        "cells:\n- {name: m, recipe: magnitude-50, set: {passes.0.sparsity: [0.1, 0.9, 0.7, 0.8]}}"
    )
    return load(tmp_path / "s.yaml")


def left(out: Path) -> dict[str, Any]:
    """What is in the folder of an interrupted sweep, without what takes time; the last cell's process has ended."""
    files = {path.relative_to(out).as_posix(): path.read_text() for path in out.rglob("*") if path.is_file()}
    files.pop("lock")
    pid = int(files.pop("cells/m-sparsity=0.8/pid"))
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    records = {name: json.loads(files[name]) for name in files if name.endswith("cell.json")}
    return {**files, **{name: {**record, "seconds": 0} for name, record in records.items()}}


@pytest.mark.slow
def test_ray_leaves_what_the_local_engine_leaves_also_when_cells_fail_or_it_is_interrupted(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("ray")
    file, local, out = (str(tmp_path / name) for name in ("s.yaml", "local", "ray"))
    monkeypatch.setattr(running, "command", running.command)  # what it sets is undone
    with pytest.raises(KeyboardInterrupt):
        interrupted(file, local, "local")
    command = [sys.executable, "-c", DRIVER, str(Path(__file__).parent), file, out, "ray"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr.splitlines()[-1]) == (-signal.SIGINT, "", "KeyboardInterrupt")
    assert "Ray" not in done.stderr and "raylet" not in done.stderr
    here = left(tmp_path / "local")
    assert left(tmp_path / "ray") == here
    assert {name: said["error"] for name, said in here.items() if name.endswith("cell.json")} == {
        "cells/m-sparsity=0.1/cell.json": None,
        "cells/m-sparsity=0.9/cell.json": "it went wrong",
        "cells/m-sparsity=0.7/cell.json": "killed by SIGKILL; out of memory?",
    }
    assert [p.state for p in plan(sweep, tmp_path / "ray")] == ["done", "failed", "failed", "new"]


def test_what_ray_cannot_do_is_refused_before_anything_is_written(
    sweep: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(match: str, **engine: Any) -> None:
        with pytest.raises(RecipeError, match=match):
            run(sweep, tmp_path / "o", **engine)

    refused("'rat' is not one of local, ray", engine="rat")
    refused("is only valid with --engine ray", address="head:6379")
    monkeypatch.setattr(ray, "find_spec", lambda name: None)
    refused(r"needs ray: pip install 'compress-llm\[ray\]'", engine="ray")
    monkeypatch.setattr(ray, "find_spec", lambda name: sys.modules["json"].__spec__)
    refused("Ray chooses the GPU", engine="ray", device="cuda:1")
    refused("is not a HOST:PORT", engine="ray", address="ray://head:10001")
    refused("nothing answers at 127.0.0.1:1: ", engine="ray", address="127.0.0.1:1")
    refused("nothing answers at head..local:6379: ", engine="ray", address="head..local:6379")
    refused("is not a HOST:PORT", engine="ray", address="head:99999")
    assert not (tmp_path / "o").exists()


def test_a_port_that_is_not_rays_is_refused_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(ray, "PATIENCE", 0.2)
    began = time.monotonic()
    with socket.create_server(("127.0.0.1", 0)) as server, pytest.raises(RecipeError, match="no Ray cluster answers"):
        ray.ask(f"127.0.0.1:{server.getsockname()[1]}")
    assert time.monotonic() - began < 10


@pytest.mark.parametrize(
    ("nodes", "jobs", "threads"),
    [([8], 1, 8), ([8], 3, 2), ([2], 5, 1), ([8, 8, 8, 8], 1, 8), ([8, 8, 8, 8], 5, 4), ([8, 4], 3, 4), ([0], 1, 1)],
)
def test_cells_ask_for_as_many_threads_as_leave_room_for_all(
    nodes: list[int], jobs: int, threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert ray.share(nodes, jobs) == threads
    monkeypatch.setenv("OMP_NUM_THREADS", "6")
    assert ray.share(nodes, jobs) == min(6, max(1, *nodes, 1))
