"""The requests that an engine has: queued, delivered to, ended when they are cancelled, fail or run out of time."""

import heapq
import time
from collections.abc import Callable, Mapping

from toolkit.engine.adapters import ModelAdapters
from toolkit.engine.backend import Backend
from toolkit.engine.outputs import Delta, FinishReason, whole
from toolkit.engine.request import Request, Sequence
from toolkit.engine.scheduler import Scheduler
from toolkit.engine.speculation.speculation import Speculation
from toolkit.state import StatePool


class LiveRequests:
    """Requests that wait or run.

    Args:
        backend: the model. Where it is split over ranks, the first one says what is out of time.
        scheduler: that runs them.
        pool: of their state.
        speculation: that drafts for them; None for none.
        adapters: that they choose; None for none.

    Attributes:
        by_id: those that are not finished.
        pending: deltas of those that have no sink, until ``take``.
    """

    def __init__(
        self,
        backend: Backend,
        scheduler: Scheduler,
        pool: StatePool,
        speculation: Speculation | None,
        adapters: ModelAdapters | None = None,
    ) -> None:
        self.by_id: dict[int, Request] = {}
        self.pending: list[Delta] = []
        self._scheduler = scheduler
        self._pool: StatePool | None = pool
        self._speculation = speculation
        self._adapters = adapters
        self._agree: Callable[[list[int]], list[int]] = getattr(backend, "agree", list)
        self._deadlines: list[tuple[float, int]] = []

    @property
    def media_bytes(self) -> int:
        """Bytes of their pictures."""
        return sum(one.media.num_bytes for one in self.by_id.values() if one.media is not None)

    def add(self, request: Request, error: str | None = None) -> None:
        """Queue a request; with ``error``, end it with that. Its time begins."""
        self.by_id[request.request_id] = request
        if self._adapters is not None:
            self._adapters.enter(request.params.lora_name)
        if error is not None:
            self.end(request, "error", error)
            return
        if request.params.timeout is not None:
            heapq.heappush(self._deadlines, (time.monotonic() + request.params.timeout, request.request_id))
        self._scheduler.add(request)

    def take(self) -> list[Delta]:
        """The pending deltas, which are pending no more."""
        taken, self.pending = self.pending, []
        return taken

    def deliver(self, sequence: Sequence, delta: Delta) -> None:
        """Hand over what a sequence has grown by, or its end. Of ``best_of`` candidates the best, at the last one's."""
        request = sequence.request
        if delta.finished is not None:
            if sequence.block_tables is not None and self._pool is not None:
                held = [part.blocks for part in sequence.block_tables.parts], sequence.block_tables.length
                delta.finished.routed_experts = self._pool.recorded("record_routing", *held)
                delta.finished.selected_keys = self._pool.recorded("record_selection", *held)
            self._scheduler.remove(sequence)
            if self._speculation is not None:
                self._speculation.drafter.observe(sequence)
            if request.finished:
                self._forget(request)
        deltas = [delta]
        if request.params.chooses:
            deltas = [whole(one) for one in request.completions] if request.finished else []
        (self.pending if request.sink is None else request.sink).extend(deltas)

    def _forget(self, request: Request) -> None:
        if self.by_id.pop(request.request_id, None) is not None and self._adapters is not None:
            self._adapters.leave(request.params.lora_name)

    def end(self, request: Request, reason: FinishReason, error: str | None = None) -> None:
        """End what is unfinished of a request."""
        for sequence in request.sequences:
            if sequence.completion is None:
                self.deliver(sequence, sequence.finish(reason, error=error))

    def seconds_left(self) -> float | None:
        """Seconds until the first of them runs out of time, 0 where it has; None where none does."""
        while self._deadlines and self._deadlines[0][1] not in self.by_id:
            heapq.heappop(self._deadlines)
        return max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None

    def end_expired(self) -> None:
        """End those that ran out of time, with "timeout"."""
        if self.seconds_left() is None:
            return
        expired = []
        while self.seconds_left() == 0:
            expired.append(heapq.heappop(self._deadlines))
        for request_id in self._agree([request_id for _, request_id in expired]):
            self.end(self.by_id[request_id], "timeout")
        for entry in expired:
            if entry[1] in self.by_id:  # on the first rank's clock there is time left
                heapq.heappush(self._deadlines, entry)

    def bring_adapters(self, see_weights: Callable[[], object]) -> None:
        """Put the adapters that the next step needs into the model; requests end whose adapter is not there.

        Args:
            see_weights: looks at what the weights are now.
        """
        if self._adapters is None:
            see_weights()
            return
        self._end_without(self._adapters.prepare())
        see_weights()
        table = self._adapters.table
        self._end_without(self._adapters.lost())
        if self._adapters.table is not table:
            see_weights()

    def _end_without(self, adapters: Mapping[str, str]) -> None:
        """End requests that have chosen one of ``adapters``, for the reason that it has there."""
        for request in list(self.by_id.values()) if adapters else ():
            name = request.params.lora_name
            if name is not None and name in adapters:
                self.end(request, "error", adapters[name])

    def close(self) -> None:
        """Cancel them all, and let go of the pool."""
        for request in list(self.by_id.values()):
            self.end(request, "cancelled")
        self._pool, self._agree = None, list
