"""Backward of ``experts`` in Triton: from saved pre-activations, in two grouped GEMMs and two sums over rows.

With g the gradient of a row's token, w its routing weight and v = W_down^T g, the first GEMM's epilogue makes all that
depends on a row's activation: dz for the second GEMM, w a for the gradient of W_down, and the row's part of
dw = <v, a>, one number per tile of columns, which a last kernel adds in order. At score position input w = 1 in all of
these, and dw comes from the gradients to the scaled rows. No atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.activation.kinds import find
from toolkit.ops.experts.reference import is_gated
from toolkit.ops.experts.triton import input_rows
from toolkit.ops.grouped_linear import tiles as table
from toolkit.ops.grouped_linear.triton import grouped_gemm
from toolkit.ops.grouped_linear.triton_backward import outer, sums
from toolkit.ops.grouped_linear.triton_combine import combine, combine_backward
from toolkit.ops.grouped_linear.triton_gemm import (
    ExpertMatrices,
    expert_matmul,
    gemm_arguments,
    span_of,
    steps_of,
    tile_of_program,
)
from toolkit.ops.linear.triton import aligned_rows
from toolkit.ops.triton_rows import EXACT

_WEIGHTED = (64, 64)  # rows and columns per program of the routing weights' gradient


@triton.jit
def load_pair(
    z, local, first, unit, row_ok, inner, outputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Gate and up [ROWS, COLUMNS] of the rows that begin at z; ``unit`` are their columns, from ``first`` on."""
    if INTERLEAVED:
        column = 2 * first + tl.arange(0, 2 * COLUMNS)
        mask = row_ok[:, None] & (column < outputs)[None, :]
        both = tl.load(z + (local[:, None] * outputs + column[None, :]), mask=mask, other=0.0)
        return tl.split(tl.reshape(both, [ROWS, COLUMNS, 2]))
    at = local[:, None] * outputs + unit[None, :]
    mask = row_ok[:, None] & (unit < inner)[None, :]
    return tl.load(z + at, mask=mask, other=0.0), tl.load(z + inner + at, mask=mask, other=0.0)


@triton.jit
def store_pair(
    gate, up, z, local, first, unit, row_ok, inner, outputs, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr
):  # fmt: skip
    """The inverse of ``load_pair``."""
    if INTERLEAVED:
        column = 2 * first + tl.arange(0, 2 * COLUMNS)
        mask = row_ok[:, None] & (column < outputs)[None, :]
        tl.store(z + (local[:, None] * outputs + column[None, :]), tl.interleave(gate, up), mask=mask)
    else:
        at = local[:, None] * outputs + unit[None, :]
        mask = row_ok[:, None] & (unit < inner)[None, :]
        tl.store(z + at, gate, mask=mask)
        tl.store(z + inner + at, up, mask=mask)


@triton.jit(do_not_specialize=["tile_count", "steps", "rows"])
def experts_inner(
    grad, weight, z, topk_weights, dz, a, partials, order, offsets, tiles, tile_count, steps, experts, rows, inner,
    outputs, depth, stride_g, stride_e, stride_w,
    BOTH: tl.constexpr, ARGUMENTS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """dz [rows, outputs], a [rows, inner] times the routing weight, partials [column tiles, rows] of <v, a>."""
    column_tiles = tl.cdiv(inner, COLUMNS)
    _, column_tile, expert, first, end = tile_of_program(
        tiles, offsets, tile_count, steps, experts, column_tiles, ROWS, GROUP
    )
    begin_column = column_tile * COLUMNS
    unit = begin_column + tl.arange(0, COLUMNS)
    inside = unit < inner
    if first >= end:
        return
    v, local, row, row_ok = expert_matmul(
        grad, weight + expert * stride_e, order, first, end, unit, inner, depth, stride_g, stride_w,
        TOP_K, ROWS, COLUMNS, DEPTH, EVEN, True, TRANSPOSED,
    )  # fmt: skip
    mask = row_ok[:, None] & inside[None, :]
    at = local[:, None] * inner + unit[None, :]
    routing = tl.full([ROWS], 1.0, tl.float32)
    if SCALED:
        pair = tl.load(order + row, mask=row_ok, other=0)
        routing = tl.load(topk_weights + pair, mask=row_ok, other=0.0).to(tl.float32)
    z_rows, dz_rows = z + first * outputs, dz + first * outputs
    if GATED:
        gate, up = load_pair(z_rows, local, begin_column, unit, row_ok, inner, outputs, ROWS, COLUMNS, INTERLEAVED)
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        if ARGUMENTS == 2:
            active, to_gate, to_up = BOTH(gate, up)
        else:
            to_up, derivative = BOTH(gate)
            active = to_up * up
            to_gate = up * derivative
    else:
        active, to_gate = BOTH(tl.load(z_rows + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(a + first * inner + at, (active * routing[:, None]).to(a.dtype.element_ty), mask=mask)
    if SCALED:
        share = tl.sum(tl.where(inside[None, :], v * active, 0.0), 1)
        tl.store(partials + column_tile.to(tl.int64) * rows + row, share, mask=row_ok)
    da = v * routing[:, None]
    to_gate = (da * to_gate).to(dz.dtype.element_ty)
    if GATED:
        to_up = (da * to_up).to(dz.dtype.element_ty)
        store_pair(to_gate, to_up, dz_rows, local, begin_column, unit, row_ok, inner, outputs, COLUMNS, INTERLEAVED)
    else:
        tl.store(dz_rows + at, to_gate, mask=mask)


@triton.jit(do_not_specialize=["tile_count", "steps", "rows"])
def topk_weights_gradient(
    partials, grad, bias, dweights, order, offsets, tiles, tile_count, steps, experts, rows, parts, width, stride_g,
    TOP_K: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dweights of the pairs of a plan tile's rows: the partials added in order, then <b_down, g>."""
    expert, first, end = span_of(tiles, offsets, tl.program_id(0), tile_count, steps, experts, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    row_ok = row < end
    total = tl.zeros([ROWS], tl.float32)
    for part in range(parts):
        total += tl.load(partials + part * rows.to(tl.int64) + row, mask=row_ok, other=0.0)
    pair = tl.load(order + row, mask=row_ok, other=0)
    if BIASED:
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = row_ok[:, None] & (column < width)[None, :]
            g = tl.load(grad + (pair // TOP_K)[:, None] * stride_g + column[None, :], mask=mask, other=0.0)
            shift = tl.load(bias + expert * width + column, mask=column < width, other=0.0)
            products += g.to(tl.float32) * shift.to(tl.float32)[None, :]
        total += tl.sum(products, 1)
    tl.store(dweights + pair, total.to(dweights.dtype.element_ty), mask=row_ok)


def inner_gemm(
    grad: Tensor,
    weight: ExpertMatrices,
    z: Tensor,
    topk_weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    top_k: int,
    activation: str,
    gated: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dz, a times the routing weight, partials of <v, a> [column tiles, R]); rows of no expert are not written."""
    size, function = weight.tile(table.INNER, grad), find(activation)
    inner, rows = weight.outputs, order.numel()
    parts = triton.cdiv(inner, size.columns)
    dz = torch.empty(rows, z.shape[1], dtype=grad.dtype, device=grad.device)
    a = torch.empty(rows, inner, dtype=grad.dtype, device=grad.device)
    partials = torch.empty(parts, rows, dtype=torch.float32, device=grad.device)
    arguments = gemm_arguments(weight, size, order, offsets, tiles, top_k)
    experts_inner[(arguments["tile_count"] * arguments["steps"] * parts,)](
        grad=grad,
        z=z.contiguous(),
        topk_weights=partials if topk_weights is None else topk_weights.contiguous(),
        dz=dz,
        a=a,
        partials=partials,
        inner=inner,
        outputs=z.shape[1],
        stride_g=grad.stride(0),
        BOTH=function.device()[1],
        ARGUMENTS=function.arguments,
        GATED=gated,
        INTERLEAVED=interleaved,
        SCALED=topk_weights is not None,
        **arguments,
    )
    return dz, a, partials


def gradient_to_topk_weights(
    partials: Tensor,
    grad: Tensor,
    bias: Tensor | None,
    topk_weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    tiles: Tensor,
) -> Tensor:
    """[T, K] the gradient to the routing weights; 0 for skipped pairs."""
    out = torch.zeros(topk_weights.shape, dtype=topk_weights.dtype, device=topk_weights.device)
    (height, block), count, experts, rows = _WEIGHTED, tiles.shape[0], len(offsets) - 1, order.numel()
    steps = steps_of(tiles, rows, experts, height)
    topk_weights_gradient[(count * steps,)](
        partials=partials,
        grad=grad,
        bias=partials if bias is None else bias.contiguous(),
        dweights=out,
        order=order,
        offsets=offsets,
        tiles=tiles,
        tile_count=count,
        steps=steps,
        experts=experts,
        rows=rows,
        parts=partials.shape[0],
        width=grad.shape[1],
        stride_g=grad.stride(0),
        TOP_K=topk_weights.shape[1],
        BIASED=bias is not None,
        ROWS=height,
        BLOCK=block,
        num_warps=4,
        num_stages=1,
        **EXACT,
    )
    return out


def experts_backward(
    grad: Tensor,
    x: Tensor,
    topk_weights: Tensor,
    z: Tensor,
    up: Tensor,
    down: Tensor,
    down_bias: Tensor | None,
    order: Tensor,
    rows: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    activation: str,
    score_position: str,
    transposed: bool,
    interleaved: bool,
    need_x: bool,
    need_topk_weights: bool,
    need_up: bool,
    need_up_bias: bool,
    need_down: bool,
    need_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """``toolkit::experts_backward``: gradients to x, topk_weights, up, up_bias, down, down_bias; empty if not needed.

    dz, w a and the rows' gradients to x have x's dtype, because they are operands of GEMMs of that dtype.
    """
    triton_devices.check_dtype("experts_backward", x.dtype)
    plan, top_k, none = (order, offsets, tiles), max(rows.shape[1], 1), x.new_empty(0)
    needs = (need_x, need_topk_weights, need_up, need_up_bias, need_down, need_down_bias)
    if not (z.numel() and x.numel() and tiles.shape[0] and up.shape[0]):
        shapes = ((x, x.shape), (topk_weights, topk_weights.shape), (up, up.shape), (up, (up.shape[0], z.shape[1])),
                  (down, down.shape), (down, (down.shape[0], x.shape[1])))  # fmt: skip
        return tuple(t.new_zeros(shape) if need else none.clone() for (t, shape), need in zip(shapes, needs))  # type: ignore[return-value]
    at_input = score_position == "input"
    inner_weights = None if at_input else topk_weights
    g = aligned_rows(grad)
    dz, a, partials = inner_gemm(
        g,
        ExpertMatrices.of(down, not transposed),
        z,
        inner_weights,
        *plan,
        top_k,
        activation,
        is_gated(up, down, transposed),
        interleaved,
    )
    to_x, to_topk_weights, to_up, to_up_bias, to_down, to_down_bias = (none.clone() for _ in needs)
    if need_x or (need_topk_weights and at_input):
        to_rows = grouped_gemm(dz, ExpertMatrices.of(up, not transposed), None, None, *plan, top_k, False)
        to_x = combine(to_rows, rows, topk_weights if at_input else None) if need_x else to_x
        if at_input and need_topk_weights:
            to_topk_weights = combine_backward(x, to_rows, rows, topk_weights, False, True)[1]
    if need_topk_weights and not at_input:
        to_topk_weights = gradient_to_topk_weights(partials, g, down_bias, topk_weights, *plan)
    if need_up:
        source = input_rows(x, topk_weights, order, rows, offsets, score_position)
        operands, gathered = (
            ((source, dz), (not at_input, False)) if transposed else ((dz, source), (False, not at_input))
        )
        to_up = outer(*operands, order, offsets, top_k, *gathered)
    if need_up_bias:
        to_up_bias = sums(dz, None, order, offsets, top_k, False)
    if need_down:
        operands, gathered = ((a, g), (False, True)) if transposed else ((g, a), (True, False))
        to_down = outer(*operands, order, offsets, top_k, *gathered)
    if need_down_bias:
        to_down_bias = sums(g, inner_weights, order, offsets, top_k, True)
    return to_x, to_topk_weights, to_up, to_up_bias, to_down, to_down_bias
