"""relu: max(x, 0); the derivative at 0 is 0."""

from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl


def value(x: Tensor) -> Tensor:
    return F.relu(x)


def derivative(x: Tensor) -> Tensor:
    return torch.where(x <= 0, 0.0, torch.ones_like(x))


def triton_value(x):
    return tl.where(x <= 0.0, 0.0, x)


def triton_both(x):
    return tl.where(x <= 0.0, 0.0, x), tl.where(x <= 0.0, 0.0, 1.0)
