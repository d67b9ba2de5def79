"""Ranks as threads of one process: the exchange's every case without starting processes."""

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from toolkit.moe.dispatchers.transport import Pending


class Board:
    """Where ranks leave what the others take: by the number of the call, which is the same on all ranks."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.posted: dict[tuple[int, int], Tensor] = {}
        self.changed = threading.Condition()

    def post(self, call: int, rank: int, value: Tensor) -> None:
        with self.changed:
            self.posted[call, rank] = value
            self.changed.notify_all()

    def take(self, call: int, rank: int) -> Tensor:
        with self.changed:
            assert self.changed.wait_for(lambda: (call, rank) in self.posted, timeout=60)
            return self.posted[call, rank]


class Threads:
    """A transport among threads. Nothing arrives before it is waited for, so a wait that is missing shows."""

    def __init__(self, board: Board, rank: int) -> None:
        self.board, self.rank, self.size, self.calls = board, rank, board.size, 0

    def _post(self, value: Tensor) -> int:
        self.calls += 1
        self.board.post(self.calls, self.rank, value.detach().clone())
        return self.calls

    def gather(self, values: Tensor) -> Tensor:
        call = self._post(values)
        return torch.stack([self.board.take(call, rank) for rank in range(self.size)])

    def exchange(self, rows: Tensor, counts: Sequence[Sequence[int]]) -> Pending:
        assert len(rows) == sum(counts[self.rank])
        return _Arriving(self, self._post(rows), counts)


class _Arriving:
    def __init__(self, transport: Threads, call: int, counts: Sequence[Sequence[int]]) -> None:
        self.transport, self.call, self.counts = transport, call, counts

    def wait(self) -> Tensor:
        mine = self.transport.rank
        parts = [
            self.transport.board.take(self.call, rank).split(list(line))[mine] for rank, line in enumerate(self.counts)
        ]
        return torch.cat(parts)


def on_ranks(size: int, function: Callable[[Threads], Any]) -> list[Any]:
    """``function`` on every rank at once; its results by rank, or the first error."""
    board = Board(size)
    results: list[Any] = [None] * size
    errors: list[BaseException] = []

    def run(rank: int) -> None:
        try:
            results[rank] = function(Threads(board, rank))
        except BaseException as error:  # handed to the test
            errors.append(error)

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]
    return results
