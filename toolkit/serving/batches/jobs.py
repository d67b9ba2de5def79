"""The batches of a server: validated, run, cancelled, and kept in its folder."""

import asyncio
import sys
import time
import traceback
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from toolkit.serving.batches.files import Files, Records, new_id
from toolkit.serving.batches.lines import Line, LineError, check_file, failure, lines_of, written
from toolkit.serving.batches.runner import BatchRunner, Counts
from toolkit.serving.batches.schemas import ENDED, BatchError, BatchErrors, BatchObject, RequestCounts
from toolkit.serving.errors import RequestError

COMPLETION_WINDOW = 24 * 3600
"""Seconds that a batch may take."""


class Jobs:
    """Batches, and the files that they read and write.

    Args:
        runner: of their lines.
        folder: in which all of it is kept; None for a temporary one.

    Attributes:
        files: once ``open`` has begun.
        batches: likewise.
    """

    def __init__(self, runner: BatchRunner, folder: Path | None) -> None:
        self._runner, self._folder = runner, folder
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._stopping = False
        self.files: Files
        self.batches: Records[BatchObject]

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Batches run inside. Those that an earlier server left unfinished begin again."""
        with ExitStack() as stack:
            folder = self._folder or Path(stack.enter_context(TemporaryDirectory(prefix="toolkit-batches-")))
            self.batches = Records(folder / "batches", BatchObject, "batch")
            self.files = Files(folder / "files", lambda identity: self.reader(identity) is not None)
            for batch in self.batches:
                if batch.status not in ENDED:
                    self._start(batch)
            try:
                yield
            finally:
                self._stopping = True
                tasks = list(self._tasks.values())
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)

    def create(
        self, input_file_id: str, endpoint: str, metadata: dict[str, str] | None, output_lifetime: int | None = None
    ) -> BatchObject:
        """A new batch, which starts; its files expire after ``output_lifetime`` seconds.

        Raises RequestError for a file that is not there, or is no batch's.
        """
        about = self.files.records.get(input_file_id, "input_file_id")
        if about.purpose != "batch":
            message = f"'input_file_id' must be a file with the purpose 'batch', got one with {about.purpose!r}."
            raise RequestError(message, "input_file_id")
        now = int(time.time())
        batch = BatchObject(
            id=new_id("batch_"), endpoint=endpoint, input_file_id=input_file_id, created_at=now,
            expires_at=now + COMPLETION_WINDOW, metadata=metadata, output_lifetime=output_lifetime,
        )  # fmt: skip
        self.batches.put(batch.id, batch)
        self._start(batch)
        return batch

    def reader(self, file_id: str) -> BatchObject | None:
        """A batch that has not ended whose requests are in a file."""
        return next((one for one in self.batches if one.input_file_id == file_id and one.id in self._tasks), None)

    def cancel(self, identity: str) -> BatchObject:
        """The batch, which ends soon; results so far are kept. Raises RequestError for one that has ended."""
        batch = self.batches.get(identity)
        if batch.status in ENDED:
            raise RequestError(f"A batch that is {batch.status} must not be cancelled.", status=409)
        if batch.status != "cancelling":
            self._move(batch, "cancelling")
            self._tasks[identity].cancel()
        return batch

    def _start(self, batch: BatchObject) -> None:
        batch.request_counts = RequestCounts()
        task = asyncio.create_task(self._guarded(batch))
        self._tasks[batch.id] = task
        task.add_done_callback(lambda _: self._ended(batch))

    def _ended(self, batch: BatchObject) -> None:
        self._tasks.pop(batch.id, None)
        if batch.status not in ENDED and not self._stopping:  # it was cancelled before it had begun
            self._move(batch, "cancelled")

    def _move(self, batch: BatchObject, status: Any) -> None:
        batch.status = status
        setattr(batch, f"{status}_at", int(time.time()))
        self.batches.put(batch.id, batch)

    async def _guarded(self, batch: BatchObject) -> None:
        try:
            await self._run(batch)
        except Exception as error:
            traceback.print_exc(file=sys.stderr)
            self._fail(batch, [LineError("server_error", f"The server failed: {type(error).__name__}.")])

    def _fail(self, batch: BatchObject, errors: list[LineError]) -> None:
        found = [BatchError(code=one.code, message=one.message, line=one.line, param=one.param) for one in errors]
        batch.errors = BatchErrors(data=found)
        self._move(batch, "failed")

    async def _run(self, batch: BatchObject) -> None:
        if batch.status == "cancelling":  # when an earlier server ended
            self._move(batch, "cancelled")
            return
        path = self.files.path(batch.input_file_id)
        total, errors = await asyncio.to_thread(check_file, path, (batch.endpoint,))
        if errors:
            self._fail(batch, errors)
            return
        batch.request_counts.total = total
        self._move(batch, "in_progress")
        counts, done = Counts(), set[str]()

        def step(line: Line) -> None:
            done.add(line.custom_id)
            batch.request_counts.completed, batch.request_counts.failed = counts.completed, counts.failed

        add, lifetime = self.files.adding, batch.output_lifetime
        with (
            add(f"{batch.id}_output.jsonl", "batch_output", lifetime) as (good, output),
            add(f"{batch.id}_error.jsonl", "batch_output", lifetime) as (bad, failures),
        ):
            status, code = "completed", ""
            try:
                async with asyncio.timeout(max(0.0, batch.expires_at - time.time())):
                    await self._runner.run(lines_of(path), output, failures, counts, step)
            except TimeoutError:
                status, code = "expired", "batch_expired"
            except asyncio.CancelledError:
                if self._stopping:
                    raise
                status, code = "cancelled", "batch_cancelled"
            if status == "completed":
                self._move(batch, "finalizing")
            for line in lines_of(path) if code else ():
                if line.custom_id not in done:
                    message = f"The batch was {status} before this request ended."
                    failures.write(written(failure(line, code, message)))
        batch.output_file_id, batch.error_file_id = self._unless_empty(good), self._unless_empty(bad)
        self._move(batch, status)

    def _unless_empty(self, identity: str) -> str | None:
        """The file, or None in the place of one without lines, which is deleted."""
        if self.files.records.get(identity).bytes:
            return identity
        self.files.remove(identity)
        return None
