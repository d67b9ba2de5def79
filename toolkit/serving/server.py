"""The listening socket, signals and the clean shutdown.

SIGTERM or SIGINT: new requests are rejected, running requests have ``grace`` seconds to finish, then they are
cancelled and told so; a second signal cancels at once. The process then ends normally.
"""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from toolkit.engine import EngineUnavailable
from toolkit.engine.request_handle import SHUTTING_DOWN
from toolkit.errors import ToolkitError
from toolkit.serving.app import ServerConfig, create_app

AFTER_GRACE = 10.0
"""Seconds for cancelled requests to send their final events."""


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 takes a free one. Raises ToolkitError if the address cannot be bound."""
    listener = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        if listener is not None:
            listener.close()
        raise ToolkitError(f"Cannot listen on host '{host}', port {port}: {error.strerror or error}.") from None
    return listener


def serve(server: ServerConfig, listener: socket.socket, *, grace: float, ready: Callable[[], None]) -> None:
    """Serve requests on ``listener`` until a signal, calling ``ready`` once requests are taken.

    An engine that fails meanwhile does not end this: its requests do, with 503, and so does ``/health``.
    """
    config = uvicorn.Config(
        create_app(server),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(grace + AFTER_GRACE) + 1,
    )
    _Server(config, server, grace, ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: ServerConfig, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine, self._grace, self._ready = server.engine, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        self._ready()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """In place of uvicorn's, which raises the signal again at the end and so ends the process with it."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop)
        try:
            yield
        finally:
            for number in (signal.SIGTERM, signal.SIGINT):
                loop.remove_signal_handler(number)

    def _stop(self) -> None:
        if self.should_exit:
            self._cancel_all()
            return
        self.should_exit = self._engine.draining = True
        asyncio.get_running_loop().call_later(self._grace, self._cancel_all)

    def _cancel_all(self) -> None:
        self._engine.cancel_all(EngineUnavailable(SHUTTING_DOWN))
