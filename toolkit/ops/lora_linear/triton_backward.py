"""Backward of low-rank adapters in Triton: the shrink and expand kernels again, and one for sums over rows.

No atomics: the rows of an adapter are summed in their order in blocks of a fixed number of rows, and the blocks
in order.
"""

import torch
import triton
import triton.language as tl

from toolkit.ops import triton_devices
from toolkit.ops.attention.triton_common import find_tile
from toolkit.ops.linear.triton import aligned_rows
from toolkit.ops.lora_linear import tiles
from toolkit.ops.lora_linear.triton import Grouped, expand, group_rows, shrink


@triton.jit(do_not_specialize=["groups", "num_rows"])
def lora_outer(
    low, y, order, starts, partials, groups, num_rows, columns, stride_y, stride_p,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED: tl.constexpr, PADDED: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partials[tile, r, c] = sum over the tile's SUMMED places, in order, of low[place, r] * y[row, c]."""
    tile = tl.program_id(0)
    group, start, local = find_tile(starts, groups, tile, SUMMED)
    end = tl.load(starts + group + 1, mask=group < groups, other=num_rows)
    first = start + local.to(tl.int64) * SUMMED
    if (group == 0) | (group >= groups) | (first >= end):
        return
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = (column < columns)[None, :]
    acc = tl.zeros([RANKS, COLUMNS], tl.float32)
    for begin in range(first, tl.minimum(first + SUMMED, end), ROWS):
        place = begin + tl.arange(0, ROWS)
        row_ok = place < end
        row = tl.load(order + place, mask=row_ok, other=0)
        left = tl.load(low + place[None, :] * PADDED + rank[:, None], mask=row_ok[None, :], other=0.0)
        right = tl.load(y + row[:, None] * stride_y + column[None, :], mask=row_ok[:, None] & column_ok, other=0.0)
        acc = tl.dot(left, right.to(tl.float32), acc, input_precision=PRECISION)
    out = partials + tile.to(tl.int64) * stride_p + rank.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out, acc, mask=column_ok)


@triton.jit(do_not_specialize=["groups", "num_rows"])
def lora_outer_join(
    partials, out, starts, groups, num_rows, columns, ranks, stride_p, stride_ol, stride_or, stride_oc,
    RANKS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED: tl.constexpr,
):  # fmt: skip
    """out[l, r, c] = the partials of adapter l, added in order; 0 where no row has it."""
    adapter = tl.program_id(0)
    start = tl.load(starts + adapter + 1)
    end = tl.load(starts + adapter + 2)
    tile = start // SUMMED + adapter + 1
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rank < ranks)[:, None] & (column < columns)[None, :]
    inside = rank.to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.zeros([RANKS, COLUMNS], tl.float32)
    for step in range(tl.cdiv(end - start, SUMMED)):
        total += tl.load(partials + (tile + step) * stride_p + inside, mask=mask, other=0.0)
    place = rank.to(tl.int64)[:, None] * stride_or + column[None, :] * stride_oc
    tl.store(out + adapter.to(tl.int64) * stride_ol + place, total.to(out.dtype.element_ty), mask=mask)


def outer(low: torch.Tensor, y: torch.Tensor, out: torch.Tensor, grouped: Grouped) -> None:
    """out[l, r, c] = sum over the rows of adapter l of low[place, r] * y[row, c]; out [L, R, columns], any strides."""
    arch = triton_devices.architecture(y.device)
    size = tiles.OUTER.find(arch, y.dtype)
    (adapters, ranks, columns), padded = out.shape, low.shape[1]
    count = grouped.tiles(tiles.SUMMED_ROWS)
    partials = torch.empty(count, padded, columns, dtype=torch.float32, device=y.device)
    block = min(size.rows, padded)
    shared = {"RANKS": block, "COLUMNS": size.columns, "SUMMED": tiles.SUMMED_ROWS}
    blocks = (triton.cdiv(columns, size.columns), padded // block)
    lora_outer[(count, *blocks)](
        low, y, grouped.order, grouped.starts, partials, grouped.adapters + 1, grouped.rows, columns,
        y.stride(0), partials.stride(0),
        ROWS=size.depth, PADDED=padded, PRECISION=tiles.float32_precision(arch, y.dtype), **shared,
        **size.options(),
    )  # fmt: skip
    lora_outer_join[(adapters, *blocks)](
        partials, out, grouped.starts, grouped.adapters + 1, grouped.rows, columns, ranks,
        partials.stride(0), *out.stride(), **shared, num_warps=4, num_stages=1, enable_fp_fusion=False,
    )  # fmt: skip


def lora_add_backward(
    grad: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: torch.Tensor,
    adapters: torch.Tensor,
    need_x: bool,
    need_a: bool,
    need_b: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``toolkit::lora_add_backward``: gradients to x, a, b; an empty tensor for one that is not needed."""
    none = x.new_empty(0)
    dx, da, db = (
        torch.empty(t.shape, dtype=t.dtype, device=t.device) if need else none.clone()
        for t, need in ((x, need_x), (a, need_a), (b, need_b))
    )
    if grad.numel() == 0 or a.numel() == 0 or b.numel() == 0:
        return dx.zero_(), da.zero_(), db.zero_()
    grad, x, factors = aligned_rows(grad), aligned_rows(x), scaling.to(torch.float32).contiguous()
    grouped = group_rows(adapters, a.shape[0])
    if need_x or need_a:
        up = shrink(grad, b.transpose(1, 2), factors, grouped)
        if need_x:
            expand(None, up, a.transpose(1, 2), dx, grouped)
        if need_a:
            outer(up, x, da, grouped)
    if need_b:
        outer(shrink(x, a, factors, grouped), grad, db.transpose(1, 2), grouped)
    return dx, da, db
