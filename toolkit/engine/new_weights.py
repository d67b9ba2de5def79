"""Other weights into the parameters of a model that serves."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from toolkit.engine.async_engine import AsyncEngine
from toolkit.engine.leading import LeadingEngine
from toolkit.engine.pooling.queue import PoolingQueue
from toolkit.errors import ToolkitError
from toolkit.whole_shapes import whole_shapes


def _own_tensors(model: nn.Module) -> dict[str, tuple[str, Tensor]]:
    """(name in the state dict, tensor) of what is the model's own, by its name without adapters.

    PEFT keeps a layer that it adapts as ``base_layer`` of one that has the adapters too.
    """
    adapted = [f"{name}." for name, module in model.named_modules() if hasattr(module, "base_layer")]
    found = {}
    for name, tensor in model.state_dict().items():
        layer = next((one for one in adapted if name.startswith(one)), None)
        if layer is None:
            found[name] = name, tensor
        elif name.startswith(f"{layer}base_layer."):
            found[name.replace(f"{layer}base_layer.", layer, 1)] = name, tensor
    return found


def check_new_weights(model: nn.Module, weights: Mapping[str, Tensor], partial: bool = False) -> None:
    """Raise ToolkitError unless ``weights`` have the names, shapes and kinds of dtype of the model's own state dict.

    Names are those without adapters. With ``partial`` some may be missing.
    """
    state = {name: tensor for name, (_, tensor) in _own_tensors(model).items()}
    split = whole_shapes(model)
    for name in state:
        if not partial and name not in weights:
            raise ToolkitError(f"the new weights must have {name}, which they lack.")
    for name, tensor in weights.items():
        if name not in state:
            raise ToolkitError(f"the new weights must have tensors of the served model only, got {name}.")
        there = state[name]
        wanted = split.get(name, list(there.shape))  # over all ranks
        if list(tensor.shape) != wanted:
            raise ToolkitError(f"{name} must have the shape {wanted}, got {list(tensor.shape)}.")
        if tensor.is_floating_point() != there.is_floating_point() or tensor.is_complex() != there.is_complex():
            raise ToolkitError(f"{name} must have the dtype {there.dtype}, got {tensor.dtype}.")


def write_new_weights(
    engine: AsyncEngine | PoolingQueue, model: nn.Module, weights: Mapping[str, Tensor], partial: bool = False
) -> int:
    """The weight version after ``weights`` are written into the model's own parameters, between two steps.

    Running requests continue under the new weights, with their state of the old ones, as their tokens'
    ``weight_versions`` say. Cached prefixes of the old weights are dropped.

    Args:
        engine: that runs the model.
        model: its own.
        weights: by their names in its state dict, without adapters.
        partial: whether some may be missing, which stay.

    Raises:
        ToolkitError: for weights that do not fit; nothing is written then.
    """
    check_new_weights(model, weights, partial)
    leading = engine.engine
    if isinstance(leading, LeadingEngine):
        version: int = engine.call(lambda: leading.write_weights(dict(weights)))
        return version
    names = {name: inner for name, (inner, _) in _own_tensors(model).items()}
    with engine.pause(), torch.no_grad():
        model.load_state_dict({names[name]: tensor for name, tensor in weights.items()}, strict=False)
    return engine.call(engine.engine.see_weights)
