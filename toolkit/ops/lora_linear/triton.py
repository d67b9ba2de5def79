"""Low-rank adapters in Triton: rows grouped by adapter on the device, a shrink and an expand kernel.

A stable sort lists the rows unit by unit (a slice of an adapter). A program finds the unit and the rows of its tile by
the groups' starts (``find_tile``), and the unit's matrices in a table, so grids are bounded by shapes and nothing is
read back. A row's bits depend on that row and its unit: it is one row of GEMMs whose sums run in an order set by K, N,
the unit's rank and the tile table. What lies between (``low``, [places, width] in the sorted order) is float32 and
already scaled; columns beyond the blocks of a unit's rank are undefined.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from toolkit.ops import triton_devices
from toolkit.ops.attention.triton_common import find_tile
from toolkit.ops.linear.triton import aligned_rows
from toolkit.ops.lora_linear import tiles
from toolkit.ops.lora_linear.triton_table import (
    A_ADDRESS,
    A_STRIDE,
    B_ADDRESS,
    B_STRIDE,
    RANK,
    SCALE_ADDRESS,
    Grouped,
    Units,
    field,
    group_rows,
    readable,
    rows_at,
    unit_of_rows,
    units_of,
)
from toolkit.ops.tiles import float32_precision


@triton.jit
def products(
    x_rows, w_ranks, scale, first, last, depth, step, row_ok, rank_ok,
    ROWS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, EVEN: tl.constexpr, SCALED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """sum over k of [first, last) of x[row, k] * weight[k, r], with SCALED of x[row, k] * scale[k] in float32."""
    acc = tl.zeros([ROWS, RANKS], tl.float32)
    x_tile = x_rows + first + tl.arange(0, DEPTH)[None, :]
    w_tile = w_ranks + (first + tl.arange(0, DEPTH)).to(tl.int64)[:, None] * step
    for begin in range(first, last, DEPTH):
        k = begin + tl.arange(0, DEPTH)
        if EVEN:
            left = tl.load(x_tile, mask=row_ok, other=0.0)
            right = tl.load(w_tile, mask=rank_ok, other=0.0)
        else:
            left = tl.load(x_tile, mask=row_ok & (k < depth)[None, :], other=0.0)
            right = tl.load(w_tile, mask=rank_ok & (k < depth)[:, None], other=0.0)
        if SCALED:
            factor = tl.load(scale + k, mask=k < depth, other=0.0).to(tl.float32)
            scaled = left.to(tl.float32) * factor[None, :]
            acc = tl.dot(scaled, right.to(tl.float32), acc, input_precision=PRECISION)
        else:
            acc = tl.dot(left, right, acc, input_precision="ieee")
        x_tile += DEPTH
        w_tile += DEPTH * step
    return acc


@triton.jit(do_not_specialize=["groups", "num_rows"])
def lora_shrink(
    x, table, factors, order, starts, partials, groups, num_rows, depth, stride_x, stride_p,
    ROWS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, WIDTH: tl.constexpr,
    SCALED_DEPTH: tl.constexpr, BACKWARD: tl.constexpr, EVEN: tl.constexpr, ALIGNED: tl.constexpr,
    SCALED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """scaling[u] * sum_k x[row, k] * A[r, k] over one split of k, for a tile of rows of unit u.

    BACKWARD: x[row, n] * B[n, r] instead, with SCALED x[row, n] * c[n] * B[n, r] where the unit has a column scale.
    Group 0 has no adapter, group u + 1 is unit u; the rows past the last group name none that exists. EVEN: depth is a
    whole number of steps, which SCALED_DEPTH divides.
    """
    group, start, local = find_tile(starts, groups, tl.program_id(0), ROWS)
    unit = group - 1
    end = tl.load(starts + group + 1, mask=group < groups, other=num_rows)
    begin = start + local.to(tl.int64) * ROWS
    if (unit < 0) | (group >= groups) | (begin >= end):
        return
    ranks = field(table, unit, RANK)
    if tl.program_id(2) * RANKS >= ranks:
        return
    place = begin + tl.arange(0, ROWS)
    row_ok = (place < end)[:, None]
    row = tl.load(order + place, mask=place < end, other=0)
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    rank_ok = (rank < ranks)[None, :]
    first = tl.program_id(1) * SPLIT
    last = tl.minimum(first + SPLIT, depth)
    x_rows = x + row[:, None] * stride_x
    scale = field(table, unit, SCALE_ADDRESS)
    scale_row = scale.to(tl.pointer_type(x.dtype.element_ty))
    if BACKWARD:
        weight, step = rows_at(table, unit, B_ADDRESS, B_STRIDE, x, False)
        w_ranks = weight + rank[None, :]
    else:
        weight, stride = rows_at(table, unit, A_ADDRESS, A_STRIDE, x, ALIGNED)
        w_ranks = weight + rank[None, :] * stride
        step = 1
    acc = tl.zeros([ROWS, RANKS], tl.float32)
    if SCALED:
        if scale != 0:
            acc = products(
                x_rows, w_ranks, scale_row, first, last, depth, step, row_ok, rank_ok,
                ROWS, RANKS, SCALED_DEPTH, EVEN, True, PRECISION,
            )  # fmt: skip
        else:
            acc = products(
                x_rows, w_ranks, scale_row, first, last, depth, step, row_ok, rank_ok,
                ROWS, RANKS, DEPTH, EVEN, False, PRECISION,
            )  # fmt: skip
    else:
        acc = products(
            x_rows, w_ranks, scale_row, first, last, depth, step, row_ok, rank_ok,
            ROWS, RANKS, DEPTH, EVEN, False, PRECISION,
        )  # fmt: skip
    acc *= tl.load(factors + unit)
    out = partials + tl.program_id(1) * stride_p + place[:, None] * WIDTH + rank[None, :]
    tl.store(out, acc, mask=row_ok)


@triton.jit(do_not_specialize=["size"])
def lora_join(partials, low, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """low = sum of SPLITS partials of ``size`` elements each, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(partials + at, mask=inside, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(partials + split * size.to(tl.int64) + at, mask=inside, other=0.0)
    tl.store(low + at, total, mask=inside)


@triton.jit
def low_times_b(
    low, table, unit, place, row_ok, column, column_ok, like,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr,
    ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """sum_r low[place, r] * B[c, r] of a unit; BACKWARD: * A[r, c]. In float32."""
    ranks = field(table, unit, RANK).to(tl.int32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for first in range(0, ranks, RANKS):
        rank = first + tl.arange(0, RANKS)
        left = tl.load(low + place[:, None] * WIDTH + rank[None, :], mask=row_ok[:, None], other=0.0)
        if BACKWARD:
            weight, stride = rows_at(table, unit, A_ADDRESS, A_STRIDE, like, ALIGNED)
            at = weight + rank[:, None] * stride + column[None, :]
        else:
            weight, stride = rows_at(table, unit, B_ADDRESS, B_STRIDE, like, False)
            at = weight + column[None, :] * stride + rank[:, None]
        right = tl.load(at, mask=column_ok[None, :] & (rank < ranks)[:, None], other=0.0)
        acc = tl.dot(left, right.to(tl.float32), acc, input_precision=PRECISION)
    return acc


@triton.jit(do_not_specialize=["groups", "num_rows"])
def lora_expand(
    base, low, table, out, bias, order, starts, groups, num_rows, columns, stride_b, stride_o,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, WIDTH: tl.constexpr, BACKWARD: tl.constexpr,
    BIASED: tl.constexpr, ALIGNED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[row, c] = base[row, c] + sum_r low[place, r] * B[c, r], or DoRA's scale of it.

    BACKWARD: sum_r low[place, r] * A[r, c] alone; 0 for rows without adapter.
    """
    group, start, local = find_tile(starts, groups, tl.program_id(0), ROWS)
    unit = group - 1
    end = tl.load(starts + group + 1, mask=group < groups, other=num_rows)
    begin = start + local.to(tl.int64) * ROWS
    if begin >= end:
        return
    place = begin + tl.arange(0, ROWS)
    row_ok = place < end
    row = tl.load(order + place, mask=row_ok, other=0)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < columns
    mask = row_ok[:, None] & column_ok[None, :]
    y = tl.zeros([ROWS, COLUMNS], tl.float32)
    if not BACKWARD:
        y = tl.load(base + row[:, None] * stride_b + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if group >= groups:
        y += float("nan")
    elif unit >= 0:
        acc = low_times_b(
            low, table, unit, place, row_ok, column, column_ok, out,
            ROWS, RANKS, COLUMNS, WIDTH, BACKWARD, ALIGNED, PRECISION,
        )  # fmt: skip
        scale = field(table, unit, SCALE_ADDRESS)
        if BACKWARD:
            y = acc
        elif scale != 0:
            scale_row = scale.to(tl.pointer_type(out.dtype.element_ty))
            factor = tl.load(scale_row + column, mask=column_ok, other=0.0).to(tl.float32)
            if BIASED:
                shift = tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)
                y = factor[None, :] * (y - shift[None, :] + acc) + shift[None, :]
            else:
                y = factor[None, :] * (y + acc)
        else:
            y += acc
    tl.store(out + row[:, None] * stride_o + column[None, :], y.to(out.dtype.element_ty), mask=mask)


def shrink(
    x: torch.Tensor, units: Units, grouped: Grouped, *, backward: bool = False, scaled: bool = False
) -> torch.Tensor:
    """scaling[u] * x[row] A^T of the unit of each row, or with ``backward`` x[row] B: low [T, units.width].

    scaled: some unit has a column scale, by which x is multiplied first. Rows of low lie in the sorted order; those
    without adapter are undefined.
    """
    arch, depth = triton_devices.architecture(x.device), x.shape[1]
    size = tiles.SHRINK.find(arch, x.dtype, row_widths=(depth,))
    splits = max(1, triton.cdiv(depth, tiles.SPLIT))
    partials = torch.empty(splits, x.shape[0], units.width, dtype=torch.float32, device=x.device)
    lora_shrink[(grouped.tiles(size.rows), splits, units.width // size.columns)](
        x, units.table, units.factors, grouped.order, grouped.starts, partials, grouped.units + 1, grouped.rows, depth,
        x.stride(0), partials.stride(0),
        ROWS=size.rows, RANKS=size.columns, DEPTH=size.depth, SPLIT=tiles.SPLIT, WIDTH=units.width,
        SCALED_DEPTH=tiles.SCALED_DEPTH, BACKWARD=backward, EVEN=depth % size.depth == 0, ALIGNED=depth % 16 == 0,
        SCALED=scaled, PRECISION=float32_precision(arch, x.dtype), **size.options(),
    )  # fmt: skip
    if splits == 1:
        return partials[0]
    low = torch.empty(x.shape[0], units.width, dtype=torch.float32, device=x.device)
    lora_join[(triton.cdiv(low.numel(), 1024),)](
        partials, low, low.numel(), SPLITS=splits, BLOCK=1024, num_warps=4, num_stages=1, enable_fp_fusion=False
    )
    return low


def expand(
    base: torch.Tensor | None,
    low: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    units: Units,
    grouped: Grouped,
) -> None:
    """out = base + low B^T, or DoRA's scale of it; without base low A, and 0 for rows without adapter."""
    arch, columns = triton_devices.architecture(out.device), out.shape[1]
    size = tiles.EXPAND.find(arch, out.dtype, row_widths=(columns,))
    under = out if base is None else base
    lora_expand[(grouped.tiles(size.rows), triton.cdiv(columns, size.columns))](
        under, low, units.table, out, under if bias is None else bias, grouped.order, grouped.starts,
        grouped.units + 1, grouped.rows, columns, under.stride(0), out.stride(0),
        ROWS=size.rows, RANKS=size.depth, COLUMNS=size.columns, WIDTH=units.width, BACKWARD=base is None,
        BIASED=bias is not None, ALIGNED=columns % 16 == 0, PRECISION=float32_precision(arch, out.dtype),
        **size.options(),
    )  # fmt: skip


def lora_add(
    base: torch.Tensor,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scaling: Sequence[float],
    adapters: torch.Tensor,
    groups: torch.Tensor | None,
    column_scales: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``toolkit::lora_add_rows`` on a GPU (or on CPU tensors in Triton's interpreter).

    base [T, N], x [T, K], a_l [R, K] or [G, R, K], b_l [N, R] or [G, N, R], float32, bfloat16 or float16.
    """
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if out.numel() == 0:
        return out
    if not a:
        return out.copy_(torch.where(adapters[:, None] < 0, base, torch.nan))
    first, second = readable(a, b)
    scales = [scale.contiguous() for scale in column_scales]
    units = units_of(first, second, scaling, scales, x.device)
    grouped = group_rows(unit_of_rows(adapters, groups, units), units.count)
    low = shrink(aligned_rows(x), units, grouped)
    expand(aligned_rows(base), low, None if bias is None else bias.contiguous(), out, units, grouped)
    return out
