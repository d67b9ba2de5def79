"""Root-mean-square norm in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.rowwise import row_sum, upcast


def _reciprocal_rms(x: Tensor, eps: float) -> Tensor:
    return 1 / (row_sum(x * x) / x.shape[-1] + eps).sqrt()


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * (offset + weight)`` in float32 (float64 for float64).

    Rounded once to x's dtype. Differentiable. A row's bits do not depend on the other rows.
    """
    x_up = upcast(x)
    y = x_up * _reciprocal_rms(x_up, eps)
    if weight is not None:
        y = y * (offset + weight.to(y.dtype))
    return y.to(x.dtype)


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients to x and weight (empty without a weight).

    With ``s = 1/rms(x)``, ``f = offset + weight``: ``dx = s (g f - x s^2 mean(g f x))``, ``dw = sum g x s``.
    """
    dx, dw = _gradients(grad, x, weight, eps, offset)
    return dx.to(x.dtype), dw


def _gradients(grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float) -> tuple[Tensor, Tensor]:
    """``rms_norm_backward`` with dx as it is computed, not rounded."""
    x_up, g = upcast(x), upcast(grad, x)
    scale = _reciprocal_rms(x_up, eps)
    gf = g if weight is None else g * (offset + weight.to(g.dtype))
    dx = scale * (gf - x_up * (scale * scale * row_sum(gf * x_up) / x.shape[-1]))
    if weight is None:
        return dx, x.new_empty(0)
    dw = (g * (x_up * scale)).reshape(-1, x.shape[-1]).sum(0)
    return dx, dw.to(weight.dtype)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """``rms_norm(sum)`` and ``sum``, which is ``x + residual`` rounded to x's dtype. Differentiable."""
    total = x + residual
    return rms_norm(total, weight, eps, offset), total


def add_rms_norm_backward(
    grad: Tensor, grad_sum: Tensor, total: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """Gradients to x (and, the same one, to residual) and to weight: those of ``rms_norm``, plus ``grad_sum``.

    The addition comes before the one rounding.
    """
    dx, dw = _gradients(grad, total, weight, eps, offset)
    return (dx + upcast(grad_sum, total)).to(total.dtype), dw


def rms_norm_fake(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rms_norm_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return dx, x.new_empty(0) if weight is None else torch.empty_like(weight, memory_format=torch.contiguous_format)


def add_rms_norm_fake(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    return rms_norm_fake(x, weight, eps, offset), rms_norm_fake(x, weight, eps, offset)


def add_rms_norm_backward_fake(
    grad: Tensor, grad_sum: Tensor, total: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    return rms_norm_backward_fake(grad, total, weight, eps, offset)
