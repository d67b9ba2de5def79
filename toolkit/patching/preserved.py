"""A model's modules as they were before a forward that was only meant to look."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

_TABLES = ("_parameters", "_buffers", "_modules")


def _state(module: nn.Module) -> dict[str, Any]:
    return {name: dict(value) if name in _TABLES else value for name, value in module.__dict__.items()}


@contextmanager
def preserved(model: nn.Module) -> Iterator[list[str]]:
    """At the end, every module has the attributes, parameters, buffers and children that it had before.

    Yields:
        A list that at the end has the paths of the modules whose children were replaced inside.
    """
    before = {module: (path, _state(module)) for path, module in model.named_modules()}
    replaced: list[str] = []
    try:
        yield replaced
    finally:
        for module, (path, state) in before.items():
            children = state["_modules"]
            now = module._modules
            if now.keys() != children.keys() or any(now[name] is not child for name, child in children.items()):
                replaced.append(path)
            for name in [name for name in module.__dict__ if name not in state]:
                del module.__dict__[name]
            for name, value in state.items():
                if name in _TABLES:
                    table = module.__dict__[name]
                    table.clear()
                    table.update(value)
                else:
                    module.__dict__[name] = value
