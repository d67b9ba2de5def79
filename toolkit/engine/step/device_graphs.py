"""Captured graphs as graphs of a device: launched as one, from the addresses of their recording.

A device records what is launched on it without running it, but kernels must have been compiled before: a graph is run
first, on inputs that write no state (``CapturedGraph.idle_inputs``). Inputs are put back after that, so neither the
state nor what the step left is changed. What one graph makes for itself may be overwritten by any other of the device.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from toolkit.engine.step.graph import PLAIN_TENSORS, CapturedGraph
from toolkit.engine.step.recorded import addresses

Run = Callable[[], Tensor]


class GraphDevice(Protocol):
    """What records on a device. ``cuda_device`` is the one of CUDA."""

    def takes(self, tensor: Tensor) -> bool:
        """Whether the tensor lies on it."""

    def warm_up(self, run: Run) -> None:
        """Run it for all kernels to be compiled and all libraries to be set up."""

    def record(self, run: Run) -> tuple[Callable[[], None], Tensor]:
        """What replays the launches of ``run``, and the tensor that it returned, which every replay writes."""


class DeviceGraphs:
    """The executor of a device. Leaves graphs that hold tensors of another, or that read values on the host."""

    def __init__(self, device: GraphDevice) -> None:
        self._device = device

    def __call__(self, graph: CapturedGraph) -> "DeviceReplay | None":
        """See ``Executor``."""
        tensors = [value.tensor for value in graph.values]
        if graph.idle_inputs is None or graph.data_dependent_op or graph.reads_constants:
            return None
        if not all(type(one) in PLAIN_TENSORS and self._device.takes(one) for one in tensors):
            return None
        return DeviceReplay(graph, self._device)


class DeviceReplay:
    """A graph of a device. Its output is valid until another one of the device is replayed."""

    def __init__(self, graph: CapturedGraph, device: GraphDevice) -> None:
        assert graph.idle_inputs is not None
        function = graph.compile()
        inputs = [value.tensor for value in graph.inputs]
        self._constants = list({id(one): one.tensor for one in graph.values if one.kind == "constant"}.values())
        self._inputs = addresses(inputs)
        self._addresses = addresses(self._constants)
        kept = [one.clone() for one in inputs]
        with torch.no_grad():
            for one, idle in zip(inputs, graph.idle_inputs, strict=True):
                if idle is not None:
                    one.fill_(idle)
            device.warm_up(lambda: function(*inputs))
            self._replay, self._output = device.record(lambda: function(*inputs))
            for one, before in zip(inputs, kept, strict=True):
                one.copy_(before)

    def __call__(self, *inputs: Tensor) -> Tensor:
        self._replay()
        return self._output

    def addresses_hold(self) -> bool:
        """See ``FixedReplay``."""
        return addresses(self._constants) == self._addresses

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether ``inputs`` are those of the recording."""
        return addresses(list(inputs)) == self._inputs
