"""transformers' manager of continuous batching with an ``AsyncEngine`` behind it."""

import asyncio
import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, replace
from numbers import Integral
from typing import Any

from torch import nn
from transformers import ContinuousBatchingConfig, ContinuousBatchingManager, GenerationConfig
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from infer_patches.generation_config import SAMPLING, sampling_params
from toolkit import AsyncEngine, Engine, SamplingParams
from toolkit.engine import Delta, EngineListener, RequestHandle
from toolkit.engine.checks import check_int
from toolkit.errors import ToolkitError, must_be_one_of


@dataclass(eq=False)
class ManagedRequest:
    """A request of a manager.

    Args:
        results: of its sequences so far.
        streaming: whether unfinished results are wanted too.
        sampled: whether tokens are sampled, in the place of the most probable ones.
        handle: of its tokens, once submitted.
    """

    results: list[GenerationOutput]
    streaming: bool
    sampled: bool
    handle: RequestHandle | None = None


class EngineManager(ContinuousBatchingManager, EngineListener):
    """transformers' manager with an ``AsyncEngine`` behind it; ``model.init_continuous_batching()`` of a routed model.

    Requests run between ``start`` and ``stop``. Beside transformers' arguments, ``add_request`` takes temperature,
    top_k, top_p, min_p and repetition_penalty of that request alone. A prompt that does not fit comes back as a failed
    result. Cancelling one of a request's sequences cancels them all. An id that is given twice names both requests:
    their results come as each is ready, and cancelling it ends both. After an error in a step, which fails the requests
    of that time, the next request gets a new engine. ``logprobs``, if the configuration asks for them,
    are of the distribution that was sampled from, and come with the finished result.
    """

    def __init__(
        self,
        model: nn.Module,
        generation_config: GenerationConfig,
        config: ContinuousBatchingConfig,
        engine_args: dict[str, Any],
    ) -> None:
        self.model: Any = model
        self.generation_config: Any = generation_config
        self.continuous_batching_config = config
        self.warmed_up = True  # the engine captures its graphs when they are first needed
        self._engine_args = engine_args
        self._engine: Engine | None = None
        self._async_engine: AsyncEngine | None = None
        self._count = 0
        self._requests: dict[RequestHandle, ManagedRequest] = {}
        self._of_id: dict[str, list[ManagedRequest]] = {}  # unfinished; callers may give one id twice
        self._unsubmitted: list[tuple[ManagedRequest, list[int], SamplingParams]] = []  # before ``start``
        self._handlers: dict[str, tuple[Callable[[GenerationOutput], Any], asyncio.AbstractEventLoop]] = {}
        self._results: deque[GenerationOutput] = deque()
        self._state = threading.Condition(threading.RLock())  # guards all of the above
        self._started = self._stopping = False

    @property
    def engine(self) -> Engine:
        """Made when it is first needed, closed by ``stop``."""
        if self._engine is None or self._engine.is_closed:
            self._engine = Engine(self.model, **self._engine_args)
        return self._engine

    def _session(self) -> AsyncEngine:
        """The engine's thread of this session, made when it is first needed."""
        with self._state:
            last = self._async_engine
            if last is not None and last.failure is not None and last.engine is self._engine:
                with contextlib.suppress(Exception):  # what a failed step has left half done is not to be built upon
                    self._engine.close()
            if last is None or last.has_ended or last.failure is not None:
                self._async_engine = AsyncEngine(self.engine, listener=self)
            assert self._async_engine is not None
            return self._async_engine

    def warmup(self) -> None:
        """Make the engine, which needs nothing else."""
        self._session()

    def is_running(self) -> bool:
        return self._async_engine is not None and self._async_engine.is_running

    def start(self) -> None:
        with self._state:
            if self.is_running():
                return
            self._session().start()
            self._started, self._stopping = True, False
            waiting, self._unsubmitted = self._unsubmitted, []
            for request, ids, params in waiting:
                self._submit(request, ids, params)

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """End the thread once all requests are finished; with ``hard_stop`` now, and they have failed."""
        with self._state:
            session = self._async_engine
            if session is not None and session.is_paused:
                raise ToolkitError("the manager is paused; call stop() after the pause.")
            self._started, self._stopping = False, True
        if keep_for_next_session:
            self.model._cached_continuous_batching_manager = self
        if session is not None:
            session.shutdown(
                cancel_requests=hard_stop, close_engine=not keep_for_next_session, wait=block, timeout=timeout
            )

    def on_stopped(self) -> None:
        with self._state:
            self._state.notify_all()

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        session = self._async_engine
        if session is not None:
            session.join(timeout)

    def destroy(self) -> None:
        self.stop(hard_stop=True)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """No step runs inside, so that weights may be written. Several threads pause one after the other."""
        session = self._async_engine
        if session is None or not session.is_running:
            raise ToolkitError("the manager is not running; call start() before a pause.")
        with session.pause():
            yield

    def add_request(
        self,
        input_ids: list[int],
        request_id: str | None = None,
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        eos_token_id: int | list[int] | None = None,
        **sampling: Any,
    ) -> str | None:
        """Queue a prompt; its id, or None where the manager is stopping. Raises ToolkitError for wrong arguments.

        Without ``request_id`` it takes one that no unfinished request has.
        """
        if not isinstance(request_id, Hashable):
            raise ToolkitError(f"request_id must be a string or None, got {request_id!r}.")
        if not isinstance(input_ids, Iterable):
            raise ToolkitError(f"input_ids must be a list of token ids, got {input_ids!r}.")
        unknown = next((name for name in sampling if name not in SAMPLING - {"do_sample"}), None)
        if unknown is not None:
            known = sorted(SAMPLING - {"do_sample"})
            raise ToolkitError(must_be_one_of("a sampling argument of add_request", unknown, known))
        config = self.generation_config
        eos = config.eos_token_id if eos_token_id is None else eos_token_id
        ends = _end_tokens(eos)
        most = config.max_new_tokens if max_new_tokens is None else check_int("max_new_tokens", max_new_tokens, 1)
        count, made_up = config.num_return_sequences or 1, request_id is None
        if sampling:
            config = type(config)(**{**config.to_dict(), **sampling})
        least = config.min_new_tokens or 0
        params = sampling_params(config, ends, most, n=count, min_tokens=min(least, most) if most else least)
        with self._state:
            if self._stopping:
                return None
            while request_id is None or (made_up and request_id in self._of_id):
                request_id, self._count = f"req_{self._count}", self._count + 1
            results = []
            for at in range(count):
                name = request_id if at == 0 else f"{request_id}__child#{at - 1}"
                results.append(GenerationOutput(name, list(input_ids)))
                results[at].timestamps = [] if record_timestamps else None
            request = ManagedRequest(results, streaming, bool(config.do_sample))
            if self._started:
                self._submit(request, list(input_ids), params)
            else:
                self._unsubmitted.append((request, list(input_ids), params))
            for result in results:
                self._of_id.setdefault(result.request_id, []).append(request)
        return request_id

    def _submit(self, request: ManagedRequest, ids: list[int], params: SamplingParams) -> None:
        request.handle = self._session().submit([ids], params)
        self._requests[request.handle] = request

    def add_requests(
        self,
        inputs: list[list[int]],
        max_new_tokens: int | None = None,
        streaming: bool = False,
        record_timestamps: bool = False,
        **sampling: Any,
    ) -> list[str]:
        settings: dict[str, Any] = {
            "max_new_tokens": max_new_tokens,
            "streaming": streaming,
            "record_timestamps": record_timestamps,
            **sampling,
        }
        added = [self.add_request(ids, **settings) for ids in inputs]
        return [one for one in added if one is not None]

    def cancel_request(self, request_id: str) -> None:
        """End a request; what it had comes back as a failed result. An id of no unfinished request does nothing."""
        with self._state:
            for request in list(self._of_id.get(request_id, ())):
                if request.handle is not None:
                    request.handle.cancel()
                    continue
                self._unsubmitted = [one for one in self._unsubmitted if one[0] is not request]
                for result in request.results:
                    self._end(request, result, RequestStatus.FAILED, "cancelled")

    def get_result(self, request_id: str | None = None, timeout: float | None = None) -> GenerationOutput | None:
        """The oldest result, or the oldest of one request; None after ``timeout`` seconds or when none can come."""
        with self._state:
            end = None if timeout is None else time.monotonic() + timeout
            while True:
                for at, result in enumerate(self._results):
                    if request_id in (None, result.request_id):
                        del self._results[at]
                        return result
                left = None if end is None else end - time.monotonic()
                if not self._may_come(request_id) or (left is not None and left <= 0):
                    return None
                self._state.wait(left)

    def _may_come(self, request_id: str | None) -> bool:
        """Whether a result can follow. Another thread may have taken the last one of a request."""
        return self.is_running() and (request_id is None or request_id in self._of_id)

    def __iter__(self) -> Iterator[GenerationOutput]:
        """Results as they come, until the manager stops."""
        while (result := self.get_result()) is not None:
            yield result

    def request_id_iter(self, request_id: str) -> Iterator[GenerationOutput]:  # type: ignore[override]
        """Results of one request as they come, until it is finished."""
        while (result := self.get_result(request_id)) is not None:
            yield result
            if result.is_finished():
                return

    def register_result_handler(self, request_id: str, callback: Callable[[GenerationOutput], Any]) -> None:
        """Call ``callback`` on the running event loop with each result of a request, in the place of ``get_result``."""
        with self._state:
            self._handlers[request_id] = callback, asyncio.get_running_loop()

    def on_delta(self, handle: RequestHandle, delta: Delta) -> None:
        """Add a delta to its result, and hand that over where it is wanted."""
        with self._state:
            request = self._requests[handle]
            result, now = request.results[delta.index], time.perf_counter()
            if result.status is RequestStatus.PENDING:
                result.status, result.lifespan = RequestStatus.DECODING, (self._session().step_start, -1)
            result.generated_tokens += delta.token_ids
            if result.timestamps is not None:
                result.timestamps += [now] * len(delta.token_ids)
            finished = delta.finished
            if finished is None:
                if request.streaming:
                    self._deliver(_snapshot(result))
                return
            if self.continuous_batching_config.return_logprobs:
                result.logprobs = finished.sampling_logprobs if request.sampled else finished.logprobs
            failed = finished.finish_reason in ("error", "cancelled")
            why = finished.error or finished.finish_reason
            status = RequestStatus.FAILED if failed else RequestStatus.FINISHED
            self._end(request, result, status, why if failed else None)
            if not handle.num_unfinished:
                del self._requests[handle]

    def on_failed(self, handle: RequestHandle, error: Exception) -> None:
        """The results of a request that the engine did not accept, or could not finish."""
        with self._state:
            request = self._requests.pop(handle)
            for result in request.results:
                if not result.is_finished():
                    self._end(request, result, RequestStatus.FAILED, str(error))

    def _end(self, request: ManagedRequest, result: GenerationOutput, status: RequestStatus, error: str | None) -> None:
        result.status, result.error = status, error
        result.lifespan = (result.lifespan[0], time.perf_counter())
        others = [one for one in self._of_id.pop(result.request_id) if one is not request]
        if others:
            self._of_id[result.request_id] = others
        self._deliver(result)

    def _deliver(self, result: GenerationOutput) -> None:
        handler = self._handlers.get(result.request_id)
        if handler is None:
            self._results.append(result)
            self._state.notify_all()
            return
        callback, loop = handler
        if result.request_id not in self._of_id:  # that was the last one
            del self._handlers[result.request_id]
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(callback, result)


def _end_tokens(eos: Any) -> list[int]:
    """End tokens as transformers takes them: one or several, where those below 0 mean none."""
    given = list(eos) if isinstance(eos, list | tuple) else [eos]
    for one in given:
        if one is not None and (isinstance(one, bool) or not isinstance(one, Integral)):
            raise ToolkitError(f"eos_token_id must be a token id, a list of them or None, got {eos!r}.")
    return [int(one) for one in given if one is not None and one >= 0]


def _snapshot(result: GenerationOutput) -> GenerationOutput:
    times = None if result.timestamps is None else result.timestamps[:]
    return replace(result, generated_tokens=result.generated_tokens[:], timestamps=times)
