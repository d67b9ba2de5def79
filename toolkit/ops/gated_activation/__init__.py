"""Gated activation: the pointwise middle of a gated MLP (Shazeer, 2020)."""

from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.activation.kinds import find
from toolkit.ops.gated_activation import reference
from toolkit.ops.registry import Op, register_differentiable

_OP: Op[Tensor]
_OP, _ = register_differentiable(
    "gated_activation(Tensor gate, Tensor up, str kind) -> Tensor",
    "gated_activation_backward(Tensor grad, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor)",
    gradients=("gate", "up"),
    reference=reference,
    triton="toolkit.ops.gated_activation.triton",
)


def gated_activation(gate: Tensor, up: Tensor, kind: str, *, impl: str | None = None) -> Tensor:
    """``f(gate) * up``, f a kind of ``toolkit.ops.activation``; or a gate of two arguments, ``f(gate, up)``.

    Args:
        gate: [..., N]; float32, float64, bfloat16 or float16. Rows may be strided: the halves of one projection cost no
            copy.
        up: gate's shape.
        kind: a file of ``toolkit/ops/activation/kinds``: ``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2``, or
            ``clamped_swiglu`` g sigmoid(1.702 g) (u + 1), g = min(gate, 7), u = up clamped to [-7, 7] (gpt-oss).

    Returns:
        gate's shape and dtype, contiguous.

    Raises:
        ToolkitError: for another kind or dtype, or shapes that differ.

    Numerics: computed in float32 (float64 for float64, which Triton does not take) and rounded once. An element depends
    on that element of gate and up alone. Saved for backward: gate and up; f is recomputed.
    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    find(kind)
    if gate.shape != up.shape:
        raise ToolkitError(f"gate and up must have equal shapes, got {list(gate.shape)} and {list(up.shape)}.")
    return _OP.select(impl)(gate, up, kind)
