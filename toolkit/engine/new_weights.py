"""Other weights into the parameters of a model that serves."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from toolkit.engine.async_engine import AsyncEngine
from toolkit.errors import ToolkitError


def check_new_weights(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Raise ToolkitError unless ``weights`` have the names, shapes and kinds of dtype of the model's state dict."""
    state = model.state_dict()
    for name in state:
        if name not in weights:
            raise ToolkitError(f"the new weights must have {name}, which they lack.")
    for name, tensor in weights.items():
        if name not in state:
            raise ToolkitError(f"the new weights must have tensors of the served model only, got {name}.")
        there = state[name]
        if tensor.shape != there.shape:
            raise ToolkitError(f"{name} must have the shape {list(there.shape)}, got {list(tensor.shape)}.")
        if tensor.is_floating_point() != there.is_floating_point() or tensor.is_complex() != there.is_complex():
            raise ToolkitError(f"{name} must have the dtype {there.dtype}, got {tensor.dtype}.")


def write_new_weights(engine: AsyncEngine, model: nn.Module, weights: Mapping[str, Tensor]) -> int:
    """The weight version after ``weights`` are written into the model's own parameters, between two steps.

    Running requests continue under the new weights, with their state of the old ones, as their tokens'
    ``weight_versions`` say. Cached prefixes of the old weights are dropped.

    Raises:
        ToolkitError: for weights that do not fit; nothing is written then.
    """
    check_new_weights(model, weights)
    with engine.pause(), torch.no_grad():
        model.load_state_dict(weights)
    return engine.call(engine.engine.see_weights)
