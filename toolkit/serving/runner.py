"""The one thread that steps the engine, and the tickets on which requests wait for their tokens.

Everything that touches the engine runs on that thread: requests and cancellations are handed to it as
commands and carried out between two steps. It sleeps on a condition while there is nothing to do. Results go
to asyncio queues through ``call_soon_threadsafe``, one call a step.
"""

import asyncio
import sys
import threading
import time
import traceback
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from toolkit.errors import ToolkitError
from toolkit.serving.metrics import Metrics
from toolkit.serving.protocol import RequestError

SHUTTING_DOWN = "The server is shutting down."


class Unavailable(RequestError):
    """The server cannot take or finish this request now (HTTP 503)."""

    def __init__(self, message: str):
        super().__init__(message, status=503, code="unavailable")


class Ticket:
    """One HTTP request's place in the engine: an engine request a prompt, ``n`` sequences each."""

    def __init__(self, runner: "Runner", sequences: int, prompt_tokens: int):
        self.sequences, self.prompt_tokens, self.arrived = sequences, prompt_tokens, time.perf_counter()
        self.accepted: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.unfinished = sequences
        self.over = False
        self.watcher: asyncio.Task[None] | None = None  # held, since the event loop does not
        self._runner = runner
        self._items: asyncio.Queue[Any] = asyncio.Queue()

    async def deltas(self) -> AsyncIterator[tuple[int, Any]]:
        """(place of the prompt, Delta) as the engine delivers them, until every sequence has finished.

        Raises what ended the request early: :class:`Unavailable`, or the error of the engine.
        """
        remaining = self.sequences
        while remaining:
            item = await self._items.get()
            if isinstance(item, Exception):
                raise item
            yield item
            remaining -= item[1].finished is not None

    def cancel(self) -> None:
        """Give up: the engine drops what is left. Does nothing once the request is over."""
        if not self.over:
            self._runner.drop(self, Unavailable("The request was cancelled."))

    def put(self, item: Any) -> None:
        """On the event loop: None or an error in answer to the submission, then deltas or what ended them."""
        if self.accepted.done():
            self._items.put_nowait(item)
        elif isinstance(item, Exception):
            self.accepted.set_exception(item)
        else:
            self.accepted.set_result(None)


@dataclass
class _Route:
    ticket: Ticket
    prompt: int
    remaining: int
    last_token: dict[int, float] = field(default_factory=dict)


class Runner:
    """Owns the engine's thread.

    ``max_sequences`` bounds what may be waiting or running; a request beyond it is refused with 503.
    ``failure`` is the exception that stopped the thread, or None.
    """

    def __init__(self, engine: Any, max_sequences: int = 1024):
        self.engine, self.max_sequences = engine, max_sequences
        self.failure: BaseException | None = None
        self.draining = False
        self.stats: Mapping[str, Any] = dict(engine.stats())
        self.metrics = Metrics(lambda: self.stats)
        self._load = 0
        self._wake = threading.Condition()
        self._commands: list[Callable[[], None]] = []
        self._stop = False
        self._routes: dict[Any, _Route] = {}
        self._tickets: set[Ticket] = set()
        self._outbox: list[tuple[Ticket, Any]] = []
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """On the event loop that will submit."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def close(self, timeout: float = 10.0) -> None:
        """End every request and the thread. ``timeout``: seconds to wait for the step in progress."""
        self.draining = True
        self.drop_all(SHUTTING_DOWN)
        with self._wake:
            self._stop = True
            self._wake.notify()
        self._thread.join(timeout)

    async def submit(self, prompts: Sequence[list[int]], params: Any) -> Ticket:
        """Hand ``prompts`` to the engine, all or none; returns once it has accepted them.

        Raises :class:`Unavailable` when overloaded or ending, the engine's ToolkitError for a bad request.
        """
        ticket = Ticket(self, len(prompts) * params.n, sum(map(len, prompts)))
        if ticket.sequences > self.max_sequences:
            raise RequestError(
                f"The request asks for {ticket.sequences} sequences; allowed are up to {self.max_sequences}."
            )
        with self._wake:
            if self.failure is not None:
                raise Unavailable(f"The engine has stopped: {self.failure}")
            if self.draining:
                raise Unavailable(SHUTTING_DOWN)
            if self._load + ticket.sequences > self.max_sequences:
                raise Unavailable(f"The server is at its limit of {self.max_sequences} sequences; try again later.")
            self._load += ticket.sequences
            self._tickets.add(ticket)
            self._commands.append(lambda: self._admit(ticket, prompts, params))
            self._wake.notify()
        try:
            await ticket.accepted
        except asyncio.CancelledError:
            ticket.cancel()
            raise
        return ticket

    def drop(self, ticket: Ticket, reason: Exception) -> None:
        """From any thread: cancel ``ticket`` in the engine and end it with ``reason``."""
        with self._wake:
            self._commands.append(lambda: self._drop(ticket, reason))
            self._wake.notify()

    def drop_all(self, message: str) -> None:
        """From any thread: end every request with 503."""
        with self._wake:
            tickets = list(self._tickets)
        for ticket in tickets:
            self.drop(ticket, Unavailable(message))

    # What follows runs on the engine's thread.

    def _run(self) -> None:
        try:
            while True:
                with self._wake:
                    while not (self._commands or self._stop or self.engine.has_work):
                        self._wake.wait()
                    commands, self._commands = self._commands, []
                    stop = self._stop
                for command in commands:
                    command()
                self._send()  # answers to submissions need not wait for the step
                if stop:
                    break
                if self.engine.has_work:
                    for delta in self.engine.step():
                        self._route(delta)
                self.stats = dict(self.engine.stats())
                self._send()
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            self._fail(error)
        self._send()

    def _admit(self, ticket: Ticket, prompts: Sequence[list[int]], params: Any) -> None:
        if ticket.over:
            return
        made: list[Any] = []
        try:
            for place, prompt in enumerate(prompts):
                made.append(self.engine.submit(prompt, params))
                self._routes[made[-1]] = _Route(ticket, place, params.n)
        except ToolkitError as error:
            for request_id in made:
                del self._routes[request_id]
                self.engine.cancel(request_id)
            self._finish(ticket)
            self._outbox.append((ticket, error))
            return
        self.metrics.prompt_tokens.add(ticket.prompt_tokens)
        self._outbox.append((ticket, None))

    def _drop(self, ticket: Ticket, reason: Exception) -> None:
        if ticket.over:
            return
        for request_id in [key for key, route in self._routes.items() if route.ticket is ticket]:
            route = self._routes.pop(request_id)
            self.metrics.finished.add(route.remaining, reason="cancelled")
            self.engine.cancel(request_id)
        self._finish(ticket)
        self._outbox.append((ticket, reason))

    def _route(self, delta: Any) -> None:
        route = self._routes.get(delta.request_id)
        if route is None:
            return
        now = time.perf_counter()
        tokens = len(delta.token_ids)
        if tokens:
            self.metrics.generated_tokens.add(tokens)
            before = route.last_token.get(delta.index)
            if before is None:
                self.metrics.first_token.observe(now - route.ticket.arrived)
            else:
                self.metrics.next_token.observe((now - before) / tokens, tokens)
            route.last_token[delta.index] = now
        self._outbox.append((route.ticket, (route.prompt, delta)))
        if delta.finished is not None:
            self.metrics.finished.add(reason=delta.finished.finish_reason)
            route.remaining -= 1
            route.ticket.unfinished -= 1
            if not route.remaining:
                del self._routes[delta.request_id]
            if not route.ticket.unfinished:
                self._finish(route.ticket)

    def _finish(self, ticket: Ticket) -> None:
        ticket.over = True
        with self._wake:
            self._tickets.discard(ticket)
            self._load -= ticket.sequences

    def _fail(self, error: BaseException) -> None:
        with self._wake:
            self.failure = error
            tickets = list(self._tickets)
        for ticket in tickets:
            self._finish(ticket)
            self._outbox.append((ticket, Unavailable(f"The engine has stopped: {error}")))

    def _send(self) -> None:
        """Wake the event loop once for everything that a step produced."""
        outbox, self._outbox = self._outbox, []
        if outbox and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(_put_all, outbox)


def _put_all(items: list[tuple[Ticket, Any]]) -> None:
    for ticket, item in items:
        ticket.put(item)
