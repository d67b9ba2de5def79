"""The weight version of a model.

In reading order: ``tensors`` watches parameters and buffers; ``optimizers`` counts steps that leave no other trace;
``clock`` turns both, and the adapters that act, into a version.
"""

from toolkit.patching.weights.clock import (
    WeightClock,
    leave_clock,
    make_room_for_clock,
    weight_clock,
    weight_version,
    weights_changed,
)
from toolkit.patching.weights.optimizers import count_steps

__all__ = [
    "WeightClock",
    "count_steps",
    "leave_clock",
    "make_room_for_clock",
    "weight_clock",
    "weight_version",
    "weights_changed",
]
