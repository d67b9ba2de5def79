"""Clients of ``benchmarks.fuzz`` that misbehave on raw sockets, and what each expects of the server."""

import json
import socket
import threading
import time
from collections.abc import Callable

TIMEOUT = 60.0
BODY_LIMIT = 64 * 2**20  # beyond any limit that the server has by default


class RudeClients:
    """Every behaviour in turn, over and over, until ``stop``.

    Args:
        port: of the server on 127.0.0.1.

    Attributes:
        counts: how often each behaviour was tried.
        wrong: what the server did and should not have.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self.counts: dict[str, int] = {}
        self.wrong: list[str] = []
        self._stopped = threading.Event()
        self._held: list[socket.socket] = []

    def run(self) -> None:
        behaviours: list[Callable[[], None]] = [
            self.garbage,
            self.half_a_head,
            self.huge_head,
            self.leave_while_uploading,
            self.leave_while_streaming,
            self.leave_without_reading,
            self.broken_chunks,
            self.garbage_behind_a_request,
            self.oversize_body,
            self.slow_body,
            self.pipeline,
            self.half_close,
        ]
        while not self._stopped.is_set():
            for behave in behaviours:
                if self._stopped.is_set():
                    break
                try:
                    behave()
                except (ConnectionError, BrokenPipeError):
                    pass  # the server has ended the connection, as it may
                except TimeoutError:
                    self.wrong.append(f"{behave.__name__}: no response within {TIMEOUT:.0f} s")
                self.counts[behave.__name__] = self.counts.get(behave.__name__, 0) + 1
        for held in self._held:
            held.close()

    def stop(self) -> None:
        self._stopped.set()

    def _connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self._port), timeout=TIMEOUT)

    def _expect(self, who: str, connection: socket.socket, statuses: tuple[int, ...]) -> None:
        received = b""
        while part := connection.recv(65536):
            received += part
        status = int(received.split(None, 2)[1]) if received.startswith(b"HTTP/1.1 ") else 0
        if received and status not in statuses:
            self.wrong.append(f"{who}: status {status}, expected one of {statuses}: {received[:200]!r}")

    def garbage(self) -> None:
        tls = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(50)
        for sent in (tls, b"GET\r\n\r\n", b"GET /\xff HTTP/1.1\r\n\r\n", b"\r\n" * 9 + b"\0"):
            with self._connect() as connection:
                connection.sendall(sent)
                connection.shutdown(socket.SHUT_WR)
                self._expect("garbage", connection, (400,))

    def half_a_head(self) -> None:
        """Slow loris: these stay open, a byte at a time, until the server closes them."""
        fresh = self._connect()
        fresh.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nX-A: ")
        self._held = [*self._held[-50:], fresh]
        for held in self._held:
            try:
                held.sendall(b"a")
            except OSError:
                held.close()

    def huge_head(self) -> None:
        with self._connect() as connection:
            connection.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\nX-A: " + b"a" * 500_000)
            self._expect("huge_head", connection, (400, 431))

    def leave_while_uploading(self) -> None:
        for body in (b"", b'{"prompt": "a', b"a" * 100_000):
            with self._connect() as connection:
                connection.sendall(_head(10**6) + body)

    def leave_while_streaming(self) -> None:
        for path, body in (("completions", {"prompt": "a"}), ("chat/completions", {"messages": [_MESSAGE]})):
            with self._connect() as connection:
                connection.sendall(_request({**body, "max_tokens": 40, "ignore_eos": True, "stream": True}, path))
                connection.recv(200)

    def leave_without_reading(self) -> None:
        with self._connect() as connection:
            connection.sendall(_request({"prompt": "a", "n": 4, "max_tokens": 40, "ignore_eos": True}))
            time.sleep(0.01)

    def broken_chunks(self) -> None:
        for path in ("/v1/completions", "/nowhere"):
            with self._connect() as connection:
                connection.sendall(_head(None, path) + b"5\r\n{    \r\nnonsense\r\n")
                self._expect("broken_chunks", connection, (400, 404))

    def garbage_behind_a_request(self) -> None:
        with self._connect() as connection:
            connection.sendall(_request({"prompt": "a", "max_tokens": 20, "stream": True}) + bytes(100))
            self._expect("garbage_behind_a_request", connection, (200,))

    def oversize_body(self) -> None:
        with self._connect() as connection:
            connection.sendall(_head(BODY_LIMIT))
            chunk = b" " * 2**20
            for _ in range(BODY_LIMIT >> 20):
                connection.sendall(chunk)
            self._expect("oversize_body", connection, (413,))

    def slow_body(self) -> None:
        sent = _request({"prompt": "slow", "max_tokens": 2})
        with self._connect() as connection:
            for at in range(0, len(sent), 16):
                connection.sendall(sent[at : at + 16])
                time.sleep(0.005)
            connection.shutdown(socket.SHUT_WR)
            self._expect("slow_body", connection, (200,))

    def pipeline(self) -> None:
        with self._connect() as connection:
            connection.sendall(_request({"prompt": "a", "max_tokens": 2}) * 3 + _close())
            self._expect("pipeline", connection, (200,))

    def half_close(self) -> None:
        with self._connect() as connection:
            connection.sendall(_request({"prompt": "a", "max_tokens": 40, "ignore_eos": True}))
            connection.shutdown(socket.SHUT_WR)
            self._expect("half_close", connection, (200,))


_MESSAGE = {"role": "user", "content": "a"}


def _head(length: int | None, path: str = "/v1/completions") -> bytes:
    body = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    return f"POST {path} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n{body}\r\n\r\n".encode()


def _request(body: dict[str, object], path: str = "completions") -> bytes:
    content = json.dumps(body).encode()
    return _head(len(content), f"/v1/{path}") + content


def _close() -> bytes:
    return b"GET /health HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
