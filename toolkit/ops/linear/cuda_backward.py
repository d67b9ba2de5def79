"""Backward of ``linear`` on CUDA: the gradient of x is the Triton grouped GEMM of one expert that has all rows.

The weight is read where it lies, transposed, with one reduction order over ascending steps of N: batch-invariant as
``linear`` is. Gradients of weight and bias are cuBLAS's, deterministic from run to run.
"""

import math

import torch
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.grouped_linear.triton import grouped_gemm
from toolkit.ops.grouped_linear.triton_gemm import ExpertMatrices


def gradient_of_rows(grad: Tensor, weight: Tensor) -> Tensor:
    """[rows, K]: ``grad`` [rows, N] times ``weight`` [N, K]."""
    rows = grad.shape[0]
    # A plan of one expert, which nothing on the host waits for: rows 0 to `rows`, in one tile. Its order is not read.
    offsets = torch.arange(2, device=grad.device) * rows
    tiles = torch.zeros(1, 2, dtype=torch.int64, device=grad.device)
    order = offsets.new_empty(rows)
    return grouped_gemm(grad, ExpertMatrices.of(weight[None], True), None, None, order, offsets, tiles, 1, False)


def linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, need_x: bool, need_weight: bool, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """``toolkit::linear_backward``: gradients to x, weight, bias; an empty tensor for one not needed."""
    triton_devices.check_dtype("linear_backward", x.dtype)
    none = x.new_empty(0)
    to_x, to_weight, to_bias = none, none.clone(), none.clone()
    rows = grad.reshape(math.prod(x.shape[:-1]), weight.shape[0])
    if need_x:
        to_x = gradient_of_rows(rows, weight).view(x.shape)
    if need_weight:
        to_weight = torch.mm(rows.t(), x.reshape(rows.shape[0], x.shape[-1]))
    if need_bias:
        to_bias = rows.sum(0)
    return to_x, to_weight, to_bias


def multiply_in_float32(left: Tensor, right: Tensor, out: Tensor, *, add: bool) -> None:
    """``out`` [M, N] float32 = ``left`` [M, K] ``right`` [K, N], plus what it holds with ``add``; 16-bit or float32.

    On CUDA one cuBLAS GEMM, which reads 16 bits and writes 32: a sum over parts is rounded once, at its end.
    """
    if left.dtype == torch.float32 or left.device.type == "cpu":  # where it takes operands of one dtype only
        torch.addmm(out, left.float(), right.float(), beta=int(add), out=out)
    else:
        torch.addmm(out, left, right, torch.float32, beta=int(add), out=out)
