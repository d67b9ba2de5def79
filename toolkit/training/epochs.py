"""``train.num_train_epochs``: how many steps passes over given lines come to."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from toolkit.config import Recipe
from toolkit.errors import ToolkitError
from toolkit.training.examples import LineStream


def in_steps(recipe: Recipe, objective: Any) -> Recipe:
    """The recipe with the ``max_steps`` that its epochs come to; the recipe itself without epochs.

    Raises:
        ToolkitError: the steps have no room for the schedule's warm-up and decay.
    """
    epochs = recipe.train.num_train_epochs
    if epochs is None:
        return recipe
    steps = objective.num_steps(epochs)
    try:
        recipe.schedule.check_steps(steps)
    except ValueError as error:
        raise ToolkitError(f"{error}; that is train.num_train_epochs, {epochs:g}.") from None
    return recipe.model_copy(update={"train": recipe.train.model_copy(update={"max_steps": steps})})


def packed_steps(
    lengths: Mapping[int, Sequence[int]],
    streams: Sequence[LineStream],
    epochs: float,
    batch_tokens: int,
    batches: int,
    batch_size: int | None = None,
) -> int:
    """Steps of packed examples, whose lengths are packed as ``Packed`` packs the examples.

    Args:
        lengths: inputs of the examples of each line, by its index.
        streams: of indexes, one for each process.
        batch_tokens: inputs of a batch.
        batches: of a step, in each process.
        batch_size: examples of a batch, in the place of its inputs.
    """
    most = 0
    for stream in streams:
        full = rows = 0
        for index in stream.take(round(epochs * stream.lines_per_epoch)):
            for length in lengths.get(index, ()):
                room = batch_tokens if batch_size is None else batch_size
                taken = length if batch_size is None else 1
                if rows and rows + taken > room:
                    full, rows = full + 1, 0
                rows += taken
        most = max(most, full + bool(rows))
    return max(math.ceil(most / batches), 1)
