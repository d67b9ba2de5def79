"""The listening socket, signals and the clean shutdown.

SIGTERM or SIGINT: new requests are rejected, running requests have ``grace`` seconds to finish, then they are
cancelled and told so, and uploads are cut off; a second signal does that at once. The process then ends normally.
"""

import asyncio
import contextlib
import errno
import gc
import os
import signal
import socket
import ssl
import stat
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import uvicorn

from toolkit.engine import EngineUnavailable
from toolkit.engine.request_handle import SHUTTING_DOWN
from toolkit.errors import ToolkitError, first_line
from toolkit.sentences import shown
from toolkit.serving.app import ServerConfig, create_app
from toolkit.serving.connection import Connection

AFTER_GRACE = 10.0
"""Seconds for cancelled requests to send their final events."""

SWITCH_INTERVAL = 5e-4
"""Seconds that a thread may keep Python's lock from others; Python's own 5 ms add up over the calls of a step."""

LINGER = 1.0
"""Seconds between looks for idle connections at shutdown. TLS waits for the client's goodbye, which may never come."""


@dataclass(frozen=True)
class HttpOptions:
    """How connections are made and kept.

    Args:
        timeout_keep_alive: seconds that an idle connection stays open, and that a request's head may take.
        ssl_certfile: PEM file of the certificate and its chain; None for plain HTTP.
        ssl_keyfile: PEM file of its key; None where ``ssl_certfile`` has that too.
        ssl_ca_certs: PEM file of the authorities whose clients are let in; None asks clients for no certificate.

    Raises:
        ToolkitError: for files that cannot be read or do not fit together.
    """

    timeout_keep_alive: float = 75.0
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None
    ssl_ca_certs: str | None = None

    def __post_init__(self) -> None:
        if self.ssl_certfile is None and (self.ssl_keyfile or self.ssl_ca_certs):
            raise ToolkitError("ssl_certfile must be given with ssl_keyfile and ssl_ca_certs, got None.")
        if self.ssl_certfile is not None:
            self.context()

    def context(self) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        given = {"ssl_certfile": self.ssl_certfile, "ssl_keyfile": self.ssl_keyfile, "ssl_ca_certs": self.ssl_ca_certs}
        for name, path in given.items():
            if path is not None and not os.access(path, os.R_OK):
                raise ToolkitError(f"{name} must be a file that can be read, got {shown(path)}.")
        try:
            # The empty password: OpenSSL would ask the terminal for one.
            context.load_cert_chain(str(self.ssl_certfile), self.ssl_keyfile, password="")
            if self.ssl_ca_certs is not None:
                context.load_verify_locations(self.ssl_ca_certs)
                context.verify_mode = ssl.CERT_REQUIRED
        except (OSError, ValueError) as error:  # SSLError is an OSError
            files = ", ".join(f"{name} {shown(path)}" for name, path in given.items() if path is not None)
            raise ToolkitError(
                f"{files} must be PEM files that fit together, without a passphrase ({first_line(error)})."
            ) from None
        return context


def listen_unix(path: str) -> socket.socket:
    """A bound Unix domain socket. The file of a server that has died is replaced. Raises ToolkitError otherwise."""
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        with contextlib.suppress(FileNotFoundError):
            if stat.S_ISSOCK(os.stat(path).st_mode) and listener.connect_ex(path) == errno.ECONNREFUSED:
                os.unlink(path)
        listener.close()
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        listener.bind(path)
    except OSError as error:
        listener.close()
        raise ToolkitError(f"Cannot listen on '{path}': {error.strerror or error}.") from None
    return listener


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


def serve(
    server: ServerConfig,
    listener: socket.socket,
    *,
    grace: float,
    ready: Callable[[], None],
    http: HttpOptions | None = None,
) -> None:
    """Serve requests on ``listener`` until a signal, calling ``ready`` once requests are taken.

    An engine that fails meanwhile does not end this: its requests do, with 503, and so does ``/health``.
    """
    http = http or HttpOptions()
    config = uvicorn.Config(
        create_app(server),
        http=Connection,
        ws="none",
        timeout_keep_alive=http.timeout_keep_alive,  # type: ignore[arg-type]  # call_later takes fractions too
        ssl_context_factory=None if http.ssl_certfile is None else lambda *_: http.context(),
        log_level="warning",
        access_log=False,
        timeout_graceful_shutdown=int(grace + AFTER_GRACE) + 1,
    )
    try:
        _Server(config, server, grace, ready).run(sockets=[listener])
    finally:
        gc.unfreeze()  # what stays frozen is listed by Triton's bindings as leaked when the process ends


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, server: ServerConfig, grace: float, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._engine, self._grace, self._ready = server.engine, grace, ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        # A full collection visits every object of the libraries and of the model; none of them will be garbage.
        gc.collect()
        gc.freeze()
        sys.setswitchinterval(SWITCH_INTERVAL)
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
        asyncio.get_running_loop().call_later(LINGER, self._drop_idle)

    def _cancel_all(self) -> None:
        self._engine.cancel_all(EngineUnavailable(SHUTTING_DOWN))
        for connection in self._connections():
            connection.end_upload()
        asyncio.get_running_loop().call_later(AFTER_GRACE, self._abort)

    def _drop_idle(self) -> None:
        for connection in self._connections():
            connection.drop_idle()
        asyncio.get_running_loop().call_later(LINGER, self._drop_idle)

    def _abort(self) -> None:
        """End the connections of clients that do not read what they were sent; uvicorn would log each as an error."""
        for connection in self._connections():
            connection.transport.abort()

    def _connections(self) -> list[Connection]:
        return [one for one in self.server_state.connections if isinstance(one, Connection)]
