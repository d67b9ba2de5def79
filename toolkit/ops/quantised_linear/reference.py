"""The specification of ``quantised_linear`` in plain torch: the dense weight, then ``linear``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.ops.linear import reference as dense
from toolkit.ops.quantised_linear.formats import find


def dequantise(
    codes: Tensor, scales: Sequence[Tensor], format: str, outputs: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """The weight [outputs, inputs]: computed in float32, each operation rounded, then rounded once to ``dtype``."""
    return find(format).dequantise(codes, scales, outputs, inputs).to(dtype)


def dequantise_fake(
    codes: Tensor, scales: Sequence[Tensor], format: str, outputs: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((outputs, inputs), dtype=dtype)


def quantised_linear(
    x: Tensor, codes: Tensor, scales: Sequence[Tensor], bias: Tensor | None, format: str, outputs: int
) -> Tensor:
    """``linear(x, dequantise(...), bias)`` of the reference: x [..., K] to [..., outputs]."""
    return dense.linear(x, dequantise(codes, scales, format, outputs, x.shape[-1], x.dtype), bias)


def quantised_linear_fake(
    x: Tensor, codes: Tensor, scales: Sequence[Tensor], bias: Tensor | None, format: str, outputs: int
) -> Tensor:
    return x.new_empty((*x.shape[:-1], outputs))


def quantised_linear_backward(
    grad: Tensor, codes: Tensor, scales: Sequence[Tensor], format: str, inputs: int, need_x: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to x and bias, as ``linear_backward`` has them; an empty tensor for one that is not needed."""
    weight = dequantise(codes, scales, format, grad.shape[-1], inputs, grad.dtype)
    x = grad.new_empty(()).expand(*grad.shape[:-1], inputs)  # of which only the shape is read
    to_x, _, to_bias = dense.linear_backward(grad, x, weight, need_x, False, need_bias)
    return to_x, to_bias


def quantised_linear_backward_fake(
    grad: Tensor, codes: Tensor, scales: Sequence[Tensor], format: str, inputs: int, need_x: bool, need_bias: bool
) -> tuple[Tensor, Tensor]:
    return (
        grad.new_empty((*grad.shape[:-1], inputs) if need_x else 0),
        grad.new_empty(grad.shape[-1] if need_bias else 0),
    )


def split_scales(scales: Sequence[Tensor], counts: Sequence[int]) -> list[list[Tensor]]:
    """The scales of each weight of a group, from all of them one after the other."""
    ends = [sum(counts[: i + 1]) for i in range(len(counts))]
    return [list(scales[end - count : end]) for end, count in zip(ends, counts)]


def quantised_linear_group(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scale_counts: Sequence[int],
    biases: Sequence[Tensor | None],
    formats: Sequence[str],
    outputs: Sequence[int],
) -> list[Tensor]:
    """``quantised_linear`` of one x with several weights."""
    parts = zip(codes, split_scales(scales, scale_counts), biases, formats, outputs, strict=True)
    return [quantised_linear(x, *part) for part in parts]


def quantised_linear_group_fake(
    x: Tensor,
    codes: Sequence[Tensor],
    scales: Sequence[Tensor],
    scale_counts: Sequence[int],
    biases: Sequence[Tensor | None],
    formats: Sequence[str],
    outputs: Sequence[int],
) -> list[Tensor]:
    return [x.new_empty((*x.shape[:-1], width)) for width in outputs]
