"""Median seconds of calls that take turns."""

import itertools
import statistics
from collections.abc import Callable, Mapping

from benchmarks.common import interleaved


def in_turns(calls: Mapping[str, Callable[[int], object]], copies: int, seconds: float) -> dict[str, float]:
    """Median seconds of each call, taken in turns for about ``seconds`` in all; a call is given the copy to use."""

    def next_copy(call: Callable[[int], object]) -> Callable[[], object]:
        copy = itertools.cycle(range(copies))
        return lambda: call(next(copy))

    cycling = {name: next_copy(call) for name, call in calls.items()}
    once = sum(sum(taken) for taken in interleaved(cycling, 1).values())
    taken = interleaved(cycling, max(5, 2 * copies, int(seconds / once)), warmup=0)
    return {name: statistics.median(times) for name, times in taken.items()}
