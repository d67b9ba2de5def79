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

    kind: ``silu``, ``gelu``, ``gelu_tanh``, ``relu``, ``relu2`` as in ``toolkit.ops.activation``; ``clamped_swiglu``
    g sigmoid(1.702 g) (u + 1), g = min(gate, 7) and u = up clamped to [-7, 7] (gpt-oss). A file of
    ``toolkit/ops/activation/kinds`` each.
    gate, up: [..., N], equal shapes; rows may be strided (the two halves of one projection cost no copy);
    float32, float64, bfloat16 or float16 (the last two computed in float32, rounded once; Triton has no float64).
    Returns gate's shape and dtype, contiguous. Saved for backward: gate and up; f is computed again.
    An element's bits depend on gate and up there alone.
    Errors: ToolkitError for another kind or shapes that differ; other dtypes.
    """
    find(kind)
    if gate.shape != up.shape:
        raise ToolkitError(f"gate has shape {list(gate.shape)}, up {list(up.shape)}; they must be equal.")
    return _OP.select(impl)(gate, up, kind)
