"""Layer norm in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.rowwise import row_sum, upcast


def _normalize(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x - mean) / sqrt(variance + eps), and that divisor's reciprocal."""
    centered = x - row_sum(x) / x.shape[-1]
    scale = 1 / (row_sum(centered * centered) / x.shape[-1] + eps).sqrt()
    return centered * scale, scale


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` in float32 (float64 for float64), rounded once.

    The variance is the mean square distance from the mean. Differentiable. A row's bits do not depend on the
    other rows.
    """
    y, _ = _normalize(upcast(x), eps)
    if weight is not None:
        y = y * weight.to(y.dtype)
    if bias is not None:
        y = y + bias.to(y.dtype)
    return y.to(x.dtype)


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, weight and bias (empty for a missing one).

    With ``h`` the normalized x and ``s`` its scale: ``dx = s (g w - mean(g w) - h mean(g w h))``,
    ``dw = sum g h``, ``db = sum g``.
    """
    g, width = upcast(grad, x), x.shape[-1]
    h, scale = _normalize(upcast(x), eps)
    gw = g if weight is None else g * weight.to(g.dtype)
    dx = scale * (gw - row_sum(gw) / width - h * (row_sum(gw * h) / width))
    dw = x.new_empty(0) if weight is None else (g * h).reshape(-1, width).sum(0).to(weight.dtype)
    db = x.new_empty(0) if bias is None else g.reshape(-1, width).sum(0).to(bias.dtype)
    return dx.to(x.dtype), dw, db


def layer_norm_fake(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def layer_norm_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    def like(p: Tensor | None) -> Tensor:
        return x.new_empty(0) if p is None else torch.empty(p.shape, dtype=p.dtype, device=p.device)

    return torch.empty(x.shape, dtype=x.dtype, device=x.device), like(weight), like(bias)
