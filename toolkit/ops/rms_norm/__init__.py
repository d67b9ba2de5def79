"""Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019)."""

from typing import Any

from torch import Tensor

from toolkit.ops.registry import register
from toolkit.ops.rms_norm import reference
from toolkit.ops.rowwise import check_row


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
    x, weight = ctx.saved_tensors
    dx, dw = _BACKWARD(grad, x, weight, ctx.eps, ctx.offset)
    return dx, None if weight is None else dw, None, None


def _triton(*args: Any) -> Tensor:
    from toolkit.ops.rms_norm import triton

    return triton.rms_norm(*args)


def _triton_backward(*args: Any) -> tuple[Tensor, Tensor]:
    from toolkit.ops.rms_norm import triton

    return triton.rms_norm_backward(*args)


_BACKWARD = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)",
    reference=reference.rms_norm_backward,
    fake=reference.rms_norm_backward_fake,
    triton=_triton_backward,
)
_FORWARD = register(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor",
    reference=reference.rms_norm,
    fake=reference.rms_norm_fake,
    triton=_triton,
    backward=_backward,
    setup_context=_setup_context,
)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, *, impl: str | None = None) -> Tensor:
    """``x / sqrt(mean(x^2, -1) + eps) * (offset + weight)``; without a weight the last factor is 1.

    x: [..., N]; float32, float64, bfloat16 or float16 (the last two computed in float32, rounded once).
    weight: [N] or None. offset: 1.0 for models that store the weight minus one.
    Returns [..., N] in x's dtype, contiguous. Saved for backward: x and weight.
    On CPU a row's bits, of the output and of its gradient, depend on that row alone; the weight's gradient
    sums rows in an order set by their number only, whatever the number of threads.
    Errors: ToolkitError for a weight of another shape; other dtypes.
    """
    check_row("weight", weight, x)
    return _FORWARD.select(impl)(x, weight, eps, offset)
