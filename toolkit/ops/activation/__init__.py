"""Pointwise activation functions."""

from typing import Any

from torch import Tensor

from toolkit.ops.activation import reference
from toolkit.ops.activation.functions import KINDS, find
from toolkit.ops.registry import register


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, ctx.kind = inputs
    ctx.save_for_backward(x)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    (x,) = ctx.saved_tensors
    return _BACKWARD(grad, x, ctx.kind), None


_BACKWARD = register(
    "activation_backward(Tensor grad, Tensor x, str kind) -> Tensor",
    reference=reference.activation_backward,
    fake=reference.activation_backward_fake,
)
_FORWARD = register(
    "activation(Tensor x, str kind) -> Tensor",
    reference=reference.activation,
    fake=reference.activation_fake,
    backward=_backward,
    setup_context=_setup_context,
)


def activation(x: Tensor, kind: str, *, impl: str | None = None) -> Tensor:
    """An activation function, element by element.

    kind: ``silu`` x sigmoid(x); ``gelu`` x Phi(x), Phi the normal distribution function; ``gelu_tanh``
    x (1 + tanh(sqrt(2/pi) (x + 0.044715 x^3))) / 2; ``relu`` max(x, 0); ``relu2`` max(x, 0)^2.
    x: any shape; float32, float64, bfloat16 or float16 (the last two computed in float32, rounded once).
    Returns x's shape and dtype, contiguous. Saved for backward: x. Limits at infinity are exact, in the value
    and in the gradient. On CPU an element's bits depend on that element alone.
    Errors: ToolkitError for another kind.
    """
    if kind not in KINDS:
        find(kind)
    return _FORWARD.select(impl)(x, kind)
