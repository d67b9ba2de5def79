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

    Args:
        x: [..., N]; float32, float64, bfloat16 or float16.
        weight: [N] or None.
        eps: added to the mean square.
        offset: 1.0 for models that store the weight minus one (Gemma).

    Returns:
        [..., N] in x's dtype, contiguous.

    Raises:
        ToolkitError: for a weight of another shape, other dtypes; on Triton float64 and N above 32768.

    Numerics: computed in float32 (float64 for float64) and rounded once. Output and dx are batch-invariant. The
    weight's gradient sums rows in an order set by their number and width only, for any number of threads.
    Saved for backward: x and weight.
    Source: Zhang and Sennrich, "Root Mean Square Layer Normalization" (2019).
    """
    check_row("weight", weight, x)
    return _OP.select(impl)(x, weight, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float = 0.0, *, impl: str | None = None
) -> tuple[Tensor, Tensor]:
    """``(rms_norm(sum, weight, eps, offset), sum)``, with ``sum = x + residual`` rounded to their dtype, in one pass.

    Args:
        x: [..., N].
        residual: x's shape and dtype.
        weight, eps, offset: as for ``rms_norm``.

    Returns:
        Two tensors [..., N] in x's dtype, contiguous.

    Raises:
        ToolkitError: for a residual of another shape or dtype, and as ``rms_norm``.

    Numerics: bitwise identical to ``rms_norm(x + residual, ...)``. Both results pass gradient; x and residual get the
    same one, whose two parts are added before it is rounded once. Saved for backward: sum and weight.
    """
    if residual.shape != x.shape or residual.dtype != x.dtype:
        raise ToolkitError(
            f"residual must have the shape and dtype of x, {list(x.shape)} and {x.dtype},"
            f" got {list(residual.shape)} and {residual.dtype}."
        )
    check_row("weight", weight, x)
    return _ADD.select(impl)(x, residual, weight, eps, offset)
