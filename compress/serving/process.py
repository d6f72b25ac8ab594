"""Runs a server as a process: binds, serves until told to stop, lets running requests finish, and exits with 0."""

from __future__ import annotations

import asyncio
import errno
import signal
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import FrameType

import uvicorn

from compress.errors import RecipeError
from compress.serving.app import Server, make_app

LACKING = (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT)  # `localhost` may resolve to an IPv6 address without IPv6 support
BACKLOG = 1024  # connections that the system queues before they are accepted
LAST_WORDS = 10  # seconds after the deadline to finish a step and send errors to the remaining clients


@contextmanager
def bound(host: str, port: int) -> Iterator[list[socket.socket]]:
    """Sockets bound to all addresses of `host`, not listening yet; addresses that this machine lacks are left out.

    Raises RecipeError if none can be bound, or if the port is in use at any of them.
    """
    try:
        told = {(family, at) for family, _, _, _, at in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)}
    except (OSError, UnicodeError) as error:
        raise RecipeError(f"--host: {host!r} is not an address: {error}") from error
    found: list[socket.socket] = []
    lacking = OSError()
    with ExitStack() as end:
        for family, address in sorted(told):
            try:
                one = end.enter_context(socket.socket(family, socket.SOCK_STREAM))
                one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:  # else binding `::` would take the IPv4 port as well
                    one.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                one.bind(address)
                found.append(one)
            except OSError as error:
                if error.errno not in LACKING:
                    raise refused(host, port, error) from error
                lacking = error
        if not found:
            raise RecipeError(f"--host: {host!r} is not an address of this machine: {lacking.strerror}") from lacking
        yield found


def refused(host: str, port: int, error: OSError) -> RecipeError:
    """The error to raise if the system refuses a port."""
    if error.errno == errno.EADDRINUSE:
        return RecipeError(f"--port: {port} is in use")
    return RecipeError(f"--port: {port} at {host} cannot be bound: {error.strerror}")


class Ending(uvicorn.Server):
    """A uvicorn server that, at the deadline, closes the engine, which sends an error to every client still waiting.

    uvicorn alone would cut the connections, with a traceback for each.
    """

    def __init__(self, config: uvicorn.Config, served: Server, deadline: float) -> None:
        super().__init__(config)
        self.served, self.deadline = served, deadline

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Shut down as uvicorn does, but close the engine after the deadline."""
        end = asyncio.get_running_loop().call_later(self.deadline, self.served.engine.close, 0.0)
        try:
            await super().shutdown(sockets)
        finally:
            end.cancel()


def serve_forever(server: Server, listeners: Sequence[socket.socket], deadline: int, ready: Callable[[], None]) -> None:
    """Listen, call `ready`, and serve until SIGTERM or SIGINT; running requests then have `deadline` seconds to finish.

    Raises RecipeError if another process has started to listen at the address of one of `listeners`.
    """

    def stopped(_: int, __: FrameType | None) -> None:
        """Ignore the signal that uvicorn, after a clean stop, raises again for the handler installed before it."""

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
    for listener in listeners:
        try:
            listener.listen(BACKLOG)
        except OSError as error:
            host, port, *_ = listener.getsockname()
            raise refused(host, port, error) from error
    ready()
    Ending(config, server, deadline).run(list(listeners))
