"""What runs a captured graph. An executor takes a graph, or leaves it to the next one by returning None.

A replay returns what the captured function would, bit for bit, and writes what it would; its output may be overwritten
by the next one. One that holds its tensors by reference follows them to other memory. One with fixed addresses, as a
CUDA graph, is a ``FixedReplay``: ``DecodeGraphs`` asks before each replay, and captures again where they do not hold.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from toolkit.engine.step.cuda_device import cuda_graphs
from toolkit.engine.step.graph import CapturedGraph
from toolkit.engine.step.native import native_replay

Executor = Callable[[CapturedGraph], Callable[..., Tensor] | None]


class FixedReplay(Protocol):
    """A replay that reads and writes the addresses of its recording."""

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Run it."""

    def addresses_hold(self) -> bool:
        """Whether what is not an input lies where it lay, in the same shape, strides and dtype."""

    def fits(self, inputs: Sequence[Tensor]) -> bool:
        """Whether ``inputs`` are of the shapes, strides and dtypes of its recording."""


def holds(replay: Callable[..., Tensor], inputs: Sequence[Tensor]) -> bool:
    """Whether ``replay`` may run on ``inputs`` as far as memory goes."""
    hold, fits = getattr(replay, "addresses_hold", None), getattr(replay, "fits", None)
    return (fits is None or fits(inputs)) and (hold is None or hold())


def straight_line(graph: CapturedGraph) -> Callable[..., Tensor]:
    """``graph`` as Python, one call of torch's dispatcher per op. Takes every graph."""
    return graph.compile()


EXECUTORS: tuple[Executor, ...] = (cuda_graphs, native_replay, straight_line)
