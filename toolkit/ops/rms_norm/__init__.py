"""Root-mean-square norm over the last dimension (Zhang and Sennrich, 2019), of x or of x plus a residual."""

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.registry import Op, register_differentiable
from toolkit.ops.rms_norm import reference
from toolkit.ops.rowwise import check_row

_OP: Op[Tensor]
_OP, _ = register_differentiable(
    "rms_norm(Tensor x, Tensor? weight, float eps, float offset) -> Tensor",
    "rms_norm_backward(Tensor grad, Tensor x, Tensor? weight, float eps, float offset) -> (Tensor, Tensor)",
    gradients=("x", "weight"),
    reference=reference,
    triton="toolkit.ops.rms_norm.triton",
)
_ADD: Op[tuple[Tensor, Tensor]]
_ADD, _ = register_differentiable(
    "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float offset) -> (Tensor normed, Tensor sum)",
    "add_rms_norm_backward(Tensor grad_normed, Tensor grad_sum, Tensor sum, Tensor? weight, float eps, float offset)"
    " -> (Tensor, Tensor)",
    gradients=(("x", "residual"), "weight"),
    reference=reference,
    triton="toolkit.ops.rms_norm.triton",
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
    return _OP.select(impl)(x, weight, eps, offset)


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
    return _ADD.select(impl)(x, residual, weight, eps, offset)
