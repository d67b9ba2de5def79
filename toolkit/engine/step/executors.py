"""What runs a captured graph. An executor takes a graph, or leaves it to the next one by returning None."""

from collections.abc import Callable

from torch import Tensor

from toolkit.engine.step.graph import CapturedGraph
from toolkit.engine.step.native import native_replay

Executor = Callable[[CapturedGraph], Callable[..., Tensor] | None]


def straight_line(graph: CapturedGraph) -> Callable[..., Tensor]:
    """``graph`` as Python, one call of torch's dispatcher per op. Takes every graph."""
    return graph.compile()


EXECUTORS: tuple[Executor, ...] = (native_replay, straight_line)
