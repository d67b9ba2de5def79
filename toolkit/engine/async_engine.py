"""The one thread boundary of the engine: a thread that steps it, and handles on which other threads wait for tokens.

Everything that touches the engine runs on that thread. Other threads hand it commands, which it runs between two steps.
It sleeps on a condition while there is nothing to do.
"""

import contextlib
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, InvalidStateError
from typing import TypeVar, cast

from toolkit.engine.engine import Engine
from toolkit.engine.leading import check_threaded
from toolkit.engine.media import check_media_space, num_bytes
from toolkit.engine.outputs import Completion, Delta
from toolkit.engine.params import SamplingParams
from toolkit.engine.prompts import Params, Prompt, Prompts, check_request, check_streamed, prepare_early
from toolkit.engine.request_handle import (
    SHUTTING_DOWN,
    EngineListener,
    EngineUnavailable,
    Event,
    RequestHandle,
    until_closed,
    wake,
)
from toolkit.engine.step_gate import Gated, StepGate

Result = TypeVar("Result")


class AsyncEngine(Gated):
    """An ``Engine`` on a thread that steps it: requests may come from any number of threads and event loops.

    Every method may be called from any thread. The thread starts with the first request, or by ``start``. Use it as a
    context manager, or ``shutdown`` it.

    Args:
        engine: the engine, which must not be used otherwise until ``shutdown``. Anything else raises ToolkitError.
        max_queued_seqs: most sequences that wait or run; ``submit`` raises beyond. None for no bound.
        listener: is told what happens to requests.
    """

    engine: Engine

    def __init__(
        self, engine: Engine, *, max_queued_seqs: int | None = None, listener: EngineListener | None = None
    ) -> None:
        check_threaded(engine)
        self.engine = engine
        self.max_queued_seqs = max_queued_seqs
        self.listener = listener or EngineListener()
        self.failure: BaseException | None = None
        """What ended the thread, if it has failed."""
        self.draining = False
        """Whether new requests are rejected. May be set; ``shutdown`` sets it."""
        self.step_start = 0.0
        """``time.perf_counter()`` at the start of the last step."""
        self._stats = engine.stats()
        self._of_request: dict[int, RequestHandle] = {}  # the thread's own
        self._changed = threading.Condition()  # guards all below
        self._commands: list[Callable[[], object]] = []
        self._handles: set[RequestHandle] = set()
        self._num_queued = self._num_bytes = 0
        self._gate = StepGate(self._changed)
        self._stop: str | None = None  # "now", or "drained"
        self._close_engine = self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def __enter__(self) -> "AsyncEngine":
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def start(self) -> None:
        """Start the thread. Does nothing when it was started."""
        with self._changed:
            if self._thread.ident is None and not self._ended:
                self._thread.start()

    @property
    def has_ended(self) -> bool:
        """Whether the thread has ended, or was shut down before it started."""
        return self._ended

    @property
    def is_running(self) -> bool:
        """Whether the thread was started and has not ended."""
        return self._thread.ident is not None and not self._ended

    def submit(self, prompts: Prompts, params: Params = None) -> RequestHandle:
        """Hand prompts to the engine, all or none, and return once texts are tokenised and grammars compiled.

        Args:
            prompts: a text, a list of token ids, or a list of those.
            params: one for all prompts, or one per prompt.

        Raises:
            EngineUnavailable: if the engine is at its limit, is shutting down, or has failed.
            ToolkitError: if ``params`` do not fit, or ask for more than ``max_queued_seqs``. That a prompt cannot run
                is an exception of ``accepted``.
        """
        most = self.max_queued_seqs
        texts, chosen = check_request(prompts, params, most)
        given = prepare_early(texts, chosen, self.engine)
        handle = RequestHandle(chosen, self.cancel_handle, num_bytes(given))
        with self._changed:
            if self.failure is not None:
                raise EngineUnavailable(f"The engine has stopped: {self.failure}")
            if self.draining:
                raise EngineUnavailable(SHUTTING_DOWN)
            if most is not None and self._num_queued + handle.num_queued > most:
                raise EngineUnavailable(f"The engine is at its limit of {most} sequences; try again later.")
            if handle.num_bytes:
                check_media_space(self._num_bytes, handle.num_bytes, self.engine.config.media_space, EngineUnavailable)
            self._num_queued += handle.num_queued
            self._num_bytes += handle.num_bytes
            self._handles.add(handle)
            self._commands.append(lambda: self._admit(handle, given, chosen))
            self._changed.notify_all()
            self.start()  # under the lock: no shutdown comes between
        return handle

    def generate(self, prompts: Prompts, params: Params = None) -> list[Completion]:
        """Completions of all prompts, in order, ``n`` per prompt: ``Engine.generate`` from any thread."""
        finished = [delta.finished for delta in self._stream(prompts, params) if delta.finished is not None]
        return sorted(finished, key=lambda one: (one.prompt_index, one.index))

    def stream(self, prompts: Prompts, params: Params = None) -> Iterator[Delta]:
        """The deltas of ``generate``, as each step adds them. Closing the iterator cancels the rest."""
        check_streamed(params)
        return self._stream(prompts, params)

    def _stream(self, prompts: Prompts, params: Params) -> Iterator[Delta]:
        handle = self.submit(prompts, params)
        try:
            handle.accepted.result()
        except BaseException:
            handle.cancel()
            raise
        deltas = until_closed(handle)
        next(deltas)  # from here on, closing it cancels the request
        return cast("Iterator[Delta]", deltas)

    def cancel(self, request_id: int) -> None:
        """End a request's unfinished completions with "cancelled"."""
        self._command(lambda: self.engine.cancel(request_id))

    def cancel_handle(self, handle: RequestHandle, error: Exception | None = None) -> None:
        """End all requests of a handle with "cancelled". With ``error`` its iteration raises that instead."""
        self._command(lambda: self._cancel(handle, error))

    def cancel_all(self, error: Exception) -> None:
        """End all requests. Iterations of their handles raise ``error``."""
        with self._changed:
            handles = list(self._handles)
        for handle in handles:
            self.cancel_handle(handle, error)

    def stats(self) -> dict[str, float]:
        """``Engine.stats`` as of the last step, cancellation or ``call``: whoever is told of one finds it counted."""
        return self._stats

    @property
    def is_paused(self) -> bool:
        """Whether no step may run: inside ``pause``, or between ``pause_generation`` and ``resume_generation``."""
        return self._gate.closed

    @property
    def has_requests(self) -> bool:
        """Whether any request waits or runs."""
        return bool(self._handles)

    def shutdown(
        self,
        *,
        cancel_requests: bool = True,
        close_engine: bool = True,
        wait: bool = True,
        timeout: float | None = None,
    ) -> bool:
        """End the thread, and return whether it has ended. No more requests are taken.

        Args:
            cancel_requests: end unfinished requests, whose handles raise EngineUnavailable; otherwise they finish.
            close_engine: close the engine at the end; otherwise one thread may use it further.
            wait: wait for the thread.
            timeout: seconds to wait; None for no bound. Without ``cancel_requests`` a sleeping or paused engine
                does not finish its requests: wake it first, or give a bound.
        """
        with self._changed:
            self.draining = True
            self._stop = "now" if cancel_requests else self._stop or "drained"
            self._close_engine = close_engine
            started = self._thread.ident is not None
            self._ended = self._ended or not started
            self._changed.notify_all()
        if started and wait:
            self._thread.join(timeout)
        if self._ended and close_engine:
            self.engine.close()
        return self._ended

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, or for ``timeout`` seconds."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    def _command(self, command: Callable[[], object]) -> None:
        with self._changed:
            self._commands.append(command)
            self._changed.notify_all()

    def call(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns on the engine's thread, between two steps, none in flight. Waits for it."""
        done: Future[Result] = Future()

        def command() -> None:
            try:
                self.engine.synchronize()
                result, self._stats = function(), self.engine.stats()
            except Exception as error:
                done.set_exception(error)
            else:
                done.set_result(result)

        with self._changed:
            if self._ended:
                raise EngineUnavailable("The engine's thread has ended.")
            self._commands.append(command)
            self._changed.notify_all()
            self.start()
        return done.result()

    def synchronize(self) -> None:
        """See ``Gated``. Without ``async_scheduling`` no step ever is in flight."""
        if threading.current_thread() is self._thread:
            self.engine.synchronize()
        elif self.engine.runs_ahead and self.is_running:
            with contextlib.suppress(EngineUnavailable):  # the thread has ended meanwhile
                self.call(lambda: None)

    # What follows runs on the engine's thread.

    def step_within(self) -> None:
        """Run a step inside a function of ``call``, where one may run. Commands wait until the function has ended."""
        if not self.engine.is_sleeping and self._gate.enter():
            ahead, self.engine.runs_ahead = self.engine.runs_ahead, False  # the function waits for one step
            try:
                self._deliver(self._step())
            finally:
                self.engine.runs_ahead = ahead

    def _run(self) -> None:
        pending: deque[Callable[[], object]] = deque()
        try:
            while True:
                with self._changed:
                    idle = self.engine.is_sleeping or self._gate.closed  # and still ends what runs out of time
                    self._changed.wait_for(self._has_work, self.engine.seconds_left() if idle else None)
                    commands, self._commands = self._commands, []
                    stop_now = self._stop == "now"
                    doomed = list(self._handles) if stop_now else []
                pending = deque(commands)
                while pending:
                    pending.popleft()()
                for handle in doomed:
                    self._cancel(handle, EngineUnavailable(SHUTTING_DOWN))
                self._deliver(self._step() if self._gate.enter(anyway=bool(doomed)) else self.engine.take_deltas())
                with self._changed:
                    if stop_now or (self._stop == "drained" and not self._handles):
                        break
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            with self._changed:
                self._commands = [*pending, *self._commands]  # callers wait for them
            self._fail(error)
        finally:
            self._end()

    def _has_work(self) -> bool:
        stopping = self._stop == "now" or (self._stop == "drained" and not self._handles)
        can_step = self.engine.has_work and not self._gate.closed and not self.engine.is_sleeping
        return bool(self._commands) or stopping or can_step

    def _step(self) -> list[Delta]:
        try:
            if not self.engine.has_work:
                return []
            self.step_start = time.perf_counter()
            return self.engine.step()
        finally:
            self._gate.leave()

    def _admit(self, handle: RequestHandle, prompts: list[Prompt], params: list[SamplingParams]) -> None:
        if handle.accepted.done() and not handle.accepted.cancelled():  # the engine has failed meanwhile
            return
        if not handle.accepted.set_running_or_notify_cancel():
            self._finish(handle)
            wake([handle.put(EngineUnavailable("The request was cancelled."))])
            return
        try:
            request_ids = self.engine.submit_batch(prompts, params)
        except Exception as error:
            self._finish(handle)
            self._tell(self.listener.on_failed, handle, error)
            handle.accepted.set_exception(error)
            wake([handle.put(error)])
            return
        self._of_request.update(dict.fromkeys(request_ids, handle))
        self._tell(self.listener.on_accepted, handle)
        handle.accepted.set_result(request_ids)
        if not request_ids:
            self._finish(handle)

    def _cancel(self, handle: RequestHandle, error: Exception | None = None) -> None:
        """Who is told ``error`` finds the request finished: it is raised in the place of the final deltas."""
        if handle.num_unfinished and handle.accepted.done():
            handle.error = error
            for request_id in handle.accepted.result():
                self.engine.cancel(request_id)
            self._deliver(self.engine.take_deltas())

    def _deliver(self, deltas: list[Delta]) -> None:
        """Count first and tell then: who sees a request in ``stats`` no more finds its tokens counted, too."""
        events: list[tuple[RequestHandle, Event]] = []
        stats = self.engine.stats()
        for delta in deltas:
            if (handle := self._of_request.get(delta.request_id)) is None:
                continue
            if delta.finished is not None:
                handle.num_unfinished -= 1
                if not handle.num_unfinished:
                    self._finish(handle)
            self._tell(self.listener.on_delta, handle, delta)
            events.append((handle, delta))
            if handle.error is not None and not handle.num_unfinished:
                events.append((handle, handle.error))
        self._stats = stats
        wake([handle.put(event) for handle, event in events])

    def _finish(self, handle: RequestHandle) -> None:
        handle.num_unfinished = 0
        if handle.accepted.done() and not handle.accepted.cancelled():
            for request_id in handle.accepted.result():
                del self._of_request[request_id]
        with self._changed:
            self._handles.discard(handle)
            self._num_queued -= handle.num_queued
            self._num_bytes -= handle.num_bytes

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self.failure = error
            handles = list(self._handles)
        for handle in handles:
            ended = EngineUnavailable(f"The engine has stopped: {error}")
            self._finish(handle)
            self._tell(self.listener.on_failed, handle, ended)
            with contextlib.suppress(InvalidStateError):  # it was accepted
                handle.accepted.set_exception(ended)
            wake([handle.put(ended)])

    def _tell(self, notify: Callable[..., None], *args: object) -> None:
        """Call the listener. What it raises is printed, and no request waits for it."""
        try:
            notify(*args)
        except Exception:
            traceback.print_exc(file=sys.stderr)

    def _end(self) -> None:
        try:
            if self._close_engine:
                self.engine.close()
        finally:
            with self._changed:
                self._ended = True
                left, self._commands = self._commands, []
                self._changed.notify_all()
        for command in left:
            with contextlib.suppress(Exception):
                command()
        self._tell(self.listener.on_stopped)
