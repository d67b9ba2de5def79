"""Results that take a while: a request returns the id of a promise, and the client asks for it until it is there."""

import asyncio
import json
from collections import OrderedDict
from collections.abc import Callable, Coroutine, Iterable
from concurrent.futures import Future
from typing import Any, NamedTuple

from fastapi import Response

from toolkit.engine import EngineUnavailable
from toolkit.errors import ToolkitError
from toolkit.sentences import shown
from toolkit.serving.errors import RequestError
from toolkit.serving.tinker.completions import Completions, Session
from toolkit.serving.tinker.messages import PROTOBUF

LONGEST_POLL = 20.0
"""Seconds that a response waits for a result; clients wait longer."""
REMEMBERED = 16384
"""Results that are kept, for clients that did not read the response."""


class Result(NamedTuple):
    content: bytes
    media_type: str


def json_result(body: dict[str, Any]) -> Result:
    return Result(json.dumps(body).encode(), "application/json")


def protobuf_result(message: bytes) -> Result:
    return Result(message, PROTOBUF)


def _failed(message: str, category: str) -> Result:
    return json_result({"error": message, "category": category})


class Promises:
    """The promises of one application; for its event loop alone.

    Attributes:
        completions: of the promises of sampling sessions.
    """

    def __init__(self) -> None:
        self.completions = Completions()
        self._tasks: OrderedDict[str, asyncio.Task[Result]] = OrderedDict()
        self._sessions: dict[str, Session] = {}

    def __contains__(self, name: str) -> bool:
        return name in self._tasks

    def add(self, name: str, work: Coroutine[Any, Any, Result], session: Session | None = None) -> None:
        """Begin ``work``, whose result ``name`` promises. What it raises is the result too.

        Args:
            session: that is told of it.
        """
        if session is not None:
            self._sessions[name] = session
        self._tasks[name] = asyncio.create_task(self._settled(name, work, session))
        while len(self._tasks) > REMEMBERED and (oldest := next(iter(self._tasks.items())))[1].done():
            self._forget(oldest[0])

    async def _settled(self, name: str, work: Coroutine[Any, Any, Result], session: Session | None) -> Result:
        result = await _outcome(work)
        if session is not None:
            num_bytes = len(result.content) if result.media_type == PROTOBUF else None
            await self.completions.note(session, name, num_bytes)
        return result

    def forget(self, session: Session, names: Iterable[str]) -> None:
        """Keep the results no longer that a session has read."""
        for name in names:
            if self._sessions.get(name) == session and self._tasks[name].done():
                self._forget(name)

    def _forget(self, name: str) -> None:
        del self._tasks[name]
        if (session := self._sessions.pop(name, None)) is not None:
            self.completions.forget(session, name)

    def add_future(self, name: str, future: Future[Any], result: Callable[[Any], Result]) -> None:
        """``add`` of what a thread makes, which nobody takes back."""

        async def work() -> Result:
            return result(await asyncio.shield(asyncio.wrap_future(future)))

        self.add(name, work())

    async def retrieve(self, name: str, longest: float = LONGEST_POLL) -> Response:
        """The result, or after ``longest`` seconds that it is not there yet.

        Raises:
            RequestError: 410 for a promise that this server has not made, or has forgotten.
        """
        task = self._tasks.get(name)
        if task is None:
            raise RequestError(f"request_id must be of a promise of this server, got {shown(name)}.", status=410)
        await asyncio.wait([task], timeout=longest)
        if not task.done():
            waiting = json_result({"type": "try_again", "request_id": name, "queue_state": "active"})
            return Response(waiting.content, media_type=waiting.media_type)
        result = _failed("The request was cancelled.", "server") if task.cancelled() else task.result()
        return Response(result.content, media_type=result.media_type)

    def cancel(self, name: str) -> bool:
        """Give up what a promise waits for; whether there was something."""
        task = self._tasks.get(name)
        return task is not None and task.cancel()

    async def close(self) -> None:
        """End all tasks."""
        tasks = [task for task in self._tasks.values() if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _outcome(work: Coroutine[Any, Any, Result]) -> Result:
    try:
        return await work
    except EngineUnavailable as error:
        return _failed(str(error), "server")
    except ToolkitError as error:
        return _failed(str(error), "user")
    except Exception as error:
        return _failed(f"The server failed: {type(error).__name__}: {error}", "server")
