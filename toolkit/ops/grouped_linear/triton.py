"""``grouped_linear`` in Triton: rows times the weights of their experts, by the tiles of the dispatch plan."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.grouped_linear import tiles as table
from toolkit.ops.grouped_linear.triton_gemm import (
    ExpertMatrices,
    clear_rest,
    expert_matmul,
    gemm_arguments,
    tile_of_program,
)
from toolkit.ops.linear.triton import aligned_rows


@triton.jit(do_not_specialize=["tile_count", "steps", "rows"])
def grouped_forward(
    x, weight, bias, topk_weights, y, order, offsets, tiles, tile_count, steps, experts, rows, outputs, depth,
    stride_x, stride_e, stride_w,
    TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr, GROUP: tl.constexpr,
    EVEN: tl.constexpr, BIASED: tl.constexpr, SCALED: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A tile of columns of y [rows, outputs] for a plan tile; SCALED multiplies the bias by a row's routing weight."""
    column_tiles = tl.cdiv(outputs, COLUMNS)
    part, column_tile, expert, first, end = tile_of_program(
        tiles, offsets, tile_count, steps, experts, column_tiles, ROWS, GROUP
    )
    column = column_tile * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < outputs
    clear_rest(y, offsets, part, tile_count * steps, experts, rows, column, inside, outputs, ROWS)
    if first >= end:
        return
    acc, local, row, row_ok = expert_matmul(
        x, weight + expert * stride_e, order, first, end, column, outputs, depth, stride_x, stride_w,
        TOP_K, ROWS, COLUMNS, DEPTH, EVEN, GATHER, TRANSPOSED,
    )  # fmt: skip
    if BIASED:
        shift = tl.load(bias + expert * outputs + column, mask=inside, other=0.0).to(tl.float32)[None, :]
        if SCALED:
            pair = tl.load(order + row, mask=row_ok, other=0)
            shift = tl.load(topk_weights + pair, mask=row_ok, other=0.0).to(tl.float32)[:, None] * shift
        acc += shift
    tl.store(
        y + first * outputs + (local[:, None] * outputs + column[None, :]),
        acc.to(y.dtype.element_ty), mask=row_ok[:, None] & inside[None, :],
    )  # fmt: skip


def grouped_gemm(
    x: Tensor,
    weight: ExpertMatrices,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    top_k: int,
    gather: bool,
) -> Tensor:
    """[R, N]: rows times their experts' weights, plus the bias, which is multiplied by ``topk_weights`` if given.

    Args:
        x: [R, D], or [T, D] with ``gather``.
        bias: [E, N] or None.
        topk_weights: [T, K] or None.
        top_k: K.
    """
    flat, size = aligned_rows(x), weight.tile(table.PRODUCT, x)
    outputs = weight.outputs
    y = torch.empty(order.numel(), outputs, dtype=x.dtype, device=x.device)
    if not y.numel() or not weight.values.shape[0]:
        return y.zero_()
    arguments = gemm_arguments(weight, size, order, offsets, tiles, top_k)
    programs = arguments["tile_count"] * arguments["steps"] * triton.cdiv(outputs, size.columns)
    grouped_forward[(programs,)](
        x=flat,
        bias=y if bias is None else bias.contiguous(),
        topk_weights=y if topk_weights is None else topk_weights.contiguous(),
        y=y,
        outputs=outputs,
        stride_x=flat.stride(0),
        BIASED=bias is not None,
        SCALED=topk_weights is not None,
        GATHER=gather,
        **arguments,
    )
    return y


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    order: Tensor,
    rows: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    gather: bool,
    transposed: bool,
) -> Tensor:
    """``toolkit::grouped_linear`` on a GPU (or on CPU tensors in Triton's interpreter).

    float32, bfloat16 or float16: IEEE multiplication, one float32 sum over ascending steps of K, the bias last, one
    rounding.
    """
    triton_devices.check_dtype("grouped_linear", x.dtype)
    matrices = ExpertMatrices.of(weight, transposed)
    return grouped_gemm(x, matrices, bias, None, order, offsets, tiles, max(rows.shape[1], 1), gather)
