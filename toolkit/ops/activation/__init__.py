"""Pointwise activation functions."""

from torch import Tensor

from toolkit.ops.activation import reference
from toolkit.ops.activation.kinds import KINDS, find, plain_kinds
from toolkit.ops.registry import Op, register_differentiable

__all__ = ["KINDS", "activation", "plain_kinds"]


_OP: Op[Tensor]
_OP, _ = register_differentiable(
    "activation(Tensor x, str kind) -> Tensor",
    "activation_backward(Tensor grad, Tensor x, str kind) -> Tensor",
    gradients=("x",),
    reference=reference,
    triton="toolkit.ops.activation.triton",
)


def activation(x: Tensor, kind: str, *, impl: str | None = None) -> Tensor:
    """An activation function, element by element.

    Args:
        x: any shape; float32, float64, bfloat16 or float16.
        kind: a file of ``toolkit/ops/activation/kinds`` with one argument. ``silu`` x sigmoid(x); ``gelu`` x Phi(x),
            Phi the normal distribution function; ``gelu_tanh`` x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2;
            ``relu`` max(x, 0); ``relu2`` max(x, 0)^2.

    Returns:
        x's shape and dtype, contiguous.

    Raises:
        ToolkitError: for another kind or dtype, or a kind of two arguments.

    Numerics: computed in float32 (float64 for float64, which Triton does not take) and rounded once. Limits at infinity
    are exact, in the value and in the gradient. An element depends on that element of x alone. Saved for backward: x.
    """
    find(kind, plain=True)
    return _OP.select(impl)(x, kind)
