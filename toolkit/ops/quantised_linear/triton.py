"""``quantised_linear`` on a GPU: the weight is dequantised for the call, then ``linear``'s kernels."""

from collections.abc import Sequence

from torch import Tensor

from toolkit.ops.linear import cuda_backward
from toolkit.ops.linear import triton as dense
from toolkit.ops.quantised_linear.reference import dequantise, split_scales

__all__ = ["dequantise", "quantised_linear", "quantised_linear_backward", "quantised_linear_group"]


def quantised_linear(
    x: Tensor, codes: Tensor, scales: Sequence[Tensor], bias: Tensor | None, format: str, outputs: int
) -> Tensor:
    """``toolkit::quantised_linear``: bitwise identical to ``toolkit::linear`` of the dequantised weight."""
    return dense.linear(x, dequantise(codes, scales, format, outputs, x.shape[-1], x.dtype), bias)


def quantised_linear_backward(
    grad: Tensor, codes: Tensor, scales: Sequence[Tensor], format: str, inputs: int, need_x: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """``toolkit::quantised_linear_backward``: bitwise identical to ``toolkit::linear_backward``."""
    weight = dequantise(codes, scales, format, grad.shape[-1], inputs, grad.dtype)
    x = grad.new_empty(()).expand(*grad.shape[:-1], inputs)  # of which only shape and dtype are read
    to_x, _, to_bias = cuda_backward.linear_backward(grad, x, weight, need_x, False, need_bias)
    return to_x, to_bias


def quantised_linear_group(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scale_counts: Sequence[int],
    biases: Sequence[Tensor | None],
    formats: Sequence[str],
    outputs: Sequence[int],
) -> list[Tensor]:
    """``toolkit::quantised_linear_group``: one GEMM after another."""
    parts = zip(codes, split_scales(scales, scale_counts), biases, formats, outputs, strict=True)
    return [quantised_linear(x, *part) for part in parts]
