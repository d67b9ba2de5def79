"""The activation functions, one file each, and beside it the header of its C++ functor.

A file of this folder *is* a kind: its name is the file's, and the folder is listed, here for the reference and
for Triton, in setup.py for the native library. A kind of one argument serves ``activation``, and as ``f(gate) * up``
``gated_activation``; a gate of two arguments, ``f(gate, up)``, serves ``gated_activation`` alone. The file holds

``value(x)``, ``derivative(x)``
    f and f' in plain torch. ``value`` is differentiable by autograd. A gate has ``value(gate, up)`` and a
    ``derivative(gate, up)`` that returns the slopes to gate and to up.
``triton_value(x)``, ``triton_both(x)``
    Triton functions of float32 tiles: f, and (f, f'); a gate's second one is (f, slope to gate, slope to up).
    They see ``tl`` and the functions of ``toolkit.ops.activation.triton_functions``, imported under ``TYPE_CHECKING``
    only, for triton is not loaded before a kernel is.

The header of the same name beside it holds the C++ functor ``Kind_<name>`` of the native library: ``kArguments``, and
``value`` and ``both`` of vectors, with the helpers of ``toolkit/ops/native/activations.h``; ``both`` returns a
``Pair<V>`` (a gate's: ``Slopes<V>``).

Limits at infinity are exact, nothing finite overflows into NaN, and NaN stays NaN.
"""

import importlib
import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of


@dataclass(frozen=True)
class Kind:
    """One activation function: ``value(x)`` is f(x), ``derivative(x)`` f'(x); of (gate, up) for a gate."""

    name: str
    arguments: int
    value: Callable[..., Tensor]
    derivative: Callable[..., Any]
    module: ModuleType

    def device(self) -> tuple[Any, Any]:
        """``triton_value`` and ``triton_both``, compiled by Triton when a kernel that inlines them is."""
        if self.name not in _DEVICE:
            from toolkit.ops.activation import triton_functions

            _DEVICE[self.name] = triton_functions.build(self.module)
        return _DEVICE[self.name]


_DEVICE: dict[str, tuple[Any, Any]] = {}
KINDS: dict[str, Kind] = {}


def discover() -> None:
    """Fill ``KINDS`` from the files of this package's folders, by name."""
    found = {}
    for entry in pkgutil.iter_modules(__path__):
        module = importlib.import_module(f"{__name__}.{entry.name}")
        arguments = len(inspect.signature(module.value).parameters)
        found[entry.name] = Kind(entry.name, arguments, module.value, module.derivative, module)
    KINDS.clear()
    KINDS.update(sorted(found.items()))


def plain_kinds() -> list[str]:
    """The kinds of one argument."""
    return [name for name, kind in KINDS.items() if kind.arguments == 1]


def find(name: str, *, plain: bool = False) -> Kind:
    """The kind of this name; ToolkitError names the nearest one otherwise. ``plain``: of one argument only."""
    kind = KINDS.get(name)
    if kind is None or (plain and kind.arguments != 1):
        allowed = plain_kinds() if plain else list(KINDS)
        raise ToolkitError(must_be_one_of("kind", name, allowed))
    return kind


discover()
