"""CUDA's side of ``device_graphs``: every call of it that steps need is here.

It has not run on a device yet, so graphs are recorded only where ``TOOLKIT_CUDA_GRAPHS=on`` asks for it.
"""

import os
from collections.abc import Callable
from functools import cache

import torch
from torch import Tensor

from toolkit.engine.step.device_graphs import DeviceGraphs, DeviceReplay, Run
from toolkit.engine.step.graph import CapturedGraph


class CudaDevice:
    """One CUDA device: a stream to record on, and one pool of memory for all its graphs.

    Args:
        device: which.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()
        self._stream = torch.cuda.Stream(device)

    def takes(self, tensor: Tensor) -> bool:
        """See ``GraphDevice``."""
        return tensor.device == self._device

    def warm_up(self, run: Run) -> None:
        """See ``GraphDevice``. On the stream that records, since libraries keep a workspace for each."""
        with torch.cuda.device(self._device):
            self._stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self._stream):
                run()
                run()
            torch.cuda.current_stream().wait_stream(self._stream)

    def record(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """See ``GraphDevice``."""
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.device(self._device), torch.cuda.graph(graph, pool=self._pool, stream=self._stream):
            output = run()
        return graph.replay, output


class _Pinned:
    """Pinned memory of the host, in turns two of one shape, each with an event that says when its transfer is done."""

    def __init__(self, like: Tensor) -> None:
        self._both = [
            (torch.empty(like.shape, dtype=like.dtype, pin_memory=True), torch.cuda.Event()) for _ in range(2)
        ]

    def next(self) -> tuple[Tensor, torch.cuda.Event]:
        """The one that was used longer ago, and its event."""
        self._both.reverse()
        return self._both[0]


class Staging:
    """Brings what the host has written to the device, while the host writes what the next step reads.

    Args:
        memory: of the host, of the shape and dtype of all that is brought.
    """

    def __init__(self, memory: Tensor) -> None:
        self._pinned = _Pinned(memory)

    def upload(self, memory: Tensor, target: Tensor) -> None:
        """Copy ``memory`` to ``target``, on its device's stream; ``memory`` may be written again at once."""
        pinned, done = self._pinned.next()
        done.synchronize()  # of the transfer before the last one: long done
        pinned.copy_(memory)
        target.copy_(pinned, non_blocking=True)
        done.record(torch.cuda.current_stream(target.device))


class ReadBack:
    """Brings a step's result to the host: one transfer into pinned memory, and an event that says when it is there."""

    def __init__(self) -> None:
        self._pinned: dict[torch.Size, _Pinned] = {}

    def __call__(self, result: Tensor) -> Callable[[], Tensor]:
        """What waits for the transfer, which begins now, and gives the result; valid until the next but one begins."""
        pinned = self._pinned.get(result.shape)
        if pinned is None:
            pinned = self._pinned[result.shape] = _Pinned(result)
        host, done = pinned.next()
        host.copy_(result, non_blocking=True)
        done.record(torch.cuda.current_stream(result.device))

        def wait() -> Tensor:
            done.synchronize()
            return host

        return wait


@cache
def _executor(device: torch.device) -> DeviceGraphs:
    return DeviceGraphs(CudaDevice(device))


def cuda_graphs(graph: CapturedGraph) -> DeviceReplay | None:
    """The executor of the CUDA device that the graph is on; None where nothing is recorded."""
    device = graph.output.tensor.device
    return _executor(device)(graph) if records(device) else None


def records(device: torch.device) -> bool:
    """Whether decode steps on ``device`` are recorded as CUDA graphs."""
    return device.type == "cuda" and os.environ.get("TOOLKIT_CUDA_GRAPHS") == "on"
