"""The specification of ``linear`` in plain torch; also what runs on CPU without the native library."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F

_MULTIPLE = 8  # of k, with zeros
_ROWS = 32  # per call of the MKL GEMM: the bits of a row depend on how many rows it is called for


def linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    """``y = x @ weight.T + bias``: x ``[..., K]``, weight ``[N, K]``, bias ``[N]`` or None, y ``[..., N]``.

    On CPU, rows go to MKL 32 at a time, the last ones padded with zeros, as K is to a multiple of 8; bfloat16 and
    float16 are computed in float32 and rounded once. MKL is then batch-invariant with a given number of threads:
    measured on AVX2 and AVX-512 with torch 2.13 for float32 and float64, not guaranteed by it elsewhere. On other
    devices this is ``torch.nn.functional.linear``.
    """
    if x.device.type != "cpu":
        return F.linear(x, weight, bias)
    compute = torch.float64 if x.dtype == torch.float64 else torch.float32
    count, inner = x.shape[:-1].numel(), x.shape[-1]
    rows = F.pad(x.reshape(count, inner).to(compute), (0, -inner % _MULTIPLE, 0, -count % _ROWS)).contiguous()
    matrix = F.pad(weight.to(compute), (0, -inner % _MULTIPLE)).contiguous()
    shift = None if bias is None else bias.to(compute).contiguous()
    out = torch.cat([F.linear(some, matrix, shift) for some in rows.split(_ROWS)])
    # No view: a model may write into it.
    return out[:count].reshape(*x.shape[:-1], weight.shape[0]).to(x.dtype, copy=True)


def linear_fake(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


def linear_backward(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients to x, weight and bias; an empty tensor for one that is not needed.

    ``dx = g W``, as ``linear`` of g with W transposed; ``dW = g^T x`` and ``db = sum g`` over all rows. On CPU
    bfloat16 and float16 are computed in float32 and rounded once.
    """
    none = x.new_empty(0)
    to_x, to_weight, to_bias = none, none.clone(), none.clone()
    # MKL GEMMs of 16-bit tensors are hundreds of times slower than converting.
    compute = torch.float32 if grad.device.type == "cpu" and grad.itemsize == 2 else grad.dtype
    # math.prod, unlike torch.Size.numel, leaves sizes that a compiler keeps open open.
    rows = grad.reshape(math.prod(x.shape[:-1]), weight.shape[0]).to(compute)
    if need_x:
        to_x = linear(rows, weight.t().to(compute)).to(x.dtype).view(x.shape)
    if need_weight:
        to_weight = torch.mm(rows.t(), x.reshape(rows.shape[0], x.shape[-1]).to(compute)).to(weight.dtype)
    if need_bias:
        to_bias = rows.sum(0).to(grad.dtype)
    return to_x, to_weight, to_bias


def linear_backward_fake(
    grad: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    none = x.new_empty(0)
    return (
        x.new_empty(x.shape) if need_x else none,
        x.new_empty(weight.shape) if need_weight else none.clone(),
        x.new_empty(weight.shape[0]) if need_bias else none.clone(),
    )


def linear_group(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    """``linear`` of one x with several weights, each with its bias or None."""
    return [linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]


def linear_group_fake(
    x: torch.Tensor, weights: Sequence[torch.Tensor], biases: Sequence[torch.Tensor | None]
) -> list[torch.Tensor]:
    return [linear_fake(x, weight, bias) for weight, bias in zip(weights, biases, strict=True)]
