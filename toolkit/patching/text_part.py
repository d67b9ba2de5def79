"""The text part of a model of images and text: the module that holds the input embedding."""

import inspect
from typing import Any

from torch import nn

from toolkit.patching.adapters import adapter_layers, adapts, unwrapped

PIXELS = "pixel_values"


def find_entry(model: Any) -> tuple[str, nn.Module] | None:
    """Path and module of the entry of a model with a text part; None for a model that is a text model alone.

    Where a configuration has no text part, the entry is a module that holds the input embedding and takes pixels too.
    """
    config = getattr(model, "config", None)
    if config is None:
        return None
    try:
        embedding = unwrapped(model.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None
    apart = config.get_text_config() is not config
    for path, module in model.named_modules():
        if module is not model and any(unwrapped(child) is embedding for child in module.children()):
            return (path, module) if apart or takes_pixels(module) else None
    return None


def takes_pixels(module: nn.Module) -> bool:
    """Whether a module's own forward takes pixels: it puts images among the embeddings of its tokens itself."""
    return PIXELS in inspect.signature(type(module).forward).parameters


def adapted_outside(model: Any, adapter: str) -> str | None:
    """A layer that an adapter adapts outside the text part and the head; None where there is none."""
    entry = find_entry(model)
    if entry is None:
        return None
    layers = [module for module in adapter_layers(model) if adapts(module, adapter)]
    inside = set() if takes_pixels(entry[1]) else set(entry[1].modules())
    outside = set(layers) - inside - {model.get_output_embeddings()}
    return next((path for path, module in model.named_modules() if module in outside), None)
