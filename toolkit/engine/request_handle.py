"""What a caller holds while the engine's thread runs its request."""

import asyncio
import contextlib
import queue
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from typing import TypeAlias

from toolkit.engine.outputs import Delta
from toolkit.engine.params import SamplingParams
from toolkit.errors import ToolkitError

Event: TypeAlias = Delta | Exception
"""What a handle gets: a delta, or what ended the request early."""
Awaited: TypeAlias = tuple[asyncio.AbstractEventLoop, asyncio.Event]
"""An event loop on which a handle is iterated, and what wakes the iteration."""

SHUTTING_DOWN = "The engine is shutting down."


class EngineUnavailable(ToolkitError):
    """The engine cannot take or finish a request now: it is at its limit, is shutting down, or has failed."""


class RequestHandle:
    """The prompts of one ``AsyncEngine.submit``, while they wait and run.

    Iterate it for deltas, once, with ``for`` or ``async for``. Iteration ends when every sequence has finished, and
    raises what ended the request early.

    Attributes:
        num_sequences: ``n`` of all prompts, added up.
        num_queued: their candidates (``best_of``).
        params: of each prompt.
        num_bytes: of the pictures of the prompts.
        num_unfinished: those that have not finished.
        arrival_time: ``time.perf_counter()`` of the submission.
        num_tokens: generated so far, of all sequences.
        first_token_time: ``time.perf_counter()`` of the first of them.
        finish_reasons: of the sequences that have finished.
        error: what iteration raises once every sequence has been cancelled for it.
        accepted: request ids, one per prompt, once the engine has accepted all of them; or why it did not.
    """

    def __init__(
        self, params: Sequence[SamplingParams], cancel: Callable[["RequestHandle"], None], num_bytes: int = 0
    ) -> None:
        self.params, self.num_bytes = params, num_bytes
        self.num_sequences = self.num_unfinished = sum(one.n for one in params)
        self.num_queued = sum(one.num_candidates for one in params)
        self.arrival_time = time.perf_counter()
        self.num_tokens = 0
        self.first_token_time: float | None = None
        self.finish_reasons: list[str] = []
        self.error: Exception | None = None
        self.accepted: Future[list[int]] = Future()
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._awaited: Awaited | None = None

    async def wait_accepted(self) -> list[int]:
        """The request ids. Raises why the engine did not accept them; cancels the request when it is cancelled."""
        try:
            return await asyncio.wrap_future(self.accepted)
        except asyncio.CancelledError:
            self.cancel()
            raise

    def __iter__(self) -> Iterator[Delta]:
        left = self.num_sequences
        while left:
            delta = _delta(self._events.get())
            left -= delta.finished is not None
            yield delta

    async def __aiter__(self) -> AsyncIterator[Delta]:
        ready = asyncio.Event()
        self._awaited = asyncio.get_running_loop(), ready
        left = self.num_sequences
        while left:
            ready.clear()  # before the queue is read, so that no event goes unnoticed
            try:
                delta = _delta(self._events.get_nowait())
            except queue.Empty:
                await ready.wait()
                continue
            left -= delta.finished is not None
            yield delta

    def cancel(self) -> None:
        """End what is unfinished with "cancelled". From any thread; does nothing once the request has finished."""
        if self.num_unfinished:
            self._cancel(self)

    def put(self, event: Event) -> Awaited | None:
        """Hand over an event; whom to notify on which event loop, if an event loop iterates.

        Deltas after ``error`` is set are counted only.
        """
        if not isinstance(event, Exception):
            self.num_tokens += len(event.token_ids)
            if event.token_ids and self.first_token_time is None:
                self.first_token_time = time.perf_counter()
            if event.finished is not None:
                self.finish_reasons.append(event.finished.finish_reason)
        if self.error is None or isinstance(event, Exception):
            self._events.put(event)
        return self._awaited


def wake(awaited: Iterable[Awaited | None]) -> None:
    """Wake each event loop once for everything that a step has added."""
    of_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Event]] = {}
    for loop, ready in filter(None, awaited):
        of_loop.setdefault(loop, []).append(ready)
    for loop, events in of_loop.items():
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(_set_all, events)


def _set_all(events: list[asyncio.Event]) -> None:
    for event in events:
        event.set()


def until_closed(handle: RequestHandle) -> Iterator[Delta | None]:
    """None once, then the deltas; closing the iterator cancels the request."""
    try:
        yield None
        yield from handle
    finally:
        handle.cancel()


def _delta(event: Event) -> Delta:
    if isinstance(event, Exception):
        raise event
    return event


class EngineListener:
    """Is told on the engine's thread what happens to requests: for metrics, or in the place of iterating handles."""

    def on_accepted(self, handle: RequestHandle) -> None:
        """The engine has accepted all prompts of a handle."""

    def on_delta(self, handle: RequestHandle, delta: Delta) -> None:
        """A step has added ``delta``."""

    def on_failed(self, handle: RequestHandle, error: Exception) -> None:
        """The request was not accepted, or the engine has failed."""

    def on_stopped(self) -> None:
        """The thread has ended."""
