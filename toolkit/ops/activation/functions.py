"""The activation functions and their derivatives in plain torch, one entry each.

The CPU kernels have the same functions in ``toolkit/ops/native/activations.h``. To add one: an entry here, a
struct and a line in ``with_kind`` there. Limits at infinity are exact and nothing finite overflows into NaN.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.errors import ToolkitError, nearest


@dataclass(frozen=True)
class Activation:
    """``value(x)`` is f(x), differentiable by autograd; ``derivative(x)`` is f'(x)."""

    value: Callable[[Tensor], Tensor]
    derivative: Callable[[Tensor], Tensor]


def _saturating(f: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """f, for an f that is exactly x above 100 and rounds to -0 below -1e4, with a gradient free of NaN."""

    def value(x: Tensor) -> Tensor:
        # Unlike clamp, where() lets the gradient of NaN be NaN.
        bounded = torch.where(x < -1e4, -1e4, torch.where(x > 100, 100.0, x))
        return torch.where(x > 100, x, f(bounded))

    return value


def _silu_derivative(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 + x.clamp(-1e4, 1e4) * (-x).sigmoid())


def _gelu_derivative(x: Tensor) -> Tensor:
    x = x.clamp(-100, 100)
    return 0.5 * torch.erfc(-x * math.sqrt(0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def _gelu_tanh_derivative(x: Tensor) -> Tensor:
    x = x.clamp(-100, 100)
    twice_u = 2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return twice_u.sigmoid() + x * slope * twice_u.sigmoid() * (-twice_u).sigmoid()


KINDS = {
    "silu": Activation(_saturating(F.silu), _silu_derivative),
    "gelu": Activation(_saturating(lambda x: x * 0.5 * torch.erfc(-x * math.sqrt(0.5))), _gelu_derivative),
    "gelu_tanh": Activation(_saturating(lambda x: F.gelu(x, approximate="tanh")), _gelu_tanh_derivative),
    "relu": Activation(F.relu, lambda x: torch.where(x <= 0, 0.0, torch.ones_like(x))),
    "relu2": Activation(lambda x: F.relu(x).square(), lambda x: 2 * F.relu(x)),
}


def find(kind: str) -> Activation:
    """The activation of this name; ToolkitError names the nearest one otherwise."""
    if kind not in KINDS:
        allowed = ", ".join(KINDS)
        raise ToolkitError(f"kind is '{kind}'; allowed are {allowed}{nearest(kind, list(KINDS))}.")
    return KINDS[kind]
