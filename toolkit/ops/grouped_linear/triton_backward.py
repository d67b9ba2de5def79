"""Backward of ``grouped_linear`` in Triton: a GEMM with the transposed weights, and sums over the rows of an expert.

A program owns a tile of one expert's gradient and adds that expert's rows in ascending order: no atomics, no partial
sums, and an expert without rows gets zeros.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.grouped_linear import tiles as table
from toolkit.ops.grouped_linear.triton import grouped_gemm
from toolkit.ops.grouped_linear.triton_combine import combine
from toolkit.ops.grouped_linear.triton_gemm import ExpertMatrices, source_rows
from toolkit.ops.linear.triton import aligned_rows
from toolkit.ops.triton_rows import EXACT

_SUMMED = (16, 128)  # rows and columns per program of a bias' gradient


@triton.jit
def expert_outer(
    left, right, out, order, offsets, height, width, stride_l, stride_r,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GATHER_LEFT: tl.constexpr, GATHER_RIGHT: tl.constexpr,
):  # fmt: skip
    """A tile of out[e, a, b] = sum over the rows r of e, ascending, of left[r, a] * right[r, b]."""
    expert = tl.program_id(1).to(tl.int64)
    across = tl.cdiv(width, COLUMNS)
    a = tl.program_id(0) // across * ROWS + tl.arange(0, ROWS)
    b = tl.program_id(0) % across * COLUMNS + tl.arange(0, COLUMNS)
    begin = tl.load(offsets + expert)
    count = (tl.load(offsets + expert + 1) - begin).to(tl.int32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, count, DEPTH):
        step = start + tl.arange(0, DEPTH)
        ok = step < count
        from_left = source_rows(order, begin + step, ok, TOP_K, GATHER_LEFT)
        from_right = source_rows(order, begin + step, ok, TOP_K, GATHER_RIGHT)
        one = tl.load(
            left + from_left[None, :] * stride_l + a[:, None], mask=ok[None, :] & (a < height)[:, None], other=0.0
        )
        other = tl.load(
            right + from_right[:, None] * stride_r + b[None, :], mask=ok[:, None] & (b < width)[None, :], other=0.0
        )
        acc = tl.dot(one, other, acc, input_precision="ieee")
    at = (expert * height + a[:, None]) * width + b[None, :]
    tl.store(out + at, acc.to(out.dtype.element_ty), mask=(a < height)[:, None] & (b < width)[None, :])


@triton.jit
def expert_sum(
    grad, topk_weights, out, order, offsets, width, stride_g,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, SCALED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """out[e, n] = the sum of grad[r, n] over the rows r of e, times their routing weights where SCALED."""
    expert = tl.program_id(1).to(tl.int64)
    column = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    begin = tl.load(offsets + expert)
    end = tl.load(offsets + expert + 1)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for first in range(begin, end, ROWS):
        row = first + tl.arange(0, ROWS)
        ok = row < end
        source = source_rows(order, row, ok, TOP_K, GATHER)
        mask = ok[:, None] & (column < width)[None, :]
        part = tl.load(grad + source[:, None] * stride_g + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if SCALED:
            pair = tl.load(order + row, mask=ok, other=0)
            part *= tl.load(topk_weights + pair, mask=ok, other=0.0).to(tl.float32)[:, None]
        total += part
    tl.store(out + expert * width + column, tl.sum(total, 0).to(out.dtype.element_ty), mask=column < width)


def outer(
    left: Tensor, right: Tensor, order: Tensor, offsets: Tensor, top_k: int, gather_left: bool, gather_right: bool
) -> Tensor:
    """[E, A, B]: ``left[r]^T right[r]`` summed over each expert's rows; operands [R, .], or [T, .] to gather from."""
    one, other = aligned_rows(left), aligned_rows(right)
    experts, height, width = len(offsets) - 1, left.shape[1], right.shape[1]
    out = torch.empty(experts, height, width, dtype=left.dtype, device=left.device)
    if out.numel():
        arch = triton_devices.architecture(left.device)
        size = table.OUTER.find(arch, left.dtype, row_widths=(height, width))
        expert_outer[(triton.cdiv(height, size.rows) * triton.cdiv(width, size.columns), experts)](
            left=one,
            right=other,
            out=out,
            order=order,
            offsets=offsets,
            height=height,
            width=width,
            stride_l=one.stride(0),
            stride_r=other.stride(0),
            TOP_K=top_k,
            ROWS=size.rows,
            COLUMNS=size.columns,
            DEPTH=size.depth,
            GATHER_LEFT=gather_left,
            GATHER_RIGHT=gather_right,
            **size.options(),
        )
    return out


def sums(grad: Tensor, topk_weights: Tensor | None, order: Tensor, offsets: Tensor, top_k: int, gather: bool) -> Tensor:
    """[E, N]: the rows of ``grad`` [R, N], or [T, N] with ``gather``, times ``topk_weights`` if given, per expert."""
    flat = aligned_rows(grad)
    experts, width = len(offsets) - 1, grad.shape[1]
    out = torch.empty(experts, width, dtype=grad.dtype, device=grad.device)
    if out.numel():
        rows, block = _SUMMED
        expert_sum[(triton.cdiv(width, block), experts)](
            grad=flat,
            topk_weights=flat if topk_weights is None else topk_weights.contiguous(),
            out=out,
            order=order,
            offsets=offsets,
            width=width,
            stride_g=flat.stride(0),
            TOP_K=top_k,
            GATHER=gather,
            SCALED=topk_weights is not None,
            ROWS=rows,
            BLOCK=block,
            num_warps=4,
            num_stages=1,
            **EXACT,
        )
    return out


def grouped_linear_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor,
    order: Tensor,
    rows: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    gather: bool,
    transposed: bool,
    need_x: bool,
    need_weight: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """``toolkit::grouped_linear_backward``: gradients to x, weight, bias; an empty tensor for one not needed.

    With ``gather`` the rows' gradients to x are rounded to its dtype before a token's are added.
    """
    triton_devices.check_dtype("grouped_linear_backward", x.dtype)
    top_k = max(rows.shape[1], 1)
    none = x.new_empty(0)
    to_x, to_weight, to_bias = none, none.clone(), none.clone()
    if need_x:
        matrices = ExpertMatrices.of(weight, not transposed)
        to_x = grouped_gemm(grad, matrices, None, None, order, offsets, tiles, top_k, False)
        to_x = combine(to_x, rows, None) if gather else to_x
    if need_weight:
        pair, gathered = ((x, grad), (gather, False)) if transposed else ((grad, x), (False, gather))
        to_weight = outer(*pair, order, offsets, top_k, *gathered)
    if need_bias:
        to_bias = sums(grad, None, order, offsets, top_k, False)
    return to_x, to_weight, to_bias
