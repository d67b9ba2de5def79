"""One line of JSON per request, for people who run the server. Prompts are written only where that is asked for."""

import json
import logging
import logging.handlers
import sys
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from toolkit.engine import RequestHandle
from toolkit.errors import ToolkitError, first_line
from toolkit.sentences import shown
from toolkit.serving.errors import Json
from toolkit.serving.running import client_of
from toolkit.strict_json import strict_json

_RECORD = "toolkit.record"
QUIET = ("/health", "/ping", "/metrics", "/load")
"""Paths that probes ask again and again; they are not logged."""


@dataclass
class RequestRecord:
    """What is known of a request besides its head.

    Args:
        model: its public name.
        stream: whether the response is a stream.
        prompt_tokens: of all prompts.
        handle: of the engine.
        body: as it was sent.
    """

    model: str | None = None
    stream: bool | None = None
    prompt_tokens: int | None = None
    handle: RequestHandle | None = None
    body: bytes | None = None


def record_of(scope: Scope) -> RequestRecord | None:
    """The record of a request that is logged."""
    found: RequestRecord | None = scope.get(_RECORD)
    return found


class JsonLog:
    """Writes objects as lines.

    Args:
        path: a file that is appended to, and opened again where it was moved (logrotate); "-" is standard error.
        prompts: whether bodies of requests are written.

    Raises:
        ToolkitError: for a file that cannot be written.
    """

    def __init__(self, path: str = "-", prompts: bool = False) -> None:
        self.prompts = prompts
        try:
            self._handler: logging.StreamHandler[Any] = (
                logging.StreamHandler(sys.stderr)
                if path == "-"
                else logging.handlers.WatchedFileHandler(path, encoding="utf-8")
            )
        except OSError as error:
            reason = first_line(error)
            raise ToolkitError(
                f"--log-requests must be a file that can be written, got {shown(path)} ({reason})."
            ) from None

    def write(self, line: Json) -> None:
        """Append a line."""
        self._handler.handle(logging.makeLogRecord({"msg": strict_json(line, separators=(",", ":"))}))

    def close(self) -> None:
        self._handler.close()


class LogRequests:
    """Logs each request before the end of its response is sent: a client that has all of it finds its line."""

    def __init__(self, app: ASGIApp, log: JsonLog, by_key: bool) -> None:
        self.app, self._log, self._by_key = app, log, by_key

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] in QUIET:
            await self.app(scope, receive, send)
            return
        record = scope[_RECORD] = RequestRecord()
        started, now, status, logged = time.perf_counter(), datetime.now(UTC), 0, False

        def log() -> None:
            nonlocal logged
            line = {"time": now.isoformat(timespec="milliseconds"), "id": scope.get("toolkit.request_id")}
            line |= {"client": client_of(HTTPConnection(scope), self._by_key), "method": scope["method"]}
            line |= {"path": scope["path"], "status": status, **_of_engine(record, started)}
            line["latency_s"] = round(time.perf_counter() - started, 6)
            if self._log.prompts and record.body is not None:
                line["body"] = _body(record.body)
            logged = True
            self._log.write(line)

        async def watched(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            elif message["type"] == "http.response.body" and not message.get("more_body", False):
                log()
            await send(message)

        try:
            await self.app(scope, receive, watched)
        finally:
            if not logged:
                log()


def _of_engine(record: RequestRecord, started: float) -> Json:
    handle = record.handle
    if handle is None:
        return {}
    first = handle.first_token_time
    return {
        "model": record.model,
        "stream": record.stream,
        "prompt_tokens": record.prompt_tokens,
        "completion_tokens": handle.num_tokens,
        "finish_reasons": handle.finish_reasons,
        "ttft_s": None if first is None else round(first - started, 6),
    }


def _body(raw: bytes) -> Any:
    try:
        return json.loads(raw)
    except ValueError:
        return raw.decode(errors="replace")
