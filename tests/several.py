"""Runs the command line in several processes at once, as `torchrun` starts them.

They are forked by `forks.py`, which has already imported everything. Batches and the strips of a Gram are small here,
so that tiny models have many of both.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

BATCH_TOKENS, SIDE = 160, 16


def main_of(order: dict[str, Any], rank: int) -> None:
    """Run the command in this process as one of several ranks, with the failure that the order asks for."""
    import torch

    from compress import errors, stats
    from compress.cli import main
    from compress.model import travellers
    from compress.model.block import Block

    signal.signal(signal.SIGINT, signal.default_int_handler)
    travellers.BATCH_TOKENS, stats.SIDE = BATCH_TOKENS, SIDE
    if rank in order.get("threads", []):
        torch.set_num_threads(2)
    if order.get("fails") == rank:
        kind = getattr(errors, order["kind"], None) or getattr(__import__("builtins"), order["kind"])

        def fail(block: Block, *_: Any) -> None:
            raise kind("made up")

        Block.move = fail  # type: ignore[assignment]
    if order.get("grouped"):
        joins_itself(order["arguments"])
        return
    sys.argv = ["compress", *order["arguments"]]
    main()


def joins_itself(arguments: list[str]) -> None:
    """Run the API as in a script that created the process group itself; the group must still exist afterwards."""
    from torch import distributed

    import compress

    recipe, model, out = arguments
    distributed.init_process_group("gloo")
    report = compress.run(model, recipe, out)
    distributed.barrier()
    print(json.dumps([report.bits_per_weight, report.artifact_bytes]))
    distributed.destroy_process_group()


def forked(order: dict[str, Any], rank: int, port: int, place: Path) -> int:
    """Fork the process of one rank, with its output written to files; returns its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        for name, handle in (("out", 1), ("err", 2)):
            os.dup2(os.open(place / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT), handle)
        if order["size"] > 1:
            told = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": order["size"], "MASTER_PORT": port}
            os.environ |= {name: str(value) for name, value in told.items()} | {"MASTER_ADDR": "127.0.0.1"}
        main_of(order, rank)
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def together(order: dict[str, Any]) -> dict[str, Any]:
    """Run all processes of an order; returns exit codes, output, and seconds since the signal was sent, if any."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        children = [forked(order, rank, port, place) for rank in range(order["size"])]
        if "once" in order:
            while not Path(order["once"]).exists():
                time.sleep(0.002)
            for rank in order["signalled"]:
                os.kill(children[rank], signal.Signals[order["signal"]])
        began = time.monotonic()
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        said = {name: [(place / f"{r}.{name}").read_text() for r in range(order["size"])] for name in ("out", "err")}
    return {"codes": codes, "seconds": time.monotonic() - began, **said}
