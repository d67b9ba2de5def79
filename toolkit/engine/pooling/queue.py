"""The one thread boundary of a ``PoolingEngine``: a thread that packs what waits, of all requests, into forwards."""

import contextlib
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from dataclasses import dataclass, field
from typing import Any, TypeVar

from toolkit.engine.pooling.engine import Pooled, PoolingEngine, PoolingInput
from toolkit.engine.pooling.params import PoolingParams
from toolkit.engine.request_handle import SHUTTING_DOWN, EngineUnavailable
from toolkit.engine.step_gate import Gated, StepGate

Result = TypeVar("Result")


class PoolingRequest(Future[list[Pooled]]):
    """The results of a request's sequences, in order.

    Args:
        count: of the sequences.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self._count = count

    @property
    def num_unfinished(self) -> int:
        """Sequences that somebody waits for."""
        return 0 if self.done() else self._count


@dataclass(eq=False)
class _Job:
    """One request: its sequences, which of them have a result, and who waits for all of them."""

    inputs: Sequence[PoolingInput]
    params: PoolingParams
    future: PoolingRequest
    found: dict[int, Pooled] = field(default_factory=dict)


class PoolingQueue(Gated):
    """A ``PoolingEngine`` on a thread: requests may come from any number of threads and event loops.

    Each forward takes as many waiting sequences as it has room for, in the order in which they came.

    Args:
        engine: which must not be used otherwise until ``shutdown``.
        max_queued_seqs: most sequences that wait or run; ``submit`` raises beyond. None for no bound.

    Attributes:
        failure: what ended the thread, if it has failed.
        draining: whether new requests are rejected.
    """

    engine: PoolingEngine

    def __init__(self, engine: PoolingEngine, *, max_queued_seqs: int | None = None) -> None:
        self.engine = engine
        self.max_queued_seqs = max_queued_seqs
        self.failure: BaseException | None = None
        self.draining = False
        self._changed = threading.Condition()  # guards all below
        self._waiting: deque[tuple[_Job, int]] = deque()
        self._running: list[tuple[_Job, int]] = []
        self._commands: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._gate = StepGate(self._changed)
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="pooling", daemon=True)

    def start(self) -> None:
        """Start the thread. Does nothing when it was started."""
        with self._changed:
            if self._thread.ident is None and not self._ended:
                self._thread.start()

    def submit(self, inputs: Sequence[PoolingInput], params: PoolingParams, name: str = "prompt") -> PoolingRequest:
        """Queue sequences, all or none. The future's result is theirs, in order; cancelled, it takes no more forwards.

        Args:
            inputs: the sequences.
            params: of all.
            name: of a sequence, for errors.

        Raises:
            EngineUnavailable: at the limit, or when it is shutting down.
            ToolkitError: for a sequence or parameters that do not fit.
        """
        self.engine.check(params)
        for one in inputs:
            self.engine.check_input(one, name)
        job = _Job(inputs, params, PoolingRequest(len(inputs)))
        with self._changed:
            if self.failure is not None:
                raise EngineUnavailable(f"The engine has stopped: {self.failure}")
            if self.draining:
                raise EngineUnavailable(SHUTTING_DOWN)
            most = self.max_queued_seqs
            if most is not None and self._num_queued() + len(inputs) > most:
                raise EngineUnavailable(f"The engine is at its limit of {most} sequences; try again later.")
            self._waiting.extend((job, at) for at in range(len(inputs)))
            self._changed.notify_all()
            self.start()
        if not inputs:
            job.future.set_result([])
        return job.future

    def stats(self) -> dict[str, float]:
        """num_requests_running and num_requests_waiting, in sequences, and weight_version."""
        with self._changed:
            running = len(self._running)
            waiting, version = self._num_queued() - running, self.engine.weight_version
        return {"num_requests_running": running, "num_requests_waiting": waiting, "weight_version": version}

    @property
    def has_requests(self) -> bool:
        """Whether any sequence waits or runs."""
        with self._changed:
            return self._num_queued() > 0

    def call(self, function: Callable[[], Result]) -> Result:
        """What ``function`` returns on the thread, between two forwards. Waits for it."""
        done: Future[Result] = Future()
        with self._changed:
            if self._ended or self.failure is not None:
                raise EngineUnavailable("The engine's thread has ended.")
            self._commands.append((function, done))
            self._changed.notify_all()
            self.start()
        return done.result()

    def cancel_handle(self, handle: PoolingRequest, error: Exception | None = None) -> None:
        """End a request, with ``error`` where there is one."""
        if error is None:
            handle.cancel()
        else:
            _give(handle, error)

    def _num_queued(self) -> int:
        """Sequences that wait or run; those whose request was cancelled wait no more."""
        self._waiting = deque(one for one in self._waiting if not one[0].future.done())
        return len(self._waiting) + len(self._running)

    def cancel_all(self, error: Exception) -> None:
        """End all requests with ``error``."""
        with self._changed:
            jobs = [job for job, _ in (*self._waiting, *self._running)]
            self._waiting.clear()
        for job in dict.fromkeys(jobs):
            _give(job.future, error)

    def shutdown(self, *, close_engine: bool = True, timeout: float | None = None) -> bool:
        """End the thread once its forward has ended, and return whether it has. Requests that wait end.

        Args:
            close_engine: there is nothing to close; for callers of ``AsyncEngine.shutdown``.
            timeout: seconds to wait; None for no bound.
        """
        with self._changed:
            self.draining = self._ended = True
            started = self._thread.ident is not None
            self._changed.notify_all()
        self.cancel_all(EngineUnavailable(SHUTTING_DOWN))
        if started:
            self._thread.join(timeout)
        return not self._thread.is_alive()

    def join(self, timeout: float | None = None) -> None:
        """Wait until the thread has ended, or for ``timeout`` seconds."""
        if self._thread.ident is not None:
            self._thread.join(timeout)

    # What follows runs on the thread.

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    self._changed.wait_for(self._has_work)
                    if self._ended:
                        return
                    commands, self._commands = self._commands, []
                for function, done in commands:
                    _do(function, done)
                if self._gate.enter():
                    try:
                        self._step()
                    finally:
                        self._gate.leave()
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            self.failure = error
            self.cancel_all(EngineUnavailable(f"The engine has stopped: {error}"))
        finally:
            with self._changed:
                left, self._commands = self._commands, []
            for _, done in left:
                done.set_exception(EngineUnavailable("The engine's thread has ended."))

    def _has_work(self) -> bool:
        may_run = not self._gate.closed and not self.engine.is_sleeping
        return self._ended or bool(self._commands) or (bool(self._waiting) and may_run)

    def _step(self) -> None:
        """A forward of what waits."""
        if self.engine.is_sleeping:
            return
        with self._changed:
            self._running = self._take()
        results = self._forward(self._running) if self._running else {}
        with self._changed:
            self._running = []
        for job, result in results.items():  # who has one finds its sequences queued no more
            _give(job.future, result)

    def _take(self) -> list[tuple[_Job, int]]:
        """The next sequences that fit into one forward, those of cancelled requests left out."""
        taken: list[tuple[_Job, int]] = []
        config, room = self.engine.config, self.engine.config.max_num_batched_tokens
        while self._waiting and len(taken) < config.max_num_seqs:
            job, at = self._waiting[0]
            if not job.future.done():
                room -= len(job.inputs[at].token_ids)
                if taken and room < 0:
                    break
                taken.append((job, at))
            self._waiting.popleft()
        return taken

    def _forward(self, taken: list[tuple[_Job, int]]) -> dict[_Job, list[Pooled] | Exception]:
        """What has ended with a forward of these sequences, and how."""
        try:
            results = self.engine.pool([job.inputs[at] for job, at in taken], [job.params for job, _ in taken])
        except Exception as error:  # there is no state: what fails fails alone
            traceback.print_exc(file=sys.stderr)
            return {job: error for job, _ in taken}
        for (job, at), result in zip(taken, results, strict=True):
            job.found[at] = result
        whole = [job for job in dict.fromkeys(job for job, _ in taken) if len(job.found) == len(job.inputs)]
        return {job: [job.found[index] for index in range(len(job.inputs))] for job in whole}


def _do(function: Callable[[], Any], done: "Future[Any]") -> None:
    try:
        done.set_result(function())
    except Exception as error:
        done.set_exception(error)


def _give(future: "Future[list[Pooled]]", result: list[Pooled] | Exception) -> None:
    """End a future, unless whoever waits for it has left."""
    with contextlib.suppress(InvalidStateError):
        if isinstance(result, Exception):
            future.set_exception(result)
        else:
            future.set_result(result)
