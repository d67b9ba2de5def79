"""The text part of a model of images and text: the module that holds the input embedding."""

from typing import Any

from torch import nn

from toolkit.patching.adapters import unwrapped


def find_entry(model: Any) -> tuple[str, nn.Module] | None:
    """Path and module of the entry of a model with a text part; None for a model that is a text model alone."""
    config = getattr(model, "config", None)
    if config is None or config.get_text_config() is config:
        return None
    try:
        embedding = unwrapped(model.get_input_embeddings())
    except (AttributeError, NotImplementedError):
        return None
    for path, module in model.named_modules():
        if module is not model and any(unwrapped(child) is embedding for child in module.children()):
            return path, module
    return None
