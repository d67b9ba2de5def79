"""The products and the activation of a gated MLP in plain torch: the specification."""

from torch import Tensor

from toolkit.ops.gated_activation import gated_activation
from toolkit.ops.linear import linear_group


def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    kind: str,
) -> Tensor:
    """The ops one after the other, by the device of their tensors."""
    gate, up = linear_group(x, [gate_weight, up_weight], [gate_bias, up_bias])
    return gated_activation(gate, up, kind)


def gated_linear_fake(x: Tensor, gate_weight: Tensor, *given: object) -> Tensor:
    return x.new_empty(*x.shape[:-1], gate_weight.shape[0])
