"""gelu_tanh: x (1 + tanh u) / 2 = x sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks and Gimpel, 2016)."""

import math
from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

from toolkit.ops.activation.torch_functions import saturating

if TYPE_CHECKING:
    from toolkit.ops.activation.triton_functions import clamp, finite_below, sigmoid, sigmoid_both


def value(x: Tensor) -> Tensor:
    return saturating(lambda x: F.gelu(x, approximate="tanh"), x)


def derivative(x: Tensor) -> Tensor:
    x = x.clamp(-100, 100)
    twice_u = 2 * math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * x * x)
    return twice_u.sigmoid() + x * slope * twice_u.sigmoid() * (-twice_u).sigmoid()


# 1.5957691216057308 is 2 sqrt(2/pi).
def triton_value(x):
    return finite_below(x) * sigmoid(x * (x * x * 0.044715 + 1.0) * 1.5957691216057308)


def triton_both(x):
    near = clamp(x, -100.0, 100.0)
    s, rest = sigmoid_both(near * (near * near * 0.044715 + 1.0) * 1.5957691216057308)
    slope = (near * near * 0.134145 + 1.0) * 1.5957691216057308
    return finite_below(x) * s, near * slope * (s * rest) + s
