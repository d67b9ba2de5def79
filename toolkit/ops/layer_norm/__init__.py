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

    x: [..., N]; float32, float64, bfloat16 or float16 (the last two computed in float32, rounded once).
    weight, bias: [N] or None, each on its own. The variance divides by N.
    Returns [..., N] in x's dtype, contiguous. Saved for backward: x, weight, bias.
    A row's bits, of the output and of its gradient, depend on that row alone; the gradients of weight and bias sum
    rows in an order set by their number and width only, whatever the number of threads.
    Errors: ToolkitError for a weight or bias of another shape; other dtypes; on Triton float64 and N above 32768.
    """
    check_row("weight", weight, x)
    check_row("bias", bias, x)
    return _OP.select(impl)(x, weight, bias, eps)
