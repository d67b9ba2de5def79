"""The page of a run alone, on the standard library's server."""

import contextlib
import signal
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from toolkit.errors import ToolkitError
from toolkit.serving.page.content import HEADERS, media_type, page_files
from toolkit.serving.watch.run import WatchedRun

LOCAL = ("127.0.0.1", "localhost", "::1")


class WatchServer(ThreadingHTTPServer):
    """The page of a run on an address; ``serve_forever`` serves it.

    Args:
        run: what is shown.
        host: one of this machine's addresses. On a loopback address only requests for that are served: another
            website, whose name was made to mean this address, gets nothing.
        port: 0 takes a free one.

    Raises:
        ToolkitError: where the address cannot be bound.
    """

    daemon_threads = True

    def __init__(self, run: WatchedRun, host: str, port: int) -> None:
        self.run, self.files = run, page_files()
        self.names = LOCAL if host in LOCAL else None
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or error
            raise ToolkitError(f"Cannot listen on host '{host}', port {port}: {reason}.") from None

    def server_bind(self) -> None:
        """As of every TCP server; HTTP's looks for a name of the address, which may wait for a network."""
        socketserver.TCPServer.server_bind(self)

    @property
    def url(self) -> str:
        return f"http://{f'[{self.host}]' if ':' in self.host else self.host}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that leaves in the middle of a response is nothing to report."""


class _Handler(BaseHTTPRequestHandler):
    server: WatchServer
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # a response leaves as a whole
    timeout = 30  # seconds that an idle connection keeps its thread

    def do_GET(self) -> None:
        asked = urlsplit(self.path)
        if self.server.names is not None and self._host() not in self.server.names:
            self._send(HTTPStatus.MISDIRECTED_REQUEST, b"This server is localhost.\n", "text/plain")
            return
        folder, _, name = asked.path.lstrip("/").rpartition("/")
        if (folder, name) in (("", ""), ("", "watch")):
            folder, name = "page", "watch.html"
        if folder == "page" and name in self.server.files:
            self._send(HTTPStatus.OK, self.server.files[name], media_type(name))
            return
        text = self.server.run.respond(name, dict(parse_qsl(asked.query))) if folder == "watch" else None
        if text is None:
            self._send(HTTPStatus.NOT_FOUND, b"There is no such page.\n", "text/plain")
        else:
            self._send(HTTPStatus.OK, text.encode(), "application/json")

    do_HEAD = do_GET

    def _host(self) -> str:
        return urlsplit(f"//{self.headers.get('host', '')}").hostname or ""

    def _send(self, status: HTTPStatus, content: bytes, kind: str) -> None:
        self.send_response(status)
        for header, value in {**HEADERS, "content-type": kind, "content-length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing: the page asks once a second."""


def serve_until_signal(server: WatchServer, ready: Callable[[], None]) -> None:
    """Serve until SIGINT, SIGTERM or SIGHUP, on the main thread; ``ready`` is called once requests are taken."""
    stopped = threading.Event()
    with server, _signals(stopped.set):
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.1}, daemon=True)
        thread.start()
        ready()
        stopped.wait()
        server.shutdown()
        thread.join()


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, lambda *_: stop()) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)
