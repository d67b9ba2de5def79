"""How many bytes torch allocates on the CPU while a function runs: work that is counted, not timed."""

from collections.abc import Callable
from typing import TypeVar

from torch.profiler import ProfilerActivity, profile

R = TypeVar("R")


def allocated_bytes(function: Callable[[], R]) -> tuple[int, R]:
    """The bytes of all tensors allocated, temporaries included, and the function's result."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    events = profiler.profiler.kineto_results.events()  # type: ignore[union-attr]
    return sum(max(0, event.nbytes()) for event in events if event.name() == "[memory]"), result
