"""Backward of ``experts`` in Triton: from saved pre-activations, in two grouped products and two sums over rows.

With g the gradient of a row's token, s its score and v = W_down^T g, the first product's epilogue makes all that a row
needs of its activations: dz for the second product, s a for the gradient of W_down, and the row's part of
ds = <v, a>, a number for each tile of columns, which a last kernel adds in order. At site input s = 1 in all of these,
and ds comes of the gradients to the scaled rows. No atomics.
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
from toolkit.ops.grouped_linear.triton import Matrices, expert_product, product, source_rows, span_of, steps_of
from toolkit.ops.grouped_linear.triton_backward import outer, sums
from toolkit.ops.grouped_linear.triton_combine import combine, combine_backward
from toolkit.ops.linear.triton import aligned_rows, grouped_tile
from toolkit.ops.triton_rows import EXACT

_SCORED = (64, 64)  # rows and columns that a program of the scores' gradient holds


@triton.jit
def load_pair(
    z, local, first, unit, row_ok, inner, outputs, ROWS: tl.constexpr, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr
):
    """Gate and up [ROWS, COLUMNS] of the rows that begin at z; ``unit`` are their columns from ``first`` on."""
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
    grad, weight, z, scores, dz, a, partials, order, offsets, tiles, tile_count, steps, experts, rows, inner, outputs,
    depth, stride_g, stride_e, stride_w,
    BOTH: tl.constexpr, ARGUMENTS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """dz [rows, outputs], a [rows, inner] times the score, partials [column tiles, rows] of <v, a>, from v and z."""
    part, column_tile = grouped_tile(tl.program_id(0), tile_count * steps, tl.cdiv(inner, COLUMNS), GROUP)
    begin_column = column_tile * COLUMNS
    unit = begin_column + tl.arange(0, COLUMNS)
    inside = unit < inner
    expert, first, end = span_of(tiles, offsets, part, tile_count, steps, experts, ROWS)
    if first >= end:
        return
    local = tl.arange(0, ROWS)
    row = first + local
    row_ok = row < end
    source = source_rows(order, row, row_ok, SLOTS, True)
    v = expert_product(
        grad, weight + expert * stride_e, source, row_ok, unit, inner, depth, stride_g, stride_w,
        ROWS, COLUMNS, DEPTH, EVEN, TURNED,
    )  # fmt: skip
    mask = row_ok[:, None] & inside[None, :]
    at = local[:, None] * inner + unit[None, :]
    score = tl.full([ROWS], 1.0, tl.float32)
    if SCALED:
        slot = tl.load(order + row, mask=row_ok, other=0)
        score = tl.load(scores + slot, mask=row_ok, other=0.0).to(tl.float32)
    z_rows, dz_rows = z + first * outputs, dz + first * outputs
    if GATED:
        gate, up = load_pair(z_rows, local, begin_column, unit, row_ok, inner, outputs, ROWS, COLUMNS, INTERLEAVED)
        gate, up = gate.to(tl.float32), up.to(tl.float32)
        if ARGUMENTS == 2:
            active, to_gate, to_up = BOTH(gate, up)
        else:
            to_up, slope = BOTH(gate)
            active = to_up * up
            to_gate = up * slope
    else:
        active, to_gate = BOTH(tl.load(z_rows + at, mask=mask, other=0.0).to(tl.float32))
    tl.store(a + first * inner + at, (active * score[:, None]).to(a.dtype.element_ty), mask=mask)
    if SCALED:
        share = tl.sum(tl.where(inside[None, :], v * active, 0.0), 1)
        tl.store(partials + column_tile.to(tl.int64) * rows + row, share, mask=row_ok)
    da = v * score[:, None]
    to_gate = (da * to_gate).to(dz.dtype.element_ty)
    if GATED:
        to_up = (da * to_up).to(dz.dtype.element_ty)
        store_pair(to_gate, to_up, dz_rows, local, begin_column, unit, row_ok, inner, outputs, COLUMNS, INTERLEAVED)
    else:
        tl.store(dz_rows + at, to_gate, mask=mask)


@triton.jit(do_not_specialize=["tile_count", "steps", "rows"])
def score_gradient(
    partials, grad, bias, dscores, order, offsets, tiles, tile_count, steps, experts, rows, parts, width, stride_g,
    SLOTS: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of the rows of a tile, each to its slot: the partials in order, then <b_down, g>."""
    expert, first, end = span_of(tiles, offsets, tl.program_id(0), tile_count, steps, experts, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    row_ok = row < end
    total = tl.zeros([ROWS], tl.float32)
    for part in range(parts):
        total += tl.load(partials + part * rows.to(tl.int64) + row, mask=row_ok, other=0.0)
    slot = tl.load(order + row, mask=row_ok, other=0)
    if BIASED:
        products = tl.zeros([ROWS, BLOCK], tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = row_ok[:, None] & (column < width)[None, :]
            g = tl.load(grad + (slot // SLOTS)[:, None] * stride_g + column[None, :], mask=mask, other=0.0)
            shift = tl.load(bias + expert * width + column, mask=column < width, other=0.0)
            products += g.to(tl.float32) * shift.to(tl.float32)[None, :]
        total += tl.sum(products, 1)
    tl.store(dscores + slot, total.to(dscores.dtype.element_ty), mask=row_ok)


def inner_product(
    grad: Tensor, weight: Matrices, z: Tensor, scores: Tensor | None, order: Tensor, offsets: Tensor, tiles: Tensor,
    slots: int, kind: str, gated: bool, interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dz, a times the score, partials of <v, a> [column tiles, R]); rows of no expert are left as they are."""
    size, function = weight.size(table.INNER, grad), find(kind)
    inner, depth, rows, experts = weight.outputs, weight.depth, order.numel(), weight.values.shape[0]
    count, steps = tiles.shape[0], steps_of(tiles, rows, experts, size.rows)
    parts = triton.cdiv(inner, size.columns)
    dz = torch.empty(rows, z.shape[1], dtype=grad.dtype, device=grad.device)
    a = torch.empty(rows, inner, dtype=grad.dtype, device=grad.device)
    partials = torch.empty(parts, rows, dtype=torch.float32, device=grad.device)
    experts_inner[(count * steps * parts,)](
        grad, weight.values, z.contiguous(), partials if scores is None else scores.contiguous(), dz, a, partials,
        order, offsets, tiles, count, steps, experts, rows, inner, z.shape[1], depth,
        grad.stride(0), weight.values.stride(0), weight.values.stride(1),
        BOTH=function.device()[1], ARGUMENTS=function.arguments, GATED=gated, INTERLEAVED=interleaved,
        SCALED=scores is not None, SLOTS=slots, ROWS=size.rows, COLUMNS=size.columns, DEPTH=size.depth,
        GROUP=size.group, EVEN=depth % size.depth == 0, TURNED=weight.turned,
        **size.options(),
    )  # fmt: skip
    return dz, a, partials


def scores_of(
    partials: Tensor, grad: Tensor, bias: Tensor | None, scores: Tensor, order: Tensor, offsets: Tensor, tiles: Tensor
) -> Tensor:
    """The gradient to the scores [T, K]; 0 for slots that are skipped."""
    to_scores = torch.zeros(scores.shape, dtype=scores.dtype, device=scores.device)
    (height, block), count, experts, rows = _SCORED, tiles.shape[0], len(offsets) - 1, order.numel()
    steps = steps_of(tiles, rows, experts, height)
    score_gradient[(count * steps,)](
        partials, grad, partials if bias is None else bias.contiguous(), to_scores, order, offsets, tiles,
        count, steps, experts, rows, partials.shape[0], grad.shape[1], grad.stride(0),
        SLOTS=scores.shape[1], BIASED=bias is not None, ROWS=height, BLOCK=block, num_warps=4, num_stages=1, **EXACT,
    )  # fmt: skip
    return to_scores


def experts_backward(
    grad: Tensor, x: Tensor, scores: Tensor, z: Tensor, up: Tensor, down: Tensor, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    kind: str, site: str, transposed: bool, interleaved: bool,
    need_x: bool, need_scores: bool, need_up: bool, need_up_bias: bool, need_down: bool, need_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``toolkit::experts_backward``: gradients to x, scores, up, up_bias, down, down_bias; empty where not needed.

    dz, s a and the rows' gradients to x have x's dtype, for they are operands of the products of that dtype.
    """
    triton_devices.check_dtype("experts_backward", x.dtype)
    plan, slots, none = (order, offsets, tiles), max(rows.shape[1], 1), x.new_empty(0)
    shapes = ((x, x.shape), (scores, scores.shape), (up, up.shape), (up, (up.shape[0], z.shape[1])),
              (down, down.shape), (down, (down.shape[0], x.shape[1])))  # fmt: skip
    needs = (need_x, need_scores, need_up, need_up_bias, need_down, need_down_bias)
    if not (z.numel() and x.numel() and tiles.shape[0] and up.shape[0]):
        return tuple(t.new_zeros(shape) if need else none.clone() for (t, shape), need in zip(shapes, needs))  # type: ignore[return-value]
    inner_scores = None if site == "input" else scores
    g = aligned_rows(grad)
    dz, a, partials = inner_product(
        g, Matrices.of(down, not transposed), z, inner_scores, *plan, slots,
        kind, is_gated(up, down, transposed), interleaved,
    )  # fmt: skip
    to_x, to_scores, to_up, to_up_bias, to_down, to_down_bias = (none.clone() for _ in needs)
    if need_x or (need_scores and site == "input"):
        to_rows = product(dz, Matrices.of(up, not transposed), None, None, *plan, slots, False)
        to_x = combine(to_rows, rows, scores if site == "input" else None) if need_x else to_x
        if site == "input" and need_scores:
            to_scores = combine_backward(x, to_rows, rows, scores, False, True)[1]
    if need_scores and site != "input":
        to_scores = scores_of(partials, g, down_bias, scores, *plan)
    if need_up:
        source, gather = input_rows(x, scores, order, rows, offsets, site), site != "input"
        pair, gathered = ((source, dz), (gather, False)) if transposed else ((dz, source), (False, gather))
        to_up = outer(*pair, order, offsets, slots, *gathered)
    if need_up_bias:
        to_up_bias = sums(dz, None, order, offsets, slots, False)
    if need_down:
        pair, gathered = ((a, g), (False, True)) if transposed else ((g, a), (True, False))
        to_down = outer(*pair, order, offsets, slots, *gathered)
    if need_down_bias:
        to_down_bias = sums(g, inner_scores, order, offsets, slots, True)
    return to_x, to_scores, to_up, to_up_bias, to_down, to_down_bias
