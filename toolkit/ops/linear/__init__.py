"""A batch-invariant GEMM with a weight: x W^T + bias."""

import math
from collections.abc import Sequence
from typing import Any

import torch

from toolkit.ops.linear.reference import linear_group_reference, linear_reference
from toolkit.ops.registry import register

__all__ = ["linear", "linear_group", "linear_reference"]


def _fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    x, weight, _ = inputs
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]:
    x, weight = ctx.saved_tensors
    need_x, need_weight, need_bias = ctx.needs_input_grad
    # MKL GEMMs of 16-bit tensors are hundreds of times slower than converting.
    compute = torch.float32 if grad.device.type == "cpu" and grad.itemsize == 2 else grad.dtype
    # math.prod, unlike torch.Size.numel, leaves sizes that a compiler keeps open open.
    rows = grad.reshape(math.prod(x.shape[:-1]), weight.shape[0]).to(compute)
    grad_x = grad_weight = grad_bias = None
    if need_x:
        grad_x = torch.mm(rows, weight.to(compute)).to(x.dtype).view(x.shape)
    if need_weight:
        grad_weight = torch.mm(rows.t(), x.reshape(rows.shape[0], x.shape[-1]).to(compute)).to(weight.dtype)
    if need_bias:
        grad_bias = rows.sum(0).to(grad.dtype)
    return grad_x, grad_weight, grad_bias


def _group_fake(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    return [_fake(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


_OP = register(
    "linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor",
    reference=linear_reference,
    fake=_fake,
    triton="toolkit.ops.linear.triton.linear",
    backward=_backward,
    setup_context=_setup_context,
)
_GROUP = register(
    "linear_group(Tensor x, Tensor[] weights, Tensor?[] biases) -> Tensor[]",
    reference=linear_group_reference,
    fake=_group_fake,
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

    Numerics: batch-invariant. bfloat16 and float16 are added in float32 and rounded once. On CPU, with any number of
    threads: sums run over blocks of 1024 bytes of k, in a block one chain of fused multiply-adds over ascending k, the
    blocks' sums added in order, the bias last. On CUDA (Triton; no float64): one float32 sum over steps of k in
    ascending order, by a tile that goes by device, dtype and N. A NaN or infinity stays in its row. Gradients are
    cuBLAS / MKL GEMMs, deterministic from run to run. Saved for backward: x and weight.
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
