"""Short causal convolutions whose weights are made for each token (Inkling 2), over a ragged batch.

Shapes: T tokens, C channels in H heads, W width of the convolution.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from toolkit.state.active import forward_context_of

HIDDEN, SOURCE = "hidden_states", "dynamic_input"


def dynamic_convolution_forward(own: Callable[..., Any]) -> Callable[..., Any]:
    """``own``, a module's forward, which in a ragged batch reads the inputs before each token along its sequence."""
    signature = inspect.signature(own)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        given = signature.bind(self, *args, **kwargs).arguments
        context = forward_context_of(given.get("kwargs", {}))
        if context is None:
            return own(self, *args, **kwargs)
        hidden, width, heads = given[HIDDEN], self.conv_kernel_size, self.num_heads
        x = hidden[0].float()
        channels = x.shape[1]
        # The inputs of the last W tokens: a convolution that takes each of them whole, the newest first.
        taps = torch.eye(width, dtype=x.dtype, device=x.device).flip(1).repeat_interleave(channels, 0)
        inputs = context.convolve(self.layer_idx, x.repeat(1, width), taps, part=self.conv_idx)
        inputs = inputs.view(len(x), width, heads, -1)
        made = self.weight_proj(given[SOURCE])[0].float().view(len(x), heads, 1, width)
        weights = self.static_weight.float().T.reshape(heads, -1, width) + made
        total = inputs[:, 0] * weights[..., 0]
        for lag in range(1, width):
            total = total + inputs[:, lag] * weights[..., lag]
        out: Tensor = (total.flatten(1) + x) / math.sqrt(2 * width + 1)
        return out.to(hidden.dtype)[None]

    return forward


def is_dynamic_convolution(module: nn.Module) -> bool:
    """Whether a module has the parts of one."""
    static = getattr(module, "static_weight", None)
    projection = getattr(module, "weight_proj", None)
    settings = ("conv_kernel_size", "num_heads", "layer_idx", "conv_idx")
    known = isinstance(static, nn.Parameter) and isinstance(projection, nn.Linear)
    return known and all(name in module.__dict__ for name in settings)
