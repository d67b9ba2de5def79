"""Run a model without dropout, and give it its mode back."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Inside, no module of ``model`` is in train mode; at the end, those that were are again."""
    training = [module for module in model.modules() if module.training] if model.training else []
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
