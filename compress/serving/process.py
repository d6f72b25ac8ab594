"""A server as a process: binds, serves until it is told to stop, lets what runs end, and exits with 0."""

from __future__ import annotations

import signal
from types import FrameType

import uvicorn

from compress.serving.app import Server, make_app

BACKLOG = 1024  # connections that the system holds before they are accepted


def serve_forever(server: Server, host: str, port: int, deadline: int) -> None:
    """Serve until SIGTERM or SIGINT; then accept nothing more and give what runs `deadline` seconds."""

    def stopped(_: int, __: FrameType | None) -> None:
        """uvicorn has stopped cleanly by then, and raises the signal once more for whoever was there before."""

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stopped)
    config = uvicorn.Config(
        make_app(server),
        host=host,
        port=port,
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=deadline,
    )
    uvicorn.Server(config).run()
