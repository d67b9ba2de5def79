"""silu: x sigmoid(x) (Elfwing, Uchibe and Doya, 2018)."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from toolkit.ops.activation.torch_functions import saturating

if TYPE_CHECKING:
    from toolkit.ops.activation.triton_functions import clamp, finite_below, sigmoid, sigmoid_both


def value(x: Tensor) -> Tensor:
    return saturating(F.silu, x)


def derivative(x: Tensor) -> Tensor:
    return x.sigmoid() * (1 + x.clamp(-1e4, 1e4) * (-x).sigmoid())


def triton_value(x):
    return finite_below(x) * sigmoid(x)


def triton_both(x):
    s, rest = sigmoid_both(x)
    return finite_below(x) * s, s * (clamp(x, -1e4, 1e4) * rest + 1.0)
