"""The engine that runs cells on Ray: on a cluster of its own on this machine, or on an existing one at an address.

A Ray task runs the same command as the local engine, in a child process; it receives only strings and numbers, and
returns the exit code. An existing cluster must have the sweep's folder, Python and this package at the same paths.
Ray unpickles what reaches its ports, so a cluster must be trusted; the engine's own cluster requires a token.
"""

from __future__ import annotations

import fcntl
import os
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from compress.errors import RecipeError, first_line
from compress_evals.sweep.local import Start, cores
from compress_evals.sweep.records import busy

PATIENCE = 30.0  # seconds for a cluster to answer, and for a cell to end after it was cancelled
STORE = 100 << 20  # bytes of the object store: only short strings are sent, but Ray requires at least 75 MiB
QUIET = {"log_to_driver": False, "logging_level": "ERROR"}
PROBE = "import sys, ray; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='ERROR')"


class RayProcess:
    """A Ray task that runs a cell."""

    def __init__(self, ray: Any, task: Any, log: Path) -> None:
        self.ray, self.task, self.log = ray, task, log
        self.began: float | None = None
        self.code: int | None = None

    @property
    def seconds(self) -> float:
        """Seconds since it was first seen running, which is when its log exists; 0 before."""
        return 0.0 if self.began is None else time.monotonic() - self.began

    def poll(self) -> int | None:
        """The exit code of the command, that of SIGKILL if its worker is lost; None while it is running."""
        if self.began is None and self.log.exists():
            self.began = time.monotonic()
        if self.code is None and self.ray.wait([self.task], timeout=0)[0]:
            self.code = self.result()
        return self.code

    def result(self) -> int:
        """The exit code that the task returned; 1 if it could not run the command, with the reason in the log."""
        try:
            return int(self.ray.get(self.task))
        except self.ray.exceptions.RayTaskError as error:
            with suppress(OSError):
                self.log.write_text(str(error), encoding="utf-8")
            return 1
        except self.ray.exceptions.RayError:
            return -signal.SIGKILL

    def kill(self) -> None:
        """Cancel the task, then wait until the command, which ends with its worker, has released its log."""
        if self.poll() is None:
            self.ray.cancel(self.task, force=True)
            self.ray.wait([self.task], timeout=PATIENCE)
        until = time.monotonic() + PATIENCE
        while busy(self.log) and time.monotonic() < until:
            time.sleep(0.05)


def cluster(jobs: int, device: str, address: str | None) -> AbstractContextManager[Start]:
    """A context that starts tasks on the cluster at an address, or on a new local one.

    The cluster is checked now and joined when the context is entered. Raises RecipeError if Ray is not installed, if
    there is no such cluster, or if the device cannot be requested from Ray.
    """
    spec = find_spec("ray")
    if spec is None or spec.origin is None:  # a folder named `ray` is not the package
        raise RecipeError("--engine ray needs ray: pip install 'compress-llm[ray]'")
    if device not in ("cpu", "cuda"):
        raise RecipeError(f"--device {device}: Ray chooses the GPU of each cell; give cpu or cuda")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    if address is not None:
        ask(address)
    return joined(jobs, device == "cuda", address)


def ask(address: str) -> None:
    """Raise RecipeError unless a cluster answers; this runs in a subprocess, because Ray itself waits for minutes."""
    found = re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\]):(\d{1,5})", address)
    if found is None or int(found[2]) >= 1 << 16:
        raise RecipeError(f"--address: {address!r} is not a HOST:PORT as printed by `ray start --head`")
    try:
        socket.create_connection((found[1].strip("[]"), int(found[2])), timeout=PATIENCE).close()
        probe = [sys.executable, "-c", PROBE, address]
        done = subprocess.run(probe, capture_output=True, text=True, errors="replace", timeout=PATIENCE)
    except (OSError, OverflowError, UnicodeError) as error:  # UnicodeError: not a valid host name
        raise RecipeError(f"--address: nothing answers at {address}: {error}") from error
    except subprocess.TimeoutExpired as error:
        raise RecipeError(f"--address: no Ray cluster answers at {address} within {PATIENCE:.0f} s") from error
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise RecipeError(f"--address: the cluster at {address} refuses the connection: {said[-1]}")


@contextmanager
def joined(jobs: int, gpu: bool, address: str | None) -> Iterator[Start]:
    """Start tasks on a cluster until the context is left, which also ends a local cluster."""
    if address is None:  # before Ray is imported, because it reads them only once
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))
    import ray

    try:
        if address is None:
            room = jobs * share([cores()], jobs)
            ray.init("local", num_cpus=room, include_dashboard=False, object_store_memory=STORE, **QUIET)
        else:
            ray.init(address, **QUIET)
    except (OSError, RuntimeError, ValueError) as error:
        raise RecipeError(f"--engine ray: {first_line(error)}") from error
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        if gpu and not any(node.get("GPU", 0) >= 1 for node in nodes):
            raise RecipeError("--device cuda: no machine of the Ray cluster has a GPU")
        threads = share([int(node.get("CPU", 0)) for node in nodes], jobs)
        remote = ray.remote(num_cpus=threads, num_gpus=int(gpu), max_retries=0)(task())

        def start(command: Sequence[str], log: Path) -> RayProcess:
            log.unlink(missing_ok=True)  # the task creates it when it begins
            sent = remote.remote(list(command), str(log.absolute()), os.getcwd(), threads)
            return RayProcess(ray, sent, log)

        yield start
    finally:
        ray.shutdown()


def share(nodes: Sequence[int], jobs: int) -> int:
    """The threads of a cell: OMP_NUM_THREADS if set, else the most with which all jobs fit on nodes of these cores."""
    most = max([1, *nodes])
    said = os.environ.get("OMP_NUM_THREADS", "")
    if said.isdecimal():
        return min(max(1, int(said)), most)
    return max([1, *(n for n in range(1, most + 1) if sum(cores // n for cores in nodes) >= jobs)])


def task() -> Callable[[list[str], str, str, int], int]:
    """The function that a Ray worker runs; it is nested, so that Ray sends it by value and no worker imports torch."""

    def work(command: list[str], log: str, folder: str, threads: int) -> int:
        env = {"TOKENIZERS_PARALLELISM": "false", **os.environ, "OMP_NUM_THREADS": str(threads)}
        with open(log, "wb") as said:
            fcntl.flock(said, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with subprocess.Popen(
                command, cwd=folder, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, env=env,
                start_new_session=True,
            ) as child:  # fmt: skip
                code = child.wait()
                with suppress(ProcessLookupError, PermissionError):
                    os.killpg(child.pid, signal.SIGKILL)  # kills what it has left running
        return code

    return work
