"""What a patch wants to replace, and what it leaves alone.

A claim is collected on the original model, carries the errors of its probe and knows how to install and undo itself.
"""

import types
from collections.abc import Callable
from dataclasses import dataclass

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


def replace_forward(module: nn.Module, forward: Callable) -> Callable[[], Undo]:
    """An installer that puts ``forward`` on the instance, in front of the class's own; undo takes it away again."""

    def install() -> Undo:
        before = module.__dict__.get("forward")
        module.__dict__["forward"] = types.MethodType(forward, module)

        def undo() -> None:
            if before is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before

        return undo

    return install
