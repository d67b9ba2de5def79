"""Requests under way: by id, by client, with deadlines, and held back where an administrator drains the server."""

import asyncio
import hashlib
import math
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

from fastapi import Request
from starlette.requests import HTTPConnection

from toolkit.engine import AsyncEngine, RequestHandle
from toolkit.engine.pooling.queue import PoolingQueue, PoolingRequest
from toolkit.sentences import shown
from toolkit.serving.access import OPENED_BY
from toolkit.serving.errors import RequestError

DEADLINE = "x-request-timeout"
"""The header with the seconds that a request may take."""
MAX_DEADLINE = 86400.0
_NO_ADDRESS = "unix"


Handle = RequestHandle | PoolingRequest
AnyEngine = AsyncEngine | PoolingQueue
Submitted = TypeVar("Submitted", RequestHandle, PoolingRequest)


class RunningRequests:
    """What generates or is pooled now.

    Args:
        max_per_client: most unfinished sequences of one client; None for no bound.
        by_key: whether clients are told apart by their API keys; else by their addresses.
    """

    def __init__(self, max_per_client: int | None = None, by_key: bool = False) -> None:
        self.max_per_client, self._by_key = max_per_client, by_key
        self._handles: dict[str, weakref.WeakSet[Handle]] = defaultdict(weakref.WeakSet)  # by id
        self._of_client: dict[str, weakref.WeakSet[Handle]] = defaultdict(weakref.WeakSet)
        self._keep: weakref.WeakSet[Handle] = weakref.WeakSet()
        self._most_ids = 64  # before finished ones are looked for
        self._open = asyncio.Event()
        self._open.set()

    @property
    def load(self) -> int:
        """Requests that have not finished."""
        return len({one for handles in self._handles.values() for one in handles if one.num_unfinished})

    def close(self) -> None:
        """Let new requests wait until ``open``."""
        self._open.clear()

    def open(self) -> None:
        """Hand new requests to the engine, and those that wait."""
        self._open.set()

    async def start(
        self, request: Request, engine: AnyEngine, submit: Callable[[], Submitted], sequences: int,
        ids: Iterable[str] = (), keep_cancelled: bool = False,
    ) -> Submitted:  # fmt: skip
        """The handle of a request that is handed to the engine.

        Args:
            request: of HTTP.
            engine: that runs it.
            submit: hands it over.
            sequences: of the request.
            ids: under which it can be aborted, beside its ``X-Request-Id``.
            keep_cancelled: whether an aborted request's tokens are wanted; otherwise its handle raises.

        Raises:
            RequestError: for a client with too many sequences, or a deadline that is no number.
        """
        seconds = deadline_of(request)
        try:
            await asyncio.wait_for(self._open.wait(), seconds)
        except TimeoutError:
            raise _late(seconds or 0.0) from None
        client = client_of(request, self._by_key)
        self._check(client, sequences)
        handle = submit()
        self._of_client[client].add(handle)
        for name in {*ids, request_id(request)}:
            self._handles[name].add(handle)
        if len(self._handles) > self._most_ids:
            self._forget_finished()
        if keep_cancelled:
            self._keep.add(handle)
        if seconds is not None:
            held: Callable[[], Handle | None] = weakref.ref(handle)
            asyncio.get_running_loop().call_later(seconds, _expire, engine, held, seconds)
        return handle

    def abort(self, engine: AnyEngine, error: RequestError, ids: Iterable[str] | None = None) -> int:
        """End requests, those of ``ids`` or all; how many were under way.

        Their handles raise ``error``, except where their tokens are kept.
        """
        names = list(self._handles) if ids is None else ids
        found = {one for name in names for one in self._handles.get(name, ()) if one.num_unfinished}
        for handle in found:
            _cancel(engine, handle, None if handle in self._keep else error)
        return len(found)

    def _check(self, client: str, sequences: int) -> None:
        most = self.max_per_client
        if most is None:
            return
        if sequences > most:
            raise RequestError(f"A request must have <= {most} sequences, got {sequences}.")
        running = sum(handle.num_unfinished for handle in self._of_client.get(client, ()))
        if running + sequences > most:
            message = (
                f"This client must have <= {most} unfinished sequences, got {running + sequences}; try again later."
            )
            raise RequestError(message, status=429, code="rate_limit_exceeded")

    def _forget_finished(self) -> None:
        for table in (self._handles, self._of_client):
            for name in [name for name, handles in table.items() if not any(one.num_unfinished for one in handles)]:
                del table[name]
        self._most_ids = max(64, 2 * len(self._handles))


def request_id(request: Request) -> str:
    """The ``X-Request-Id`` of the response."""
    return str(request.scope.get("toolkit.request_id", ""))


def client_of(request: HTTPConnection, by_key: bool) -> str:
    """Who sends a request: a digest of its key, of several that which opened the server to it; or an address."""
    if by_key:
        headers = {name: value for name, value in request.scope["headers"] if name in (b"authorization", b"x-api-key")}
        sent = headers.get(b"authorization", b"").rpartition(b" ")[2] or headers.get(b"x-api-key", b"")
        sent = request.scope.get(OPENED_BY, sent)
        return "key-" + hashlib.sha256(sent).hexdigest()[:12]
    return request.client.host if request.client is not None and request.client.host else _NO_ADDRESS


def deadline_of(request: Request) -> float | None:
    """Seconds that the request may take. Raises RequestError for a header that is no such number."""
    given = request.headers.get(DEADLINE)
    if given is None:
        return None
    try:
        seconds = float(given)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= MAX_DEADLINE:
        raise RequestError(f"{DEADLINE} must be > 0 and <= {MAX_DEADLINE:g} seconds, got {shown(given)}.", DEADLINE)
    return seconds


def _late(seconds: float) -> RequestError:
    return RequestError(
        f"The request took longer than its {DEADLINE} of {seconds:g} seconds.", status=504, code="timeout"
    )


def _expire(engine: AnyEngine, held: Callable[[], Handle | None], seconds: float) -> None:
    handle = held()
    if handle is not None and handle.num_unfinished:
        _cancel(engine, handle, _late(seconds))


def _cancel(engine: Any, handle: Handle, error: RequestError | None) -> None:
    engine.cancel_handle(handle, error)
