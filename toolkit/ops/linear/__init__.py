"""Matrix product with a weight, whose rows keep their bits whatever other rows are computed beside them."""

from typing import Any

import torch

from toolkit.ops.linear.reference import linear_reference
from toolkit.ops.registry import register

__all__ = ["linear", "linear_reference"]


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    # The vendor's CPU products of 16-bit tensors are hundreds of times slower than converting.
    wide = torch.float32 if grad.device.type == "cpu" and grad.itemsize == 2 else grad.dtype
    rows = grad.reshape(x.shape[:-1].numel(), weight.shape[0]).to(wide)
    grad_x = grad_weight = grad_bias = None
    if need_x:
        grad_x = torch.mm(rows, weight.to(wide)).to(x.dtype).view(x.shape)
    if need_weight:
        grad_weight = torch.mm(rows.t(), x.reshape(rows.shape[0], x.shape[-1]).to(wide)).to(weight.dtype)
    if need_bias:
        grad_bias = rows.sum(0).to(grad.dtype)
    return grad_x, grad_weight, grad_bias


_OP = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_reference,
    fake=_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, impl: str | None = None
) -> torch.Tensor:
    """``y[..., n] = sum_k x[..., k] * weight[n, k] + bias[n]``.

    x: ``[..., K]``; weight: ``[N, K]``, read in place in this layout; bias: ``[N]`` or None; y: ``[..., N]``. All of
    one dtype: float32, float64, bfloat16 or float16 (the last two add in float32 and round once).

    Numerics: on CPU a row of y has the same bits for any number of rows, any neighbours and any number of threads:
    sums run over blocks of 256 k, in a block one chain of fused multiply-adds over ascending k, the blocks' sums added
    in order, the bias last. A NaN or infinity stays in its row. Gradients are the vendor's products:
    the same from run to run.

    Saved for backward: x and weight. impl: None (by device), "reference" or "cpu".
    Raises RuntimeError when shapes or dtypes do not fit, ToolkitError for an ``impl`` that is not available.
    """
    return _OP.select(impl)(x, weight, bias)
