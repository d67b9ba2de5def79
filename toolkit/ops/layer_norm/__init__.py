"""Layer norm over the last dimension (Ba, Kiros and Hinton, 2016)."""

from torch import Tensor

from toolkit.ops.layer_norm import reference
from toolkit.ops.registry import Op, register_differentiable
from toolkit.ops.rowwise import check_row

_OP: Op[Tensor]
_OP, _ = register_differentiable(
    "layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> Tensor",
    "layer_norm_backward(Tensor grad, Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)",
    gradients=("x", "weight", "bias"),
    reference=reference,
    triton="toolkit.ops.layer_norm.triton",
)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, *, impl: str | None = None) -> Tensor:
    """``(x - mean) / sqrt(variance + eps) * weight + bias`` over the last dimension.

    Args:
        x: [..., N]; float32, float64, bfloat16 or float16.
        weight: [N], or None for ones.
        bias: [N], or None for zeros.
        eps: added to the variance, which divides by N.

    Returns:
        [..., N] in x's dtype, contiguous.

    Raises:
        ToolkitError: for a weight or bias of another shape, other dtypes; on Triton float64 and N above 32768.

    Numerics: computed in float32 (float64 for float64) and rounded once. Output and dx are batch-invariant. The
    gradients of weight and bias sum rows in an order set by their number and width only, for any number of threads.
    Saved for backward: x, weight, bias.
    Source: Ba, Kiros and Hinton, "Layer Normalization" (2016).
    """
    check_row("weight", weight, x)
    check_row("bias", bias, x)
    return _OP.select(impl)(x, weight, bias, eps)
