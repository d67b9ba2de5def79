"""Layer norm over the last dimension (Ba, Kiros and Hinton, 2016)."""

from typing import Any

from torch import Tensor

from toolkit.ops.layer_norm import reference
from toolkit.ops.registry import register
from toolkit.ops.rowwise import check_row


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, bias, ctx.eps = inputs
    ctx.save_for_backward(x, weight, bias)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, None]:
    x, weight, bias = ctx.saved_tensors
    dx, dw, db = _BACKWARD(grad, x, weight, bias, ctx.eps)
    return dx, None if weight is None else dw, None if bias is None else db, None


_BACKWARD = register(
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    reference=reference.layer_norm_backward,
    fake=reference.layer_norm_backward_fake,
    triton="toolkit.ops.layer_norm.triton.layer_norm_backward",
)
_FORWARD = register(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    reference=reference.layer_norm,
    fake=reference.layer_norm_fake,
    triton="toolkit.ops.layer_norm.triton.layer_norm",
    backward=_backward,
    setup_context=_setup_context,
)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, impl: str | None = None) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension.

    x: [..., N]; float32, float64, bfloat16 or float16 (the last two computed in float32, rounded once).
    weight, bias: [N] or None, each on its own. The variance divides by N.
    Returns [..., N] in x's dtype, contiguous. Saved for backward: x, weight, bias.
    A row's bits, of the output and of its gradient, depend on that row alone; the gradients of weight and bias sum
    rows in an order set by their number and width only, whatever the number of threads.
    Errors: ToolkitError for a weight or bias of another shape; other dtypes; on Triton float64 and N above 32768.
    """
    check_row("weight", weight, x)
    check_row("bias", bias, x)
    return _FORWARD.select(impl)(x, weight, bias, eps)
