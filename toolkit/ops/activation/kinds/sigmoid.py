"""sigmoid: 1 / (1 + e^-x)."""

from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from toolkit.ops.activation.triton_functions import sigmoid, sigmoid_both


def value(x: Tensor) -> Tensor:
    return x.sigmoid()


def derivative(x: Tensor) -> Tensor:
    return x.sigmoid() * (-x).sigmoid()


def triton_value(x):
    return sigmoid(x)


def triton_both(x):
    s, rest = sigmoid_both(x)
    return s, s * rest
