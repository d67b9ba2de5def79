"""gelu: x Phi(x), Phi the normal distribution function (Hendrycks and Gimpel, 2016)."""

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from toolkit.ops.activation.torch_functions import saturating

if TYPE_CHECKING:
    from toolkit.ops.activation.triton_functions import clamp, finite_below, normal


def value(x: Tensor) -> Tensor:
    return saturating(lambda x: x * 0.5 * torch.erfc(-x * math.sqrt(0.5)), x)


def derivative(x: Tensor) -> Tensor:
    x = x.clamp(-100, 100)
    return 0.5 * torch.erfc(-x * math.sqrt(0.5)) + x * torch.exp(-0.5 * x * x) / math.sqrt(2 * math.pi)


def triton_value(x):
    below, _ = normal(x)
    return finite_below(x) * below


def triton_both(x):
    below, density = normal(x)
    return finite_below(x) * below, clamp(x, -100.0, 100.0) * density + below
