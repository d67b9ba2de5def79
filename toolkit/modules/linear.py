"""Batch-invariant linear layers."""

from typing import Any

from torch import Tensor

from toolkit.modules.autocast import autocast_inputs
from toolkit.ops.linear import linear


def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``toolkit.ops.linear`` of x [..., K]: [..., N]; inside autocast in its dtype, as ``torch.nn.functional.linear``.

    Args:
        weight: [N, K].
        bias: [N] or None.
    """
    x, weight, *biases = autocast_inputs(x, weight, *([] if bias is None else [bias]))
    return linear(x, weight, *biases)


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """Forward of ``nn.Linear`` in bitwise mode: input [..., K] to [..., N]."""
    return autocast_linear(input, self.weight, self.bias)


def transposed_linear_forward(self: Any, input: Tensor) -> Tensor:
    """Forward of GPT-2's ``Conv1D``, whose weight is [K, N]; every call copies the weight transposed."""
    return autocast_linear(input, self.weight.t(), self.bias)
