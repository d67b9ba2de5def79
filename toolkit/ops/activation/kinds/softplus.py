"""softplus: log(1 + e^x), and x itself above 20, as torch has it."""

from typing import TYPE_CHECKING

import torch.nn.functional as F
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl

    from toolkit.ops.activation.triton_functions import sigmoid


def value(x: Tensor) -> Tensor:
    return F.softplus(x)


def derivative(x: Tensor) -> Tensor:
    return x.sigmoid().masked_fill(x > 20, 1.0)


# log(1 + t) = 2 artanh(r), r = t / (2 + t), by its series: r <= 1/3, where what is left out is below float32.
def triton_value(x):
    t = tl.exp(-tl.abs(x))
    r = t / (t + 2.0)
    s = r * r
    series = ((((((s / 15 + 1.0 / 13) * s + 1.0 / 11) * s + 1.0 / 9) * s + 1.0 / 7) * s + 0.2) * s + 1.0 / 3) * s + 1.0
    return tl.where(x > 20.0, x, tl.where(x < 0.0, 0.0, x) + 2.0 * r * series)


def triton_both(x):
    t = tl.exp(-tl.abs(x))
    r = t / (t + 2.0)
    s = r * r
    series = ((((((s / 15 + 1.0 / 13) * s + 1.0 / 11) * s + 1.0 / 9) * s + 1.0 / 7) * s + 0.2) * s + 1.0 / 3) * s + 1.0
    value = tl.where(x > 20.0, x, tl.where(x < 0.0, 0.0, x) + 2.0 * r * series)
    return value, tl.where(x > 20.0, 1.0, sigmoid(x))
