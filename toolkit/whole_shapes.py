"""Shapes of the parameters of a model that is split over ranks, which the split leaves on it."""

from collections.abc import Mapping
from typing import Any

ATTRIBUTE = "_toolkit_whole_shapes"
"""Of a split model: the shapes of its parameters over all ranks, by name."""


def whole_shapes(model: Any) -> Mapping[str, list[int]]:
    """The shapes over all ranks, by parameter; nothing of a model that is whole."""
    shapes: Mapping[str, list[int]] = getattr(model, ATTRIBUTE, {})
    return shapes
