"""A batch-invariant GEMM with a weight: x W^T + bias."""

from collections.abc import Sequence

import torch

from toolkit.ops.linear import reference
from toolkit.ops.registry import Op, register, register_differentiable

__all__ = ["linear", "linear_group"]

_OP: Op[torch.Tensor]
_OP, _ = register_differentiable(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    "linear_backward(Tensor grad, Tensor x, Tensor weight, bool need_x, bool need_weight, bool need_bias)"
    " -> (Tensor, Tensor, Tensor)",
    gradients=("x", "weight", "bias"),
    reference=reference,
    triton="toolkit.ops.linear.triton",
    triton_backward="toolkit.ops.linear.cuda_backward",
)
_GROUP = register(
    "linear_group(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    reference=reference.linear_group,
    fake=reference.linear_group_fake,
    triton="toolkit.ops.linear.triton.linear_group",
)


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, *, impl: str | None = None
) -> torch.Tensor:
    """``y[..., n] = sum_k x[..., k] * weight[n, k] + bias[n]``: x W^T + bias.

    Args:
        x: [..., K]; float32, float64, bfloat16 or float16.
        weight: [N, K], read in place in this layout; x's dtype.
        bias: [N] in x's dtype, or None.
        impl: None (by device), "reference", "cpu" or "triton".

    Returns:
        [..., N] in x's dtype.

    Raises:
        ToolkitError, RuntimeError: for shapes or dtypes that do not fit.
        ToolkitError: for an ``impl`` that is not available.

    Numerics: batch-invariant. bfloat16 and float16 are added in float32 and rounded once; bfloat16 by pairs of k where
    the processor multiplies them (``toolkit.ops.native.family``). On CPU, with any number of threads: sums run over
    blocks of 256 k (128 of float64, 512 of pairs), in a block one chain of fused multiply-adds over ascending k, the
    blocks' sums added in order, the bias last. On CUDA (Triton; no float64): one float32 sum over steps of k in
    ascending order, by a tile that goes by device, dtype and N. A NaN or infinity stays in its row.
    The gradient of x is the same GEMM over ascending n, batch-invariant too. Gradients of weight and bias add rows in
    ascending order, on CPU in blocks of equal size of at most 2048 bytes of one column, the blocks' sums in order; on
    CUDA they are cuBLAS's, deterministic from run to run. Saved for backward: x and weight.
    """
    return _OP.select(impl)(x, weight, bias)


def linear_group(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    *,
    impl: str | None = None,
) -> list[torch.Tensor]:
    """``[linear(x, weight, bias) for weight, bias in zip(weights, biases)]``, bitwise identical, in one parallel
    section.

    For GEMMs of few rows, whose time goes to waking threads and to the last thread of each. No gradient.

    Args:
        x: [..., K].
        weights: [N_i, K] each.
        biases: [N_i] or None each.

    Returns:
        [..., N_i] each.
    """
    return _GROUP.select(impl)(x, list(weights), list(biases))
