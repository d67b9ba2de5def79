"""Linear layers whose output rows have the same bits in any batch."""

from typing import Any

import torch
from torch import Tensor

from toolkit.ops.linear import linear


def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``linear`` as a module calls it: inside of autocast in autocast's dtype, as ``torch.nn.functional.linear``."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    return linear(x, weight, bias)


def linear_forward(self: Any, input: Tensor) -> Tensor:
    """Forward of ``nn.Linear`` in the bitwise tier; input [..., K] gives [..., N]."""
    return product(input, self.weight, self.bias)


def transposed_linear_forward(self: Any, input: Tensor) -> Tensor:
    """The same with a weight [K, N], as GPT-2's layers keep it; the weight is copied in turn at every call."""
    return product(input, self.weight.t(), self.bias)
