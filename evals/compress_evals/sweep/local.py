"""The engine that runs cells on this machine, and the protocol of all engines.

An engine starts a command and reports when it has ended; the sweep decides which command to run and what its exit code
means. The process that runs a cell holds a lock on its log meanwhile, so that the next sweep notices cells that a
killed sweep has left running.
"""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol


class Process(Protocol):
    """A running command of a cell, on any engine."""

    @property
    def seconds(self) -> float:
        """Seconds since it began; 0 while it waits to be scheduled."""
        ...

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it is running."""
        ...

    def kill(self) -> None:
        """Kill it and everything that it started, and return when they have ended."""
        ...


Start = Callable[[Sequence[str], Path], Process]  # takes a command, and the log for its output


class LocalProcess:
    """A child process in a session of its own; its stdin is closed when this process ends."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str]) -> None:
        with log.open("wb") as said:
            fcntl.flock(said, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Seconds since it began."""
        return time.monotonic() - self.began

    def poll(self) -> int | None:
        """Its exit code; None while it is running."""
        return self.child.poll()

    def kill(self) -> None:
        """Kill it and everything that it started, and wait for it."""
        with suppress(ProcessLookupError, PermissionError):  # it has ended, and its process id may be reused
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        if self.child.stdin:
            self.child.stdin.close()


@contextmanager
def local(jobs: int) -> Iterator[Start]:
    """Start processes on this machine, each with an equal share of the cores unless OMP_NUM_THREADS is set."""
    env = {"OMP_NUM_THREADS": str(max(1, cores() // jobs)), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    yield lambda command, log: LocalProcess(command, log, env)


def cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
