"""Transports: asynchronous exchange of rows between ranks.

W ranks. Rows are sorted by the rank that they go to, or came from; every rank knows how many there are.
"""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Pending(Protocol):
    """A transfer in progress."""

    def wait(self) -> Tensor:
        """The rows received, sorted by the rank that sent them. On CUDA the stream waits, not the host."""


class Transport(Protocol):
    """Exchanges among W ranks, all of which make the same calls in the same order."""

    rank: int
    size: int

    def gather(self, values: Tensor) -> Tensor:
        """[W, *values.shape]: every rank's values, which have one shape and dtype."""

    def exchange(self, rows: Tensor, counts: Sequence[Sequence[int]]) -> Pending:
        """Starts to send ``rows`` [N, ...].

        Args:
            rows: must not change until the transfer is done, which keeps it alive.
            counts: counts[a][b] rows go from rank a to rank b, N in all from this rank.
        """


class SingleRank:
    """The transport of a single rank, which needs no process group."""

    rank, size = 0, 1

    def gather(self, values: Tensor) -> Tensor:
        return values[None]

    def exchange(self, rows: Tensor, counts: Sequence[Sequence[int]]) -> Pending:
        return _Arrived(rows)


class _Arrived:
    def __init__(self, rows: Tensor) -> None:
        self._rows = rows

    def wait(self) -> Tensor:
        return self._rows


class Collective:
    """``all_to_all_single`` of a process group: gloo on CPU (its own threads), NCCL on CUDA (its own stream)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group
        self.rank, self.size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, values: Tensor) -> Tensor:
        parts = [torch.empty_like(values) for _ in range(self.size)]
        dist.all_gather(parts, values.contiguous(), group=self._group)
        return torch.stack(parts)

    def exchange(self, rows: Tensor, counts: Sequence[Sequence[int]]) -> Pending:
        sent, received = list(counts[self.rank]), [line[self.rank] for line in counts]
        rows = rows.contiguous()
        out = rows.new_empty(sum(received), *rows.shape[1:])
        work = dist.all_to_all_single(out, rows, received, sent, group=self._group, async_op=True)
        return _Work(work, out, rows)


class _Work:
    def __init__(self, work: Any, out: Tensor, rows: Tensor) -> None:
        self._work, self._out, self._rows = work, out, rows

    def wait(self) -> Tensor:
        self._work.wait()
        return self._out


def transport_of(group: dist.ProcessGroup | None) -> Transport:
    """The transport of a process group; None is a single rank."""
    if group is None or dist.get_world_size(group) == 1:
        return SingleRank()
    return Collective(group)
