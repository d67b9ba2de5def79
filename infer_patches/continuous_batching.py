"""transformers' continuous batching on the engine: ``generate_batch``, ``init_continuous_batching`` and their managers.

    toolkit.patch(model)
    with route_continuous_batching(model):
        results = model.generate_batch(prompts, generation_config=GenerationConfig(max_new_tokens=64))

The seam is ``init_continuous_batching``, from which transformers' other entry points take their manager. Results are
its ``GenerationOutput``.
"""

import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from torch import nn
from transformers import ContinuousBatchingConfig, ContinuousBatchingManager
from transformers.generation.continuous_batching.requests import GenerationOutput, RequestStatus

from infer_patches.generation_config import SAMPLING, refuse_unsupported, sampling_params
from infer_patches.route import Route
from toolkit import Engine
from toolkit.engine import Delta, Limits
from toolkit.errors import ToolkitError

_HONOURED = SAMPLING | {"max_new_tokens", "min_new_tokens", "eos_token_id", "pad_token_id", "num_return_sequences"}
_LIMITS = {
    "page_size": "block_size",
    "num_blocks": "num_blocks",
    "max_batch_tokens": "max_num_batched_tokens",
    "max_requests_per_batch": "max_num_seqs",
    "allow_block_sharing": "enable_prefix_caching",
    "seed": "seed",
}
"""Fields of a ContinuousBatchingConfig, and the engine's limits that they are."""


class Asked:
    """One request as it goes on: what was asked, and the results of its sequences so far."""

    def __init__(self, results: list[GenerationOutput], streaming: bool, drawn: bool) -> None:
        self.results = results
        self.streaming = streaming
        self.drawn = drawn


class EngineManager(ContinuousBatchingManager):
    """transformers' manager with the engine behind it; made by ``model.init_continuous_batching()`` of a routed model.

    Requests run on a thread of its own between ``start`` and ``stop``. Beside transformers' arguments, ``add_request``
    takes temperature, top_k, top_p, min_p and repetition_penalty of that request alone. A prompt that does not fit
    comes back as a failed result. Cancelling one of a request's sequences cancels them all. ``logprobs``, if the
    configuration asks for them, are of the distribution that was drawn from, and come with the finished result.
    """

    def __init__(self, model: nn.Module, generation_config: Any, config: Any, limits: dict[str, Any]) -> None:
        self.model: Any = model
        self.generation_config = generation_config
        self.continuous_batching_config = config
        self.warmed_up = True  # the engine makes its programs when they are first needed
        self._limits = limits
        self._engine: Engine | None = None
        self._thread: threading.Thread | None = None
        self._count = 0
        self._asked: dict[int, Asked] = {}
        self._ids: dict[str, int] = {}
        self._handlers: dict[str, tuple[Callable[[GenerationOutput], Any], Any]] = {}
        self._results: deque[GenerationOutput] = deque()
        self._state = threading.Condition(threading.RLock())  # guards all of the above and the four below
        self._stopping = False
        self._hard = False
        self._keep = False
        self._pauses = 0
        self._stepping = threading.Lock()

    @property
    def engine(self) -> Engine:
        """Made when it is first needed, closed by ``stop``."""
        if self._engine is None:
            self._engine = Engine(self.model, **self._limits)
        return self._engine

    def warmup(self) -> None:
        """Make the engine, which needs nothing else."""
        with self._state:
            assert self.engine is not None

    def is_running(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self) -> None:
        with self._state:
            if self.is_running():
                return
            self.warmup()
            self._stopping = self._hard = False
            self._thread = threading.Thread(target=self._loop, name="toolkit-continuous-batching")
            self._thread.start()

    def stop(
        self,
        block: bool = True,
        timeout: float | None = None,
        keep_for_next_session: bool = False,
        hard_stop: bool = False,
    ) -> None:
        """End the thread once all requests are finished; with ``hard_stop`` now, and they have failed."""
        with self._state:
            if self._pauses:
                raise ToolkitError("the manager is paused; allowed is stop() after the pause.")
            thread, self._stopping = self._thread, True
            self._hard, self._keep = self._hard or hard_stop, keep_for_next_session
            self._state.notify_all()
        if keep_for_next_session:
            self.model._cached_continuous_batching_manager = self
        if thread is not None and block:
            self.join(time.perf_counter(), timeout)
        if not self.is_running():
            self._close()

    def join(self, stop_trigger_time: float, timeout: float | None = None) -> None:
        if self._thread is not None:
            self._thread.join(timeout)

    def destroy(self) -> None:
        self.stop(hard_stop=True)

    def _close(self) -> None:
        with self._state:
            if self._engine is not None and not self._keep:
                self._engine.close()
                self._engine = None

    @contextmanager
    def pause(self) -> Iterator[None]:
        """No step runs inside, so that weights may be written. Several threads pause one after the other."""
        if not self.is_running():
            raise ToolkitError("the manager is not running; allowed is a pause between start() and stop().")
        with self._state:
            self._pauses += 1
        try:
            with self._stepping:
                yield
        finally:
            with self._state:
                self._pauses -= 1
                self._state.notify_all()

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
        """Queue a prompt; its id, or None where the manager is stopping. Raises ToolkitError for unknown arguments."""
        unknown = next((name for name in sampling if name not in SAMPLING - {"do_sample"}), None)
        if unknown is not None:
            allowed = ", ".join(sorted(SAMPLING - {"do_sample"}))
            raise ToolkitError(f"{unknown!r} is not an argument of add_request on the engine; allowed are {allowed}.")
        config = self.generation_config
        eos = config.eos_token_id if eos_token_id is None else eos_token_id
        ends = [one for one in (eos if isinstance(eos, list) else [eos]) if one is not None and one >= 0]
        most = config.max_new_tokens if max_new_tokens is None else max_new_tokens
        count = config.num_return_sequences or 1
        if sampling:
            config = type(config)(**{**config.to_dict(), **sampling})
        least = config.min_new_tokens or 0
        params = sampling_params(config, ends, most, n=count, min_tokens=min(least, most) if most else least)
        with self._state:
            if self._stopping:
                return None
            if request_id is None:
                request_id, self._count = f"req_{self._count}", self._count + 1
            results = []
            for at in range(count):
                name = request_id if at == 0 else f"{request_id}__child#{at - 1}"
                results.append(GenerationOutput(name, list(input_ids)))
                results[at].timestamps = [] if record_timestamps else None
            asked = Asked(results, streaming, bool(config.do_sample))
            try:
                number = self.engine.submit(list(input_ids), params)
            except ToolkitError as error:
                for result in results:
                    self._end(result, RequestStatus.FAILED, str(error))
                return request_id
            self._asked[number] = asked
            self._ids |= {result.request_id: number for result in results}
            self._state.notify_all()
        return request_id

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
        """End a request; what it had comes back as a failed result."""
        with self._state:
            number = self._ids.get(request_id)
        if number is not None:
            self.engine.cancel(number)

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
                if not self.is_running() or (left is not None and left <= 0):
                    return None
                self._state.wait(left)

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
        import asyncio

        with self._state:
            self._handlers[request_id] = callback, asyncio.get_running_loop()

    def _loop(self) -> None:
        try:
            while True:
                with self._state:
                    self._state.wait_for(lambda: self._stopping or (self._asked and not self._pauses))
                    if self._stopping and (self._hard or not self._asked):
                        return
                    if self._pauses:
                        self._state.wait(0.01)
                        continue
                with self._stepping:
                    began = time.perf_counter()
                    deltas = self.engine.step()
                with self._state:
                    for delta in deltas:
                        self._take(delta, began)
        finally:
            with self._state:
                for number in list(self._asked):
                    self.engine.cancel(number)
                for delta in self.engine.step():
                    self._take(delta, time.perf_counter())
                self._close()
                self._state.notify_all()

    def _take(self, delta: Delta, began: float) -> None:
        """Add what a step brought to its result, and hand it over where it is wanted. Under ``_state``."""
        asked = self._asked.get(delta.request_id)
        if asked is None:
            return
        result, now = asked.results[delta.index], time.perf_counter()
        if result.status is RequestStatus.PENDING:
            result.status, result.lifespan = RequestStatus.DECODING, (began, -1)
        result.generated_tokens += delta.token_ids
        if result.timestamps is not None:
            result.timestamps += [now] * len(delta.token_ids)
        finished = delta.finished
        if finished is None:
            if asked.streaming:
                self._deliver(_snapshot(result))
            return
        if self.continuous_batching_config.return_logprobs:
            result.logprobs = finished.sampling_logprobs if asked.drawn else finished.logprobs
        failed = finished.finish_reason in ("error", "cancelled")
        why = finished.error or finished.finish_reason
        self._end(result, RequestStatus.FAILED if failed else RequestStatus.FINISHED, why if failed else None)
        del self._ids[result.request_id]
        if all(one.is_finished() for one in asked.results):
            del self._asked[delta.request_id]

    def _end(self, result: GenerationOutput, status: RequestStatus, error: str | None) -> None:
        result.status, result.error = status, error
        result.lifespan = (result.lifespan[0], time.perf_counter())
        self._deliver(result)

    def _deliver(self, result: GenerationOutput) -> None:
        handler = self._handlers.get(result.request_id)
        if handler is None:
            self._results.append(result)
            self._state.notify_all()
            return
        callback, loop = handler
        if result.is_finished():
            del self._handlers[result.request_id]
        loop.call_soon_threadsafe(callback, result)


def _snapshot(result: GenerationOutput) -> GenerationOutput:
    times = None if result.timestamps is None else result.timestamps[:]
    return replace(result, generated_tokens=result.generated_tokens[:], timestamps=times)


class ContinuousBatchingRoute(Route):
    """A model's continuous batching on its way to engines with ``limits``."""

    def __init__(self, model: Any, limits: dict[str, Any]) -> None:
        Limits.check(**limits)
        super().__init__(model, init_continuous_batching, generate_batch)
        self.limits = limits

    def undo(self) -> None:
        model: Any = self._model()
        super().undo()
        if model is not None:
            model.destroy_cached_continuous_batching_manager()


def init_continuous_batching(
    self: Any,
    generation_config: Any = None,
    continuous_batching_config: Any = None,
    workload_hints: Any = None,
) -> ContinuousBatchingManager:
    """As a routed model has it; a copy of such a model runs transformers' own."""
    given = generation_config, continuous_batching_config, workload_hints
    route = ContinuousBatchingRoute.of.get(self)
    if route is None:
        return type(self).init_continuous_batching(self, *given)
    kept = getattr(self, "_cached_continuous_batching_manager", None)
    if isinstance(kept, EngineManager):
        return kept
    config = generation_config if generation_config is not None else self.generation_config
    refuse_unsupported(config, _HONOURED)
    sizes, usual = continuous_batching_config or ContinuousBatchingConfig(), ContinuousBatchingConfig()
    if sizes.max_queue_size:
        raise ToolkitError(f"max_queue_size is {sizes.max_queue_size}, which the engine does not do; allowed is 0.")
    asked = {
        ours: getattr(sizes, theirs)
        for theirs, ours in _LIMITS.items()
        if getattr(sizes, theirs) != getattr(usual, theirs)
    }
    return EngineManager(self, config, sizes, {**route.limits, **asked})


def generate_batch(self: Any, *args: Any, **kwargs: Any) -> dict[str, GenerationOutput]:
    """transformers' own, by way of the manager above; an argument that it would pass over is refused."""
    known = inspect.signature(type(self).generate_batch).parameters
    unknown = next((name for name in kwargs if name not in known and name != "max_new_tokens"), None)
    if self in ContinuousBatchingRoute.of and unknown is not None:
        raise ToolkitError(
            f"{unknown!r} is not an argument of generate_batch; allowed are its own and max_new_tokens, and the fields "
            "of generation_config."
        )
    return type(self).generate_batch(self, *args, **kwargs)


def route_continuous_batching(model: nn.Module, **limits: Any) -> ContinuousBatchingRoute:
    """Let continuous batching of a patched causal LM run on engines with ``limits`` (``toolkit.engine.Limits``).

    Until ``undo()`` of the result, which also ends a manager that was kept. Of a GenerationConfig these fields are
    honoured: max_new_tokens, min_new_tokens, do_sample, temperature, top_k, top_p, min_p, repetition_penalty,
    eos_token_id, num_return_sequences; others are refused by name. Of a ContinuousBatchingConfig: page_size,
    num_blocks, max_batch_tokens, max_requests_per_batch, allow_block_sharing, seed (which go before ``limits``) and
    return_logprobs; the rest says how transformers goes about it. None is off, as it is there.

    Raises ToolkitError for a model that is not patched, or is routed already, and for limits that are not allowed.
    """
    return ContinuousBatchingRoute(model, limits)
