"""The first half of a gated MLP (Shazeer, 2020) as one op, for captured decode steps."""

from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.gated_linear import reference
from toolkit.ops.registry import register

__all__ = ["gated_linear"]

_OP = register(
    "gated_linear(Tensor x, Tensor gate_weight, Tensor up_weight, Tensor? gate_bias, Tensor? up_bias, str kind)"
    " -> Tensor",
    reference=reference.gated_linear,
    fake=reference.gated_linear_fake,
    triton="toolkit.ops.gated_linear.reference.gated_linear",  # the ops one after the other, by their own kernels
)


def gated_linear(
    x: Tensor,
    gate_weight: Tensor,
    up_weight: Tensor,
    gate_bias: Tensor | None,
    up_bias: Tensor | None,
    kind: str,
    *,
    impl: str | None = None,
) -> Tensor:
    """``gated_activation(linear(x, gate_weight, gate_bias), linear(x, up_weight, up_bias), kind)``. No gradient.

    Args:
        x: [..., K]; float32, float64, bfloat16 or float16.
        gate_weight, up_weight: [N, K] in x's dtype.
        gate_bias, up_bias: [N] in x's dtype, or None.
        kind: as for ``gated_activation``.
        impl: None (by device), "reference", "cpu" or "triton".

    Returns:
        [..., N] in x's dtype.

    Raises:
        ToolkitError, RuntimeError: for another kind, and for shapes or dtypes that do not fit.

    Numerics: bitwise identical to the ops one after the other, 16-bit gate and up rounded as they round them. On CUDA
    it is those ops.
    Source: Shazeer, "GLU Variants Improve Transformer" (2020).
    """
    find(kind)
    return _OP.select(impl)(x, gate_weight, up_weight, gate_bias, up_bias, kind)
