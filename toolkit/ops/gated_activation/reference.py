"""Gated activation in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.activation.functions import find
from toolkit.ops.rowwise import elementwise, widened


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``f(gate) * up`` in float32 (float64 for float64), rounded once to gate's dtype.

    Differentiable. An element's bits depend on it alone.
    """
    wide = widened(gate)
    return (elementwise(find(kind).value, wide) * widened(up, gate)).to(gate.dtype)


def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``grad * up * f'(gate)`` and ``grad * f(gate)``."""
    wide = widened(gate)
    g, function = widened(grad, gate), find(kind)
    dgate = g * widened(up, gate) * elementwise(function.derivative, wide)
    return dgate.to(gate.dtype), (g * elementwise(function.value, wide)).to(up.dtype)


def gated_activation_fake(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def gated_activation_backward_fake(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(up.shape, dtype=up.dtype, device=up.device),
    )
