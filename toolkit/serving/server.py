"""The listening socket, signals and the clean shutdown.

SIGTERM or SIGINT: nothing new is taken, running requests have ``grace`` seconds to finish, then they are
cancelled and told so; a second signal cancels at once. The process then ends normally.
"""

import asyncio
import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator

import uvicorn

from toolkit.errors import ToolkitError
from toolkit.serving.app import Served, create_app
from toolkit.serving.runner import SHUTTING_DOWN

AFTER_GRACE = 10.0
"""Seconds for cancelled requests to send their last words."""


def listen(host: str, port: int) -> socket.socket:
    """A bound TCP socket; port 0 takes a free one. Raises ToolkitError if the address cannot be had."""
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


def serve(served: Served, listener: socket.socket, *, grace: float, ready: Callable[[], None]) -> None:
    """Answer requests on ``listener`` until a signal, calling ``ready`` once requests are taken.

    An engine that fails meanwhile does not end this: its requests do, with 503, and so does ``/health``.
    """
    config = uvicorn.Config(
        create_app(served),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(grace + AFTER_GRACE) + 1,
    )
    _Server(config, served, grace, ready).run(sockets=[listener])


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, served: Served, grace: float, ready: Callable[[], None]):
        super().__init__(config)
        self._runner, self._grace, self._ready = served.runner, grace, ready

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
            self._runner.drop_all(SHUTTING_DOWN)
            return
        self.should_exit = self._runner.draining = True
        asyncio.get_running_loop().call_later(self._grace, self._runner.drop_all, SHUTTING_DOWN)
