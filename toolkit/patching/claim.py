"""What a patch wants to replace, and what it leaves alone.

A claim is collected on the original model, carries the errors of its probe and knows how to install and undo itself.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

Undo = Callable[[], None]

# Two fp32 computations of one formula differ by a few roundings, another formula by far more (gelu and its tanh form:
# 2e-4). Gradients cancel where outputs do not (of queries and keys, say), which multiplies the roundings.
FORWARD_TOLERANCE = 2e-5
BACKWARD_TOLERANCE = 1e-4


@dataclass(frozen=True)
class ProbeError:
    """Relative errors ‖candidate - original‖ / ‖original‖ on random inputs: of outputs, and of gradients."""

    forward: float
    backward: float

    def passes(self) -> bool:
        """Whether both are what rounding explains. NaN never passes."""
        return self.forward <= FORWARD_TOLERANCE and self.backward <= BACKWARD_TOLERANCE

    def worst(self) -> float:
        return max(self.forward, self.backward)


@dataclass(frozen=True)
class Claim:
    """A proven wish to replace ``module``'s forward in ``role`` by ``op``."""

    role: str
    path: str
    module: nn.Module
    op: str
    error: ProbeError
    install: Callable[[], Undo]


@dataclass(frozen=True)
class Refusal:
    """A module that looked like ``role`` and is left as it was, with the reason."""

    role: str
    path: str
    reason: str


# Installers and undos are partial functions of their modules and no closures: in a deep copy of a model they speak of
# the copy's modules.


def replace_forward(module: nn.Module, forward: Callable) -> Callable[[], Undo]:
    """An installer that puts ``forward`` on the instance, in front of the class's own; undo takes it away again."""
    forward.__name__ = "forward"  # under which pickle, which keeps no functions, finds the class's own
    return partial(_put_forward, module, types.MethodType(forward, module))


# Where accelerate's hooks keep the forward that they call between moving inputs and outputs.
_HOOKED = "_old_forward"


def _put_forward(module: nn.Module, forward: Any) -> Undo:
    name = _HOOKED if _HOOKED in module.__dict__ else "forward"
    before = module.__dict__.get(name)
    module.__dict__[name] = forward
    return partial(_take_forward, module, forward, before)


def _take_forward(module: nn.Module, forward: Any, before: Any) -> None:
    """Put ``before`` in the place of ``forward``, which hooks may have come around, or left, in the meantime."""
    if module.__dict__.get(_HOOKED) == forward:
        module.__dict__[_HOOKED] = before or types.MethodType(type(module).forward, module)
    else:
        _put_back(module, "forward", before)


def put_on(module: nn.Module, name: str, value: Any) -> Undo:
    """Set an attribute of the instance, past ``__setattr__``; the way back."""
    before = module.__dict__.get(name)
    module.__dict__[name] = value
    return partial(_put_back, module, name, before)


def _put_back(module: nn.Module, name: str, before: Any) -> None:
    if before is None:
        module.__dict__.pop(name, None)
    else:
        module.__dict__[name] = before
