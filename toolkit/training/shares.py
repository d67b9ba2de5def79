"""What a micro-batch counts in the mean over all tokens of an update, over micro-batches and processes."""

from collections.abc import Callable, Sequence
from typing import Any

from toolkit.training.objectives.base import RunContext


class TokenShares:
    """Of the micro-batches of one update.

    Args:
        context: the run.

    Attributes:
        counts: rows of each micro-batch of this process.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self.counts: list[int] = []
        self._total = 1.0

    def begin(self, micros: Sequence[Any], rows: Callable[[Any], int]) -> None:
        """Before an update of ``micros``; ``rows`` gives the number of rows of each."""
        self.counts = [rows(micro) for micro in micros]
        (self._total,) = self._context.reduce_sum([sum(self.counts)])

    def of(self, index: int) -> float:
        """rows / rows of all processes * processes: the weight of a micro-batch's mean before its backward, since
        data parallel takes the mean of gradients over processes."""
        return self.counts[index] * self._context.world_size / max(self._total, 1.0)
