"""Batch-invariant linear layers."""

from typing import Any

import torch
from torch import Tensor

from toolkit.ops.linear import linear


def autocast_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``toolkit.ops.linear`` of x [..., K]: [..., N]; inside autocast in its dtype, as ``torch.nn.functional.linear``.

    Args:
        weight: [N, K].
        bias: [N] or None.
    """
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return linear(x, weight, bias)


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """Forward of ``nn.Linear`` in bitwise mode: input [..., K] to [..., N]."""
    return autocast_linear(input, self.weight, self.bias)


def transposed_linear_forward(self: Any, input: Tensor) -> Tensor:
    """Forward of GPT-2's ``Conv1D``, whose weight is [K, N]; every call copies the weight transposed."""
    return autocast_linear(input, self.weight.t(), self.bias)
