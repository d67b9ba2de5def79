"""Activation functions as ops, in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.rowwise import elementwise, upcast


def activation(x: Tensor, kind: str) -> Tensor:
    """f(x) in float32 (float64 for float64), rounded once. Differentiable.

    An element's bits depend on that element alone.
    """
    return elementwise(find(kind, plain=True).value, upcast(x)).to(x.dtype)


def activation_backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """``grad * f'(x)`` in float32 (float64 for float64), rounded once."""
    x_up = upcast(x)
    return (upcast(grad, x) * elementwise(find(kind, plain=True).derivative, x_up)).to(x.dtype)


def activation_fake(x: Tensor, kind: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def activation_backward_fake(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
