"""Where PEFT's adapters are in a model.

PEFT replaces an adapted layer by a wrapper whose ``base_layer`` is the layer. With ``target_parameters`` it wraps a
module once for each adapted parameter, wrapper around wrapper.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from toolkit.errors import ToolkitError


def is_adapter(module: nn.Module) -> bool:
    """Whether ``module`` is a wrapper of PEFT's around another module."""
    return hasattr(module, "adapter_layer_names") and isinstance(getattr(module, "base_layer", None), nn.Module)


def wraps_parameter(module: nn.Module) -> bool:
    """Whether ``module`` is a wrapper of one parameter of the module inside it."""
    return all(hasattr(module, name) for name in ("parameter_name", "base_layer", "get_delta_factors"))


def adapter_layers(model: nn.Module) -> list[Any]:
    """All wrappers of PEFT's in the model."""
    return [module for module in model.modules() if is_adapter(module)]


def adapter_parts(model: nn.Module) -> list[nn.Module]:
    """The wrappers of PEFT's in the model and all that they have beside the wrapped modules, dropout among it."""
    inside = {id(part) for module in adapter_layers(model) for part in module.base_layer.modules()}
    return [
        part
        for module in adapter_layers(model)
        for part in module.modules()
        if id(part) not in inside or is_adapter(part)
    ]


def parameter_wrappers(module: nn.Module) -> tuple[list[Any], nn.Module]:
    """The wrappers of parameters around a module, outermost first, and that module."""
    wrappers: list[Any] = []
    while wraps_parameter(module):
        wrappers.append(module)
        module = module.base_layer  # type: ignore[assignment]
    return wrappers, module


def base_module(module: nn.Module) -> nn.Module:
    """The module inside all wrappers of its parameters."""
    return parameter_wrappers(module)[1]


def wraps_tokens(module: nn.Module) -> bool:
    """Whether ``module`` is a wrapper of PEFT's that trains some rows of an embedding or of a head."""
    return isinstance(module._modules.get("token_adapter"), nn.Module)


def unwrapped(module: Any) -> Any:
    """The module inside all wrappers of PEFT's around it: its parameters are the base model's."""
    while is_adapter(module) or wraps_tokens(module):
        module = module.original_module if wraps_tokens(module) else module.base_layer
    return module


def vocabulary_size(model: Any) -> int:
    """Rows of the model's embedding, adapted or not."""
    return int(unwrapped(model.get_input_embeddings()).num_embeddings)


def inner_model(model: nn.Module) -> nn.Module:
    """The causal language model inside a ``PeftModel``; any other model itself.

    Raises:
        ToolkitError: the ``PeftModel`` changes the model's inputs (prompt learning).
    """
    if not hasattr(model, "peft_config") or not hasattr(model, "get_base_model"):
        return model
    for name, config in model.peft_config.items():  # type: ignore[union-attr, operator]
        if config.is_prompt_learning:
            raise ToolkitError(
                f"peft_type of adapter {name!r} must be one that adapts layers (LORA, IA3, ...), got "
                f"{config.peft_type.value}."
            )
    inner: nn.Module = model.get_base_model()  # type: ignore[operator]
    return inner


@contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Inside, the wrapped layers stand where their wrappers were: roles are recognised by the layers themselves.

    Patched forwards call projections by name, as modules, so the adapters act again once they are back.
    """
    wrapped = [
        (parent, name, child)
        for parent in model.modules()
        if not (is_adapter(parent) and not wraps_parameter(parent)) and not wraps_tokens(parent)
        for name, child in parent._modules.items()
        if child is not None and (is_adapter(child) or wraps_tokens(child)) and not wraps_parameter(child)
    ]
    try:
        for parent, name, child in wrapped:
            parent._modules[name] = unwrapped(child)
        yield
    finally:
        for parent, name, child in wrapped:
            parent._modules[name] = child
