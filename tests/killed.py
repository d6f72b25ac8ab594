"""Runs of `compress.run` in processes of their own, killed at a given step or after a given time, or told that the
disk is full.

A command that reads one JSON object a line and answers each with one: it imports everything once, then forks. A step
is a moment at which the state of the disk changes: a file is opened for writing, a piece of a shard is written, a
file is flushed, renamed or removed. The process kills itself right before it, as a power cut would, or is refused it.
"""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

REMOVALS = ("os.remove", "os.rmdir")
CHANGES = ("os.mkdir", "os.rename", *REMOVALS)


class Steps:
    """Counts the steps of this process in a folder; ends it right before step `last`, or refuses all from `full` on."""

    def __init__(self, folder: str, last: int = 0, full: int = 0) -> None:
        self.folder, self.last, self.full, self.count = folder, last, full, 0

    def step(self, removal: bool = False) -> None:
        self.count += 1
        if self.count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        if 0 < self.full <= self.count and not removal:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def audit(self, event: str, arguments: tuple[Any, ...]) -> None:
        writing = event == "open" and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if (event in CHANGES or writing) and str(arguments[0]).startswith(self.folder):
            self.step(event in REMOVALS)

    def watch(self) -> None:
        from compress import shards

        fsync, pieces = os.fsync, shards.pieces

        def flushed(handle: int) -> None:
            self.step()
            fsync(handle)

        def written(entries: Any) -> Iterator[Any]:
            for piece in pieces(entries):
                self.step()
                yield piece

        os.fsync, shards.pieces = flushed, written
        sys.addaudithook(self.audit)


def run(order: dict[str, Any]) -> int:
    """One run in this process; the steps it took."""
    import compress

    steps = Steps(str(Path(order["out"]).parent), order.get("last", 0), order.get("full", 0))
    steps.watch()
    compress.run(order["model"], order["recipe"], order["out"], **order.get("options", {}))
    return steps.count


def apart(order: dict[str, Any]) -> dict[str, Any]:
    """One run in a child; whether it was killed, and the steps if it was not."""
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            os.write(writing, str(run(order)).encode())
            os._exit(0)
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
            os._exit(1)
    os.close(writing)
    if "after" in order:
        time.sleep(order["after"])
        os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    said = os.read(reading, 10_000).decode()
    os.close(reading)
    return {"code": os.waitstatus_to_exitcode(status), "said": said}


def main() -> None:
    """Answer orders until there are no more; the first is run here, so that children find everything imported."""
    import compress

    first = json.loads(sys.stdin.readline())
    began = time.monotonic()
    compress.run(first["model"], first["recipe"], first["out"], **first.get("options", {}))
    print(json.dumps({"code": 0, "seconds": time.monotonic() - began}), flush=True)
    for line in sys.stdin:
        print(json.dumps(apart(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
