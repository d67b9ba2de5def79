"""clamped_swiglu: g sigmoid(1.702 g) (u + 1), g = min(gate, 7), u = up clamped to [-7, 7]; the gate of gpt-oss (2025).

The slope at a clamp's edge is the one inside, as torch has it.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    import triton.language as tl

    from toolkit.ops.activation.triton_functions import clamp, finite_below, sigmoid, sigmoid_both


def value(gate: Tensor, up: Tensor) -> Tensor:
    # Unlike clamp, where() lets the gradient of NaN be NaN; far below, g sigmoid is -0 for any g.
    g = torch.where(gate > 7, 7.0, torch.where(gate < -1e4, -1e4, gate))
    u = torch.where(up > 7, 7.0, torch.where(up < -7, -7.0, up))
    return g * (1.702 * g).sigmoid() * (u + 1)


def derivative(gate: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    g, u = gate.clamp(-1e4, 7), up.clamp(-7, 7)
    s = (1.702 * g).sigmoid()
    slope = s * (1 + 1.702 * g * (-1.702 * g).sigmoid())
    return torch.where(gate > 7, 0.0, slope * (u + 1)), torch.where(up.abs() > 7, 0.0, g * s)


def triton_value(gate, up):
    g = tl.where(gate > 7.0, 7.0, finite_below(gate))
    return g * sigmoid(g * 1.702) * (clamp(up, -7.0, 7.0) + 1.0)


def triton_both(gate, up):
    g = clamp(gate, -1e4, 7.0)
    s, rest = sigmoid_both(g * 1.702)
    lifted = clamp(up, -7.0, 7.0) + 1.0
    swish = g * s
    slope = s * (g * 1.702 * rest + 1.0) * lifted
    return swish * lifted, tl.where(gate > 7.0, 0.0, slope), tl.where(tl.abs(up) > 7.0, 0.0, swish)
