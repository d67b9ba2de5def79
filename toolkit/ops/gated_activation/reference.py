"""Gated activation in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.rowwise import elementwise, upcast


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``f(gate) * up``, or ``f(gate, up)``, in float32 (float64 for float64), rounded once to gate's dtype.

    Differentiable. An element's bits depend on it alone.
    """
    g, u, function = upcast(gate), upcast(up, gate), find(kind)
    if function.arguments == 2:
        return elementwise(function.value, g, u).to(gate.dtype)
    return (elementwise(function.value, g) * u).to(gate.dtype)


def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``grad * up * f'(gate)`` and ``grad * f(gate)``; of ``f(gate, up)``, grad times its two slopes."""
    d, g, u, function = upcast(grad, gate), upcast(gate), upcast(up, gate), find(kind)
    if function.arguments == 2:
        to_gate, to_up = (elementwise(lambda g, u, i=i: function.derivative(g, u)[i], g, u) for i in (0, 1))
        return (d * to_gate).to(gate.dtype), (d * to_up).to(up.dtype)
    to_gate = d * u * elementwise(function.derivative, g)
    return to_gate.to(gate.dtype), (d * elementwise(function.value, g)).to(up.dtype)


def gated_activation_fake(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)


def gated_activation_backward_fake(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    return (
        torch.empty(gate.shape, dtype=gate.dtype, device=gate.device),
        torch.empty(up.shape, dtype=up.dtype, device=up.device),
    )
