"""Linear layers whose output rows have the same bits in any batch."""

from torch import Tensor, nn

from toolkit.ops.linear import linear


def linear_forward(self: nn.Linear, input: Tensor) -> Tensor:
    """Forward of ``nn.Linear`` in the bitwise tier; input [..., K] gives [..., N]."""
    return linear(input, self.weight, self.bias)
