"""A server as a process: binds, serves until it is told to stop, lets what runs end, and exits with 0."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable
from types import FrameType

import uvicorn

from compress.errors import RecipeError
from compress.serving.app import Server, make_app

BACKLOG = 1024  # connections that the system holds before they are accepted
LAST_WORDS = 10  # seconds in which a step ends and clients hear that theirs was not done


def bound(host: str, port: int) -> socket.socket:
    """A socket that has its address and does not listen yet; of several addresses that of IPv4.

    Raises RecipeError if the address cannot be had.
    """
    try:
        family, kind, _, _, address = min(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
        found = socket.socket(family, kind)
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"--host: {host!r} is no address: {error}") from error
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        found.close()
        raise refused(host, port, error) from error
    return found


def refused(host: str, port: int, error: OSError) -> RecipeError:
    """What to raise where the system gives no port."""
    if error.errno == errno.EADDRINUSE:
        return RecipeError(f"--port: {port} is in use")
    return RecipeError(f"--port: {port} at {host} cannot be had: {error.strerror}")


class Ending(uvicorn.Server):
    """One that lets the engine fail, with a last word to each client, what still runs at its deadline.

    uvicorn itself would cut the connections, with a traceback for each.
    """

    def __init__(self, config: uvicorn.Config, served: Server, deadline: float) -> None:
        super().__init__(config)
        self.served, self.deadline = served, deadline

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn does, with an end."""
        end = asyncio.get_running_loop().call_later(self.deadline, self.served.engine.close, 0.0)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()


def serve_forever(server: Server, listener: socket.socket, deadline: int, ready: Callable[[], None]) -> None:
    """Listen, say `ready`, and serve until SIGTERM or SIGINT; then give what runs `deadline` seconds.

    Raises RecipeError if another process has come to listen at the address of `listener`.
    """

    def stopped(_: int, __: FrameType | None) -> None:
        """uvicorn has stopped cleanly by then, and raises the signal once more for whoever was there before."""

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stopped)
    config = uvicorn.Config(
        make_app(server),
        log_level="warning",
        access_log=False,
        server_header=False,
        backlog=BACKLOG,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=deadline + LAST_WORDS,
    )
    try:
        listener.listen(BACKLOG)
    except OSError as error:
        host, port, *_ = listener.getsockname()
        raise refused(host, port, error) from error
    ready()
    Ending(config, server, deadline).run([listener])
