"""A transport over torch's symmetric memory: ranks read each other's rows in place, without a collective.

For CUDA ranks with peer access (NVLink, or one machine). Every rank writes its rows to a buffer that all can read, a
barrier publishes them, and each rank copies its part out of every other's, on a side stream. It has not been run on two
such GPUs yet; tests check the names and signatures that it calls.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.moe.dispatchers.transport import Collective, Pending

_SLOTS = 4
"""Buffers used in turn: a step starts two transfers of a chunk and two more before it waits for the first."""


class SymmetricMemory(Collective):
    """The ``Transport`` of a group of CUDA ranks.

    Args:
        group: an NCCL group.
        capacity: bytes of a rank's largest transfer.

    Raises:
        ToolkitError: where symmetric memory cannot work.
    """

    def __init__(self, group: dist.ProcessGroup, capacity: int) -> None:
        super().__init__(group)
        check(group)
        from torch.distributed import _symmetric_memory as symmetric

        self._stream = torch.cuda.Stream()
        self._capacity, self._turn = capacity, 0
        here = torch.device("cuda")
        self._buffers = [symmetric.empty(capacity, dtype=torch.uint8, device=here) for _ in range(_SLOTS)]
        self._handles: list[Any] = [symmetric.rendezvous(buffer, group) for buffer in self._buffers]

    def exchange(self, rows: Tensor, counts: Sequence[Sequence[int]]) -> Pending:
        elements = math.prod(rows.shape[1:])  # of one row
        largest = elements * rows.element_size() * max(sum(line) for line in counts)
        if largest > self._capacity:
            raise ToolkitError(f"capacity must be >= {largest}, the bytes of this transfer, got {self._capacity}.")
        slot, self._turn = self._turn, (self._turn + 1) % _SLOTS
        handle, rows = self._handles[slot], rows.contiguous()
        received = [line[self.rank] for line in counts]
        out = rows.new_empty(sum(received), *rows.shape[1:])
        self._stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self._stream):
            handle.barrier(channel=0)  # all ranks have read the buffer's previous rows
            self._buffers[slot][: rows.numel() * rows.element_size()].copy_(rows.view(-1).view(torch.uint8))
            handle.barrier(channel=1)
            begin = 0
            for rank, count in enumerate(received):
                first = sum(counts[rank][: self.rank]) * elements
                part = handle.get_buffer(rank, (count, *rows.shape[1:]), rows.dtype, first)
                out[begin : begin + count].copy_(part)
                begin += count
            done = self._stream.record_event()
        return _Copied(done, out, rows)


class _Copied:
    def __init__(self, done: torch.cuda.Event, out: Tensor, rows: Tensor) -> None:
        self._done, self._out, self._rows = done, out, rows

    def wait(self) -> Tensor:
        torch.cuda.current_stream().wait_event(self._done)
        return self._out


def check(group: dist.ProcessGroup) -> None:
    """ToolkitError unless this torch, this machine and this group can use symmetric memory."""
    if not torch.cuda.is_available():
        raise ToolkitError(
            "Symmetric memory needs CUDA, which this machine does not have; use the group's collectives."
        )
    if dist.get_backend(group) != "nccl":
        raise ToolkitError(f"Symmetric memory needs an NCCL group, got {dist.get_backend(group)!r}.")
    here = torch.cuda.current_device()
    peers = range(torch.cuda.device_count())
    if not all(peer == here or torch.cuda.can_device_access_peer(here, peer) for peer in peers):
        raise ToolkitError("Symmetric memory needs GPUs with peer access, which these do not have.")
