"""Run a model without dropout, and give it its mode back."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def eval_mode(model: nn.Module, others: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Inside, no module of ``model`` is in train mode; at the end, those that were are again.

    Args:
        others: modules that may be in train mode while the model is not, as new adapters are.
    """
    training = [module for module in (model.modules() if model.training else others) if module.training]
    try:
        for module in training:
            module.training = False
        yield
    finally:
        for module in training:
            module.training = True
