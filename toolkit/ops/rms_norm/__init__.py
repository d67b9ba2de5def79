"""Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), of x or of x plus a residual."""

from typing import Any

from torch import Tensor

from toolkit.errors import ToolkitError
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


def _add_setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    _, _, weight, ctx.eps, ctx.offset = inputs
    ctx.save_for_backward(output[1], weight)


def _add_backward(ctx: Any, grad: Tensor, grad_sum: Tensor) -> tuple[Tensor, Tensor, Tensor | None, None, None]:
    total, weight = ctx.saved_tensors
    dx, dw = _ADD_BACKWARD(grad, grad_sum, total, weight, ctx.eps, ctx.offset)
    return dx, dx, None if weight is None else dw, None, None


_BACKWARD = register(
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)",
    reference=reference.rms_norm_backward,
    fake=reference.rms_norm_backward_fake,
    triton="toolkit.ops.rms_norm.triton.rms_norm_backward",
)
_FORWARD = register(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor",
    reference=reference.rms_norm,
    fake=reference.rms_norm_fake,
    triton="toolkit.ops.rms_norm.triton.rms_norm",
    backward=_backward,
    setup_context=_setup_context,
)
_ADD_BACKWARD = register(
    "add_rms_norm_backward(Tensor grad, Tensor grad_sum, Tensor total, Tensor? weight, float eps, float offset)"
    " -> (Tensor, Tensor)",
    reference=reference.add_rms_norm_backward,
    fake=reference.add_rms_norm_backward_fake,
    triton="toolkit.ops.rms_norm.triton.add_rms_norm_backward",
)
_ADD_FORWARD = register(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset) -> (Tensor normed, Tensor sum)",
    reference=reference.add_rms_norm,
    fake=reference.add_rms_norm_fake,
    triton="toolkit.ops.rms_norm.triton.add_rms_norm",
    backward=_add_backward,
    setup_context=_add_setup_context,
)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, *, impl: str | None = None) -> Tensor:
    """``x / sqrt(mean(x^2, -1) + eps) * (offset + weight)``; without a weight the last factor is 1.

    x: [..., N]; float32, float64, bfloat16 or float16 (the last two computed in float32, rounded once).
    weight: [N] or None. offset: 1.0 for models that store the weight minus one.
    Returns [..., N] in x's dtype, contiguous. Saved for backward: x and weight.
    A row's bits, of the output and of its gradient, depend on that row alone; the weight's gradient sums rows in an
    order set by their number and width only, whatever the number of threads.
    Errors: ToolkitError for a weight of another shape; other dtypes; on Triton float64 and N above 32768.
    """
    check_row("weight", weight, x)
    return _FORWARD.select(impl)(x, weight, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(sum, weight, eps, offset), sum)``, with ``sum = x + residual`` rounded to their dtype, in one pass.

    x, residual: [..., N], of one shape and dtype; the rest as for ``rms_norm``, and so are the bits: they are those of
    ``rms_norm(x + residual, ...)``. Returns two of [..., N] in x's dtype, contiguous. Both results pass gradient, the
    same one to x and to residual, added before it is rounded once. Saved for backward: sum and weight.
    Errors: ToolkitError for a residual of another shape or dtype, and those of ``rms_norm``.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ToolkitError(
            f"residual has shape {list(residual.shape)} and dtype {residual.dtype}; x needs"
            f" {list(x.shape)} and {x.dtype} of it."
        )
    check_row("weight", weight, x)
    return _ADD_FORWARD.select(impl)(x, residual, weight, eps, offset)
