"""The thread that gives the engine training work, a bounded part between two steps, and each tenant its turn."""

import threading
from collections import deque
from functools import partial

from torch import nn

from toolkit.engine import AsyncEngine
from toolkit.live.gradients import Outcome, Part, run_parts
from toolkit.live.jobs import Job
from toolkit.live.lending import Lending


class Worker:
    """Runs jobs of lanes: a lane's in order, one at a time, and the lanes in turn.

    Micro-batches of several lanes are one batch while they have at most ``micro_batch_tokens`` tokens together, or
    twice as many where no decode step waits. Which ones changes no number: each gives what it gives alone. A
    micro-batch that shares prefixes is a batch alone.

    Args:
        engine: whose thread runs them.
        model: the engine's.
        micro_batch_tokens: of a request's parts.
        max_wait: seconds between the tokens of a stream within which batches let decode steps run; None for between
            batches only.
    """

    def __init__(self, engine: AsyncEngine, model: nn.Module, micro_batch_tokens: int, max_wait: float | None) -> None:
        self._engine, self._model, self._micro_batch_tokens = engine, model, micro_batch_tokens
        self._lending = None if max_wait is None else Lending(engine, max_wait)
        self._changed = threading.Condition()
        self._lanes: dict[str, deque[Job]] = {}
        self._turns: deque[str] = deque()  # lanes with jobs, the next one first
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="training", daemon=True)

    def start(self) -> None:
        """Start the thread. Does nothing when it was started."""
        with self._changed:
            if self._thread.ident is None and not self._closed:
                self._thread.start()

    def close(self) -> None:
        """End the thread after the part that it runs. Jobs that are left are cancelled."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread.ident is not None:
            self._thread.join()
        if self._lending is not None:
            self._lending.close()
        for lane in self._lanes.values():
            for job in lane:
                job.future.cancel()

    def add(self, lane: str, job: Job) -> None:
        """Run a job after those of its lane."""
        with self._changed:
            if self._closed:
                job.future.cancel()
                return
            jobs = self._lanes.setdefault(lane, deque())
            jobs.append(job)
            if len(jobs) == 1:
                self._turns.append(lane)
            self._changed.notify_all()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._turns or self._closed)
                if self._closed:
                    return
                ready = [(lane, self._lanes[lane][0]) for lane in self._turns]
                self._turns.rotate(-1)
            self._run_next(ready)

    def _run_next(self, ready: list[tuple[str, Job]]) -> None:
        """The next part of the first job, and micro-batches of others beside its micro-batch."""
        (lane, job), *others = ready
        try:
            part = job.part()
            if part is None:
                result = self._engine.call(job.finish) if job.on_engine else job.finish()
                if job.then is not None:
                    job.then()
                self._end(lane)
                job.future.set_result(result)
                return
        except Exception as error:
            self._fail(lane, job, error)
            return
        chosen = [(lane, job, part), *self._beside(part, others)]
        if not self._run_batch(chosen) and len(chosen) > 1:
            for one in chosen:  # whose fault it was
                self._run_batch([one])

    def _run_batch(self, chosen: list[tuple[str, Job, Part]]) -> bool:
        """Run micro-batches as one batch; False where that failed. One that is alone fails with its job."""
        try:
            outcomes = self._outcomes([part for _, _, part in chosen])
        except Exception as error:
            if len(chosen) == 1:
                self._fail(*chosen[0][:2], error)
            return False
        for (_, job, _), outcome in zip(chosen, outcomes):
            job.take(outcome)
        return True

    def _outcomes(self, parts: list[Part]) -> list[Outcome]:
        if self._lending is None:
            return self._engine.call(lambda: run_parts(self._model, parts))
        size = sum(part.micro_batch.num_tokens for part in parts)
        return self._lending.run(lambda border: run_parts(self._model, parts, partial(border, "head")), size)

    def _beside(self, first: Part, others: list[tuple[str, Job]]) -> list[tuple[str, Job, Part]]:
        found: list[tuple[str, Job, Part]] = []
        most = self._micro_batch_tokens * (1 if self._engine.engine.has_work else 2)
        room = 0 if first.micro_batch.shares else most - first.micro_batch.num_tokens
        for lane, job in others:
            try:
                part = job.part()
            except Exception:
                continue  # in its own turn it ends with this error
            if part is not None and not part.micro_batch.shares and part.micro_batch.num_tokens <= room:
                room -= part.micro_batch.num_tokens
                found.append((lane, job, part))
        return found

    def _fail(self, lane: str, job: Job, error: Exception) -> None:
        self._end(lane)
        job.future.set_exception(error)

    def _end(self, lane: str) -> None:
        """Take the lane's first job away, before its future says how it ended."""
        with self._changed:
            jobs = self._lanes[lane]
            jobs.popleft()
            if not jobs:
                del self._lanes[lane]
                self._turns.remove(lane)
