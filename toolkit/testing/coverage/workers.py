"""Rows of many architectures, measured in separate processes: one that hangs or dies costs its own row alone."""

import logging
import multiprocessing
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from toolkit.testing.architectures import CAUSAL
from toolkit.testing.coverage.kinds import COLUMNS, MEASURES
from toolkit.testing.coverage.row import Row

SECONDS = 120
"""Time limit per architecture."""


def measure_all(
    model_types: Sequence[str],
    workers: int = 2,
    seconds: float = SECONDS,
    on_row: Callable[[Row], None] | None = None,
    kind: str = CAUSAL,
) -> list[Row]:
    """Rows of all architectures, in order, measured in separate processes.

    Args:
        workers: number of processes.
        seconds: time limit per architecture; one that exceeds it, or ends its process, gets a row that says so.
        on_row: called with each row as it is measured.
        kind: of the models.
    """
    context = multiprocessing.get_context("spawn")
    waiting = list(model_types)
    rows: dict[str, Row] = {}
    running: list[_Worker] = []
    while waiting or running:
        while waiting and len(running) < workers:
            share, waiting = waiting[:8], waiting[8:]
            running.append(_Worker(context, share, kind))
        for worker in list(running):
            for row in worker.rows(seconds):
                rows[row.model_type] = row
                if on_row is not None:
                    on_row(row)
            if worker.done:
                running.remove(worker)
                waiting = worker.left + waiting
        time.sleep(0.05)
    return [rows[model_type] for model_type in model_types]


def _work(model_types: Sequence[str], kind: str, connection: Any) -> None:
    """The worker process: sends one row after the other."""
    from transformers.utils.logging import disable_progress_bar

    warnings.filterwarnings("ignore")
    logging.disable(logging.CRITICAL)
    disable_progress_bar()
    torch.set_num_threads(1)
    for model_type in model_types:
        connection.send(MEASURES[kind](model_type))
    connection.close()


class _Worker:
    """A process that measures some architectures. left: those without a row yet. done: whether it has ended."""

    def __init__(self, context: Any, share: list[str], kind: str) -> None:
        self.left = share
        self.done = False
        self._kind = kind
        self._connection, other = context.Pipe(duplex=False)
        self._process = context.Process(target=_work, args=(share, kind, other), daemon=True)
        self._process.start()
        other.close()
        self._since = time.monotonic()

    def rows(self, seconds: float) -> Iterator[Row]:
        """Rows that have arrived; a failed row for the current architecture if it is late or the process has ended."""
        try:
            while self._connection.poll():
                row: Row = self._connection.recv()
                self.left = self.left[1:]
                self._since = time.monotonic()
                yield row
        except EOFError:
            self.done = True
        late = time.monotonic() - self._since > seconds
        if self.left and (late or self.done):
            self._process.kill()
            self.done = True
            failed, self.left = self.left[0], self.left[1:]
            reason = f"it took more than {seconds:.0f} s" if late else "its process ended"
            yield Row(failed, COLUMNS[self._kind], reason=reason)
        if self.done:
            self._process.join()
