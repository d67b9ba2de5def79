"""``experts`` in Triton: a grouped GEMM with the activation in its epilogue, a second one, and the combine.

The first kernel gathers tokens, multiplies, stores the pre-activation z for the backward and, from z as stored, the
activation times the routing weight; nothing else is written in between. A tile holds columns of the gate and the
columns that they gate (``gated_columns``), so that one GEMM makes both.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.activation.kinds import find
from toolkit.ops.experts.reference import is_gated, weight_of_rows
from toolkit.ops.grouped_linear import tiles as table
from toolkit.ops.grouped_linear.triton import grouped_gemm
from toolkit.ops.grouped_linear.triton_combine import combine
from toolkit.ops.grouped_linear.triton_gemm import (
    ExpertMatrices,
    clear_rest,
    expert_matmul,
    gemm_arguments,
    tile_of_program,
)
from toolkit.ops.linear.triton import aligned_rows


@triton.jit
def gated_columns(first, inner, COLUMNS: tl.constexpr, INTERLEAVED: tl.constexpr, RUNS: tl.constexpr):
    """The columns of z that a tile holds, gate and up of COLUMNS // 2 units from ``first`` on, and which exist.

    Gate and up alternate in the tile, or with RUNS all gates come before all ups, whichever reads the weights in runs.
    """
    index = tl.arange(0, COLUMNS)
    if RUNS:
        side = index // (COLUMNS // 2)
        unit = first + index % (COLUMNS // 2)
    else:
        side = index % 2
        unit = first + index // 2
    if INTERLEAVED:
        column = 2 * first + index
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
    x, weight, bias, topk_weights, z, a, order, offsets, tiles, tile_count, steps, experts, rows, inner, outputs, depth,
    stride_x, stride_e, stride_w,
    VALUE: tl.constexpr, ARGUMENTS: tl.constexpr, GATED: tl.constexpr, INTERLEAVED: tl.constexpr,
    SCALED: tl.constexpr, TOP_K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
    GROUP: tl.constexpr, EVEN: tl.constexpr, BIASED: tl.constexpr, GATHER: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """A tile of z = W_up x + b [rows, outputs] and of a [rows, inner], the activation times the routing weight.

    With INTERLEAVED gates the tile's columns are those of z. With gates in halves they alternate, or where TRANSPOSED
    come in runs.
    """
    WIDTH: tl.constexpr = COLUMNS // 2 if GATED else COLUMNS  # columns of a
    RUNS: tl.constexpr = TRANSPOSED and not INTERLEAVED
    column_tiles = tl.cdiv(inner, WIDTH)
    part, column_tile, expert, first, end = tile_of_program(
        tiles, offsets, tile_count, steps, experts, column_tiles, ROWS, GROUP
    )
    begin_column = column_tile * WIDTH
    unit = begin_column + tl.arange(0, WIDTH)
    if GATED:
        column, inside = gated_columns(begin_column, inner, COLUMNS, INTERLEAVED, RUNS)
    else:
        column, inside = unit, unit < inner
    clear_rest(z, offsets, part, tile_count * steps, experts, rows, column, inside, outputs, ROWS)
    if first >= end:
        return
    acc, local, row, row_ok = expert_matmul(
        x, weight + expert * stride_e, order, first, end, column, outputs, depth, stride_x, stride_w,
        TOP_K, ROWS, COLUMNS, DEPTH, EVEN, GATHER, TRANSPOSED,
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
        else:  # separately: each is contiguous in memory
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
        pair = tl.load(order + row, mask=row_ok, other=0)
        result *= tl.load(topk_weights + pair, mask=row_ok, other=0.0).to(tl.float32)[:, None]
    tl.store(a + first * inner + (local[:, None] * inner + unit[None, :]), result.to(a.dtype.element_ty), mask=unit_ok)


def input_rows(
    x: Tensor, topk_weights: Tensor, order: Tensor, rows: Tensor, offsets: Tensor, score_position: str
) -> Tensor:
    """The first GEMM's operand: x [T, H], which the kernel gathers, or for score position input the scaled [R, H]."""
    if score_position != "input":
        return aligned_rows(x)
    weight = weight_of_rows(topk_weights, order, offsets)
    return (x[order // max(rows.shape[1], 1)].to(weight.dtype) * weight).to(x.dtype)


def up_gemm(
    x: Tensor,
    weight: ExpertMatrices,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    order: Tensor,
    offsets: Tensor,
    tiles: Tensor,
    top_k: int,
    gather: bool,
    activation: str,
    gated: bool,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """(a [R, I], z [R, G I]) of x [R, H], or [T, H] with ``gather``; a is times ``topk_weights`` where given."""
    size, function = weight.tile(table.PRODUCT, x), find(activation)
    outputs, rows = weight.outputs, order.numel()
    inner = outputs // 2 if gated else outputs
    a = torch.empty(rows, inner, dtype=x.dtype, device=x.device)
    z = torch.empty(rows, outputs, dtype=x.dtype, device=x.device)
    if not z.numel() or not weight.values.shape[0]:
        return a.zero_(), z.zero_()
    arguments = gemm_arguments(weight, size, order, offsets, tiles, top_k)
    width = size.columns // 2 if gated else size.columns
    experts_up[(arguments["tile_count"] * arguments["steps"] * triton.cdiv(inner, width),)](
        x=x,
        bias=z if bias is None else bias.contiguous(),
        topk_weights=z if topk_weights is None else topk_weights.contiguous(),
        z=z,
        a=a,
        inner=inner,
        outputs=outputs,
        stride_x=x.stride(0),
        VALUE=function.device()[0],
        ARGUMENTS=function.arguments,
        GATED=gated,
        INTERLEAVED=interleaved,
        SCALED=topk_weights is not None,
        BIASED=bias is not None,
        GATHER=gather,
        **arguments,
    )
    return a, z


def experts(
    x: Tensor,
    topk_weights: Tensor,
    up: Tensor,
    up_bias: Tensor | None,
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
) -> tuple[Tensor, Tensor]:
    """``toolkit::experts`` on a GPU (or on CPU tensors in Triton's interpreter): (out [T, H], z [R, G I]).

    float32, bfloat16 or float16. The activation reads z as stored; at score position activation a bias of the second
    GEMM is added to the float32 sum, times the routing weight.
    """
    triton_devices.check_dtype("experts", x.dtype)
    plan, top_k = (order, offsets, tiles), max(rows.shape[1], 1)
    inside = topk_weights if score_position == "activation" else None
    source = input_rows(x, topk_weights, order, rows, offsets, score_position)
    a, z = up_gemm(
        source,
        ExpertMatrices.of(up, transposed),
        up_bias,
        inside,
        *plan,
        top_k,
        score_position != "input",
        activation,
        is_gated(up, down, transposed),
        interleaved,
    )
    y = grouped_gemm(a, ExpertMatrices.of(down, transposed), down_bias, inside, *plan, top_k, False)
    return combine(y, rows, topk_weights if score_position == "combine" else None), z
