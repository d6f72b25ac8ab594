"""Runs and command lines in separate processes, which can be killed, interrupted or given a full disk.

This program reads one JSON object per line and answers each with one. It imports everything once and then forks, so
that a new process needs no imports. A step is an operation that changes the state of the disk: a file is opened for
writing, a piece of a shard is written, a file is flushed, renamed or removed. The process can kill itself right before
a step, as in a power cut, or the step can fail.
"""

from __future__ import annotations

import errno
import gc
import importlib
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

REMOVALS = ("os.remove", "os.rmdir")
CHANGES = ("os.mkdir", "os.rename", *REMOVALS)


class Steps:
    """Counts the steps of this process in a folder; kills it before step `last`, or raises ENOSPC from `full` on."""

    def __init__(self, folder: str, last: int = 0, full: int = 0) -> None:
        self.folder, self.last, self.full, self.count = folder, last, full, 0
        self.lock = threading.RLock()  # large states are written by several threads

    def step(self, removal: bool = False) -> None:
        with self.lock:
            self.count += 1
            count = self.count
        if count == self.last:
            os.kill(os.getpid(), signal.SIGKILL)
        if 0 < self.full <= count and not removal:
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
    """One run in this process; returns its number of steps. States of more than `part` bytes count as large.

    With `beside`, a block is recorded while the next one is computed, as happens with a GPU.
    """
    import torch

    import compress
    from compress import journal
    from compress.job import Job

    journal.PART = order.get("part", journal.PART)
    if order.get("beside"):
        Job.beside_what = lambda self: torch.device("cpu")  # type: ignore[method-assign]
    steps = Steps(str(Path(order["out"]).parent), order.get("last", 0), order.get("full", 0))
    steps.watch()
    compress.run(order["model"], order["recipe"], order["out"], **order.get("options", {}))
    return steps.count


def apart(order: dict[str, Any]) -> dict[str, Any]:
    """One run in a child process; returns its exit code and its number of steps or its error."""
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


def command(line: list[str], out: int, err: int) -> int:
    """Run a command line in this process, with its output going to these file descriptors; returns the exit code."""
    from compress.cli import main

    os.dup2(out, 1), os.dup2(err, 2)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    sys.argv = ["compress", *line]
    try:
        main()
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    return 1


def dying(place: str, last: int) -> None:
    """Kill this process right before the `last`-th rename from or to `place`."""
    count = 0

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal count
        if event == "os.rename" and place in map(str, arguments[:2]):
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(audit)


def commands(order: dict[str, Any]) -> list[dict[str, Any]]:
    """Run command lines concurrently, each in a child; the first gets `signals` once `count` files match `pattern`.

    With `renames`, each is killed right before its `renames`-th rename from or to `place`.
    """
    starting, start = os.pipe()
    with ExitStack() as opened:
        children = []
        for line in order["lines"]:
            files = [opened.enter_context(tempfile.TemporaryFile("w+")) for _ in ("out", "err")]
            child = os.fork()
            if not child:
                os.close(start)
                os.read(starting, 1)  # wait until all have been forked
                if "renames" in order:
                    dying(order["place"], order["renames"])
                code = command(line, files[0].fileno(), files[1].fileno())
                sys.stdout.flush(), sys.stderr.flush()
                os._exit(code)
            children.append((child, files))
        os.close(start), os.close(starting)
        if "signals" in order:
            interrupt(children[0][0], order)
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child, _ in children]
        said = [[(file.seek(0), file.read())[1] for file in files] for _, files in children]
    return [{"code": code, "out": out, "err": err} for code, (out, err) in zip(codes, said, strict=True)]


def interrupt(child: int, order: dict[str, Any]) -> None:
    """Signal a child once the files have appeared; do nothing if it ends before."""
    place = Path(order["place"])
    while os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        if len(list(place.glob(order["pattern"]))) >= order.get("count", 1):
            for number in order["signals"]:
                os.kill(child, number)
                time.sleep(0.01)
            return
        time.sleep(0.002)


def main() -> None:
    """Answer orders until stdin ends."""
    from encoded import once

    import compress
    import compress.cli
    from compress import calibration

    calibration.encode = once(calibration.encode)  # children inherit what was encoded before the fork
    os.fsync = lambda handle: None  # killed processes lose no written data while the system stays up
    for line in sys.stdin:
        order = json.loads(line)
        for name in order.get("imports", ()):  # before forking, so that children have it
            importlib.import_module(name)
        if order.get("here"):
            compress.run(order["model"], order["recipe"], order["out"], **order.get("options", {}))
            answer: Any = {"code": 0}
            gc.freeze()  # a collection in a child would copy every page that it shares
        elif "size" in order:
            answer = importlib.import_module("several").together(order)
        else:
            answer = commands(order) if "lines" in order else apart(order)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
