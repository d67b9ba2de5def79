"""Runs the lines of batches against the application, so many at a time."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import BinaryIO

from starlette.types import ASGIApp

from toolkit.serving.base import ServerConfig
from toolkit.serving.batches.calls import post
from toolkit.serving.batches.lines import Line, failure, result, written
from toolkit.serving.errors import Json

RETRIED = (429, 503)
"""Statuses of a server that is busy."""
RETRY_AFTER = 1.0
"""Seconds until a busy server is asked again, where it does not say."""


@dataclass
class Counts:
    """Requests of a batch that have ended."""

    completed: int = 0
    failed: int = 0


class BatchRunner:
    """Makes the requests of all batches of an application.

    Args:
        app: that takes them.
        config: of the application. As many requests run as sequences fit in a step, at most half of what may wait.
    """

    def __init__(self, app: ASGIApp, config: ServerConfig) -> None:
        self._app, self._engine = app, config.engine
        keys = [config.api_key] if isinstance(config.api_key, str) else list(config.api_key or ())
        self._headers = [(b"authorization", b"Bearer " + keys[0].strip().encode())] if keys else []
        waiting, most = config.engine.max_queued_seqs, config.engine.engine.config.max_num_seqs
        self.concurrency = most if waiting is None else max(1, min(most, waiting // 2))
        self._room = asyncio.Semaphore(self.concurrency)

    async def run(
        self, lines: Iterable[Line], output: BinaryIO, errors: BinaryIO, counts: Counts,
        step: Callable[[Line], None] = lambda line: None,
    ) -> None:  # fmt: skip
        """Make requests in order, and write results as they come.

        Args:
            lines: the requests.
            output: of responses.
            errors: of responses that are no success.
            counts: are moved.
            step: is called with each line that has ended.
        """
        left = iter(lines)
        async with asyncio.TaskGroup() as group:
            for _ in range(self.concurrency):
                group.create_task(self._work(left, output, errors, counts, step))

    async def _work(
        self, left: Iterator[Line], output: BinaryIO, errors: BinaryIO, counts: Counts, step: Callable[[Line], None]
    ) -> None:
        for line in left:
            async with self._room:
                found, good = await self._result(line)
            (output if good else errors).write(written(found))
            counts.completed += good
            counts.failed += not good
            step(line)

    async def _result(self, line: Line) -> tuple[Json, bool]:
        while True:
            called = await post(self._app, line.url, line.raw, self._headers)
            if called.status not in RETRIED or self._engine.failure is not None:
                break
            await asyncio.sleep(RETRY_AFTER if called.retry_after is None else called.retry_after)
        try:
            return result(line, called.status, called.request_id, called.body), called.status == 200
        except ValueError as error:
            return failure(line, "server_error", f"The response was no JSON ({error})."), False
