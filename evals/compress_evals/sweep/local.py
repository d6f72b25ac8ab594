"""The engine that runs cells on this machine, and what any engine is.

An engine starts a command and knows when it ended; which command, and what its end means, is the sweep's. Whoever runs
a cell holds a lock on its log for as long, so that the next sweep sees what a killed one has left running.
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
    """A command at work on a cell, wherever it runs."""

    @property
    def seconds(self) -> float:
        """Since it began; 0 while it waits for a place."""
        ...

    def poll(self) -> int | None:
        """The code it ended with, that of a signal negative; None while it works."""
        ...

    def kill(self) -> None:
        """End it and all that it started, and return when that is so."""
        ...


Start = Callable[[Sequence[str], Path], Process]  # a command, and the log for all that it says


class LocalProcess:
    """A child of this process, in a session of its own; it sees on its stdin when this process is gone."""

    def __init__(self, command: Sequence[str], log: Path, env: dict[str, str]) -> None:
        with log.open("wb") as said:
            fcntl.flock(said, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self.child = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=said, stderr=subprocess.STDOUT, env=env, start_new_session=True
            )
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        """Since it began."""
        return time.monotonic() - self.began

    def poll(self) -> int | None:
        """The code it ended with."""
        return self.child.poll()

    def kill(self) -> None:
        """End it and all that it started."""
        with suppress(ProcessLookupError, PermissionError):  # it has ended, and its number is another's
            os.killpg(self.child.pid, signal.SIGKILL)
        self.child.wait()
        if self.child.stdin:
            self.child.stdin.close()


@contextmanager
def local(jobs: int) -> Iterator[Start]:
    """Processes of this machine, each with its share of the cores, unless the user has said how many threads."""
    env = {"OMP_NUM_THREADS": str(max(1, cores() // jobs)), "TOKENIZERS_PARALLELISM": "false", **os.environ}
    yield lambda command, log: LocalProcess(command, log, env)


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
