"""Normalisation layers on the row-wise ops."""

from collections.abc import Callable
from typing import Any, cast

from torch import Tensor, nn

from toolkit.ops.layer_norm import layer_norm
from toolkit.ops.rms_norm import rms_norm


def _epsilon(module: nn.Module, eps: float | str) -> float:
    return cast(float, getattr(module, eps)) if isinstance(eps, str) else eps


def rms_norm_forward(eps: float | str, offset: float) -> Callable[[nn.Module, Tensor], Tensor]:
    """Forward of an RMS norm: ``x * rsqrt(mean(x²) + eps) * (offset + weight)``; x [..., N].

    Args:
        eps: the value, or the name of the module's attribute.
    """

    def forward(self: nn.Module, hidden_states: Tensor, *more: Any, **others: Any) -> Tensor:
        if more or others:  # a gate, say: the module's own forward handles further arguments
            result: Tensor = type(self).forward(self, hidden_states, *more, **others)
            return result
        return rms_norm(hidden_states, getattr(self, "weight", None), _epsilon(self, eps), offset)

    return forward


def layer_norm_forward(eps: float | str, offset: float = 0.0) -> Callable[[nn.Module, Tensor], Tensor]:
    """Forward of a layer norm over the last dimension, scaled by ``offset + weight``; x [..., N].

    Args:
        eps: the value, or the name of the module's attribute.
    """

    def forward(self: nn.Module, hidden_states: Tensor) -> Tensor:
        weight: Tensor | None = getattr(self, "weight", None)
        if weight is not None and offset:
            weight = weight + offset
        return layer_norm(hidden_states, weight, getattr(self, "bias", None), _epsilon(self, eps))

    return forward
