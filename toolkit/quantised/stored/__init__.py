"""Weights as other libraries store them: one file per library, each found by its ``quant_method``.

A file of this folder holds

``METHOD``
    The ``quant_method`` of a configuration.
``MARKS``
    Names of tensors, any of which a quantised layer has beside or instead of ``weight``.
``read(settings, tensors, dtype)``
    The ``QuantisedWeight`` of one layer, whose values are those that the library itself dequantises to.

    settings: the configuration's ``quantization_config``.
    tensors: the layer's tensors by name, such as ``qweight`` or ``weight.absmax``.
    dtype: of the weight.

    Raises ToolkitError, in one sentence, for what no format of ``toolkit.ops.quantised_linear`` holds.
"""

import importlib
import pkgutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from toolkit.quantised.weight import QuantisedWeight

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Library:
    """One library's layout: see this package's docstring."""

    method: str
    marks: tuple[str, ...]
    read: Callable[[Settings, Mapping[str, Tensor], torch.dtype], QuantisedWeight]

    def layers(self, names: list[str]) -> dict[str, list[str]]:
        """Of a checkpoint's tensors, those of each quantised layer by its path, named within the layer."""
        paths = {name[: -len(mark) - 1] for name in names for mark in self.marks if name.endswith(f".{mark}")}
        found: dict[str, list[str]] = {path: [] for path in sorted(paths)}
        for name in names:
            path = name
            while "." in path:
                path = path.rpartition(".")[0]
                if path in found:
                    found[path].append(name[len(path) + 1 :])
                    break
        return found


@cache
def libraries() -> dict[str, Library]:
    """The libraries of this package's files, by ``quant_method``."""
    found = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        if hasattr(module, "METHOD"):
            found[module.METHOD] = Library(module.METHOD, module.MARKS, module.read)
    return found
