"""``experts`` in Triton: a grouped product with the activation in its epilogue, a second one, and the ordered sum.

The first kernel gathers tokens, multiplies, stores the pre-activation z for the backward and, from z as it is stored,
the activated row times its score: nothing else is written in between. A tile holds columns of the gate and the columns
that they gate (``gated_columns``), so that one product makes both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.activation.kinds import find
from toolkit.ops.experts.reference import is_gated, score_of_rows
from toolkit.ops.grouped_linear import tiles as table
from toolkit.ops.grouped_linear.triton import (
    Matrices,
    clear_rest,
    expert_product,
    product,
    source_rows,
    span_of,
    steps_of,
)
from toolkit.ops.grouped_linear.triton_combine import combine
from toolkit.ops.linear.triton import aligned_rows, grouped_tile


@triton.jit
def gated_columns(first, inner, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr, RUNS: tl.constexpr):
    """Where a tile's columns lie in z: gate and up of COLUMNS // 2 columns from ``first`` on, and which there are.

    Gate and up take turns in the tile, or with RUNS all gates come before all ups: what the weights' memory asks for.
    """
    place = tl.arange(0, COLUMNS)
    if RUNS:
        side = place // (COLUMNS // 2)
        unit = first + place % (COLUMNS // 2)
    else:
        side = place % 2
        unit = first + place // 2
    if INTERLEAVED:
        column = 2 * first + place
    else:
        column = side * inner + unit
    return column, unit < inner


@triton.jit
def gate_and_up(tile, ROWS: tl.constexpr, COLUMNS: tl.constexpr, RUNS: tl.constexpr):
    """The two [ROWS, COLUMNS // 2] parts of a tile whose columns are those of ``gated_columns``."""
    if RUNS:
        pairs = tl.permute(tl.reshape(tile, [ROWS, 2, COLUMNS // 2]), [0, 2, 1])
    else:
        pairs = tl.reshape(tile, [ROWS, COLUMNS // 2, 2])
    return tl.split(pairs)


@triton.jit(do_not_specialize=["tile_count", "steps", "rows"])
def experts_up(
    x, weight, bias, scores, z, a, order, offsets, tiles, tile_count, steps, experts, rows, inner, outputs, depth,
    stride_x, stride_e, stride_w,
    VALUE: tl.constexpr, ARGUMENTS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr, SLOTS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, BIASED: tl.constexpr, GATHER: tl.constexpr, TURNED: tl.constexpr,
):  # fmt: skip
    """z = W_up x + b [rows, outputs] for a tile of rows and columns, and a [rows, inner]: activated, times the score.

    Of INTERLEAVED gates the tile's columns are those of z, of others in halves: in turns, or where TURNED in runs.
    """
    WIDTH: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS  # columns of a
    RUNS: tl.constexpr = TURNED and not INTERLEAVED
    parts = tile_count * steps
    part, column_tile = grouped_tile(tl.program_id(0), parts, tl.cdiv(inner, WIDTH), GROUP)
    begin_column = column_tile * WIDTH
    unit = begin_column + tl.arange(0, WIDTH)
    if GATED:
        column, inside = gated_columns(begin_column, inner, COLUMNS, INTERLEAVED, RUNS)
    else:
        column, inside = unit, unit < inner
    clear_rest(z, offsets, part, parts, experts, rows, column, inside, outputs, ROWS)
    expert, first, end = span_of(tiles, offsets, part, tile_count, steps, experts, ROWS)
    if first >= end:
        return
    local = tl.arange(0, ROWS)
    row = first + local
    row_ok = row < end
    source = source_rows(order, row, row_ok, SLOTS, GATHER)
    acc = expert_product(
        x, weight + expert * stride_e, source, row_ok, column, outputs, depth, stride_x, stride_w,
        ROWS, COLUMNS, DEPTH, EVEN, TURNED,
    )  # fmt: skip
    if BIASED:
        acc += tl.load(bias + expert * outputs + column, mask=inside, other=0.0).to(tl.float32)[None, :]
    stored = acc.to(z.dtype.element_ty)
    z_rows = z + first * outputs + local[:, None] * outputs
    unit_ok = row_ok[:, None] & (unit < inner)[None, :]
    if GATED:
        gate, up = gate_and_up(stored, ROWS, COLUMNS, RUNS)
        if INTERLEAVED:
            tl.store(z_rows + column[None, :], stored, mask=row_ok[:, None] & inside[None, :])
        else:  # apart, for each is a run in memory
            tl.store(z_rows + unit[None, :], gate, mask=unit_ok)
            tl.store(z_rows + inner + unit[None, :], up, mask=unit_ok)
        if ARGUMENTS == 2:
            result = VALUE(gate.to(tl.float32), up.to(tl.float32))
        else:
            result = VALUE(gate.to(tl.float32)) * up.to(tl.float32)
    else:
        tl.store(z_rows + unit[None, :], stored, mask=unit_ok)
        result = VALUE(stored.to(tl.float32))
    if SCALED:
        slot = tl.load(order + row, mask=row_ok, other=0)
        result *= tl.load(scores + slot, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(a + first * inner + (local[:, None] * inner + unit[None, :]), result.to(a.dtype.element_ty), mask=unit_ok)


def input_rows(x: Tensor, scores: Tensor, order: Tensor, rows: Tensor, offsets: Tensor, site: str) -> Tensor:
    """What the first product reads: x, gathered by the kernel, or [R, H] rows times their scores of site input."""
    if site != "input":
        return aligned_rows(x)
    weight = score_of_rows(scores, order, offsets)
    return (x[order // max(rows.shape[1], 1)].to(weight.dtype) * weight).to(x.dtype)


def up_product(
    x: Tensor, weight: Matrices, bias: Tensor | None, scores: Tensor | None, order: Tensor, offsets: Tensor,
    tiles: Tensor, slots: int, gather: bool, kind: str, gated: bool, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(a [R, I], z [R, G I]) of x [R, H], or [T, H] with ``gather``; a times ``scores`` where they are given."""
    size, function = weight.size(table.PRODUCT, x), find(kind)
    outputs, depth, rows, experts = weight.outputs, weight.depth, order.numel(), weight.values.shape[0]
    inner = outputs // 2 if gated else outputs
    a = torch.empty(rows, inner, dtype=x.dtype, device=x.device)
    z = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not z.numel() or not experts:
        return a.zero_(), z.zero_()
    count, steps = tiles.shape[0], steps_of(tiles, rows, experts, size.rows)
    width = size.columns // 2 if gated else size.columns
    experts_up[(count * steps * triton.cdiv(inner, width),)](
        x, weight.values, z if bias is None else bias.contiguous(), z if scores is None else scores.contiguous(),
        z, a, order, offsets, tiles, count, steps, experts, rows, inner, outputs, depth,
        x.stride(0), weight.values.stride(0), weight.values.stride(1),
        VALUE=function.device()[0], ARGUMENTS=function.arguments, GATED=gated, INTERLEAVED=interleaved,
        SCALED=scores is not None, SLOTS=slots, ROWS=size.rows, COLUMNS=size.columns, DEPTH=size.depth,
        GROUP=size.group, EVEN=depth % size.depth == 0, BIASED=bias is not None, GATHER=gather, TURNED=weight.turned,
        **size.options(),
    )  # fmt: skip
    return a, z


def experts(
    x: Tensor, scores: Tensor, up: Tensor, up_bias: Tensor | None, down: Tensor, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    kind: str, site: str, transposed: bool, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``toolkit::experts`` on a GPU (or on CPU tensors in Triton's interpreter): (out [T, H], z [R, G I]).

    float32, bfloat16 or float16. The activation takes z as it is stored; at site activation a bias of the second
    product is added to the float32 sum times the score.
    """
    triton_devices.check_dtype("experts", x.dtype)
    plan, slots = (order, offsets, tiles), max(rows.shape[1], 1)
    inside = scores if site == "activation" else None
    source = input_rows(x, scores, order, rows, offsets, site)
    a, z = up_product(
        source, Matrices.of(up, transposed), up_bias, inside, *plan, slots, site != "input",
        kind, is_gated(up, down, transposed), interleaved,
    )  # fmt: skip
    y = product(a, Matrices.of(down, transposed), down_bias, inside, *plan, slots, False)
    return combine(y, rows, scores if site == "combine" else None), z
