"""Backward of low-rank adapters in Triton: the shrink and expand kernels again, and kernels for sums over rows.

No atomics: the rows of a unit are summed in their order in blocks of a fixed number of rows, and the blocks in order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from toolkit.ops import triton_devices
from toolkit.ops.attention.triton_common import find_tile
from toolkit.ops.linear.triton import aligned_rows
from toolkit.ops.lora_linear import tiles
from toolkit.ops.lora_linear.triton import expand, low_times_b, shrink
from toolkit.ops.lora_linear.triton_table import (
    RANK,
    SCALE_ADDRESS,
    Grouped,
    Units,
    field,
    group_rows,
    readable,
    unit_of_rows,
    units_of,
)
from toolkit.ops.tiles import float32_precision


@triton.jit(do_not_specialize=["groups", "num_rows"])
def lora_outer(
    low, y, table, order, starts, partials, groups, num_rows, columns, stride_y, stride_p,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED: tl.constexpr, WIDTH: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """partials[tile, r, c] = sum over the tile's SUMMED places, in order, of low[place, r] * y[row, c]."""
    tile = tl.program_id(0)
    group, start, local = find_tile(starts, groups, tile, SUMMED)
    end = tl.load(starts + group + 1, mask=group < groups, other=num_rows)
    first = start + local.to(tl.int64) * SUMMED
    if (group == 0) | (group >= groups) | (first >= end):
        return
    ranks = field(table, group - 1, RANK)
    if tl.program_id(2) * RANKS >= ranks:
        return
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = (column < columns)[None, :]
    acc = tl.zeros([RANKS, COLUMNS], tl.float32)
    for begin in range(first, tl.minimum(first + SUMMED, end), ROWS):
        place = begin + tl.arange(0, ROWS)
        row_ok = place < end
        row = tl.load(order + place, mask=row_ok, other=0)
        at = low + place[None, :] * WIDTH + rank[:, None]
        left = tl.load(at, mask=row_ok[None, :] & (rank < ranks)[:, None], other=0.0)
        right = tl.load(y + row[:, None] * stride_y + column[None, :], mask=row_ok[:, None] & column_ok, other=0.0)
        acc = tl.dot(left, right.to(tl.float32), acc, input_precision=PRECISION)
    out = partials + tile.to(tl.int64) * stride_p + rank.to(tl.int64)[:, None] * columns + column[None, :]
    tl.store(out, acc, mask=column_ok)


@triton.jit(do_not_specialize=["first_unit"])
def lora_outer_join(
    partials, out, scale, starts, first_unit, columns, ranks, stride_p, stride_os, stride_or, stride_oc,
    RANKS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED: tl.constexpr, SCALED: tl.constexpr,
):  # fmt: skip
    """out[s, r, c] = the partials of unit first_unit + s, added in order; 0 where no row has it. SCALED: times c."""
    group = first_unit + tl.program_id(0) + 1
    start = tl.load(starts + group)
    end = tl.load(starts + group + 1)
    tile = start // SUMMED + group
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = (rank < ranks)[:, None] & (column < columns)[None, :]
    inside = rank.to(tl.int64)[:, None] * columns + column[None, :]
    total = tl.zeros([RANKS, COLUMNS], tl.float32)
    for step in range(tl.cdiv(end - start, SUMMED)):
        total += tl.load(partials + (tile + step) * stride_p + inside, mask=mask, other=0.0)
    if SCALED:
        total *= tl.load(scale + column, mask=column < columns, other=0.0).to(tl.float32)[None, :]
    at = rank.to(tl.int64)[:, None] * stride_or + column[None, :] * stride_oc
    tl.store(out + tl.program_id(0).to(tl.int64) * stride_os + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["groups", "num_rows"])
def lora_scale(
    grad, base, low, table, bias, dbase, order, starts, partials, groups, num_rows, columns, stride_g, stride_b,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, SUMMED: tl.constexpr, WIDTH: tl.constexpr,
    BIASED: tl.constexpr, TO_BASE: tl.constexpr, TO_SCALE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What column scales add to the backward, for a block of SUMMED places.

    TO_BASE: dbase[row] = c g, or g without scale. TO_SCALE: partials[tile, 0] = sum g (base - bias + low B^T) and
    partials[tile, 1] = sum g over the block of a unit that has a scale, in order.
    """
    tile = tl.program_id(0)
    group, start, local = find_tile(starts, groups, tile, SUMMED)
    end = tl.load(starts + group + 1, mask=group < groups, other=num_rows)
    first = start + local.to(tl.int64) * SUMMED
    if first >= end:
        return
    unit = group - 1
    some = tl.minimum(tl.maximum(unit, 0), groups - 2)
    scale = tl.where(unit == some, field(table, some, SCALE_ADDRESS), 0)
    if (scale == 0) & (not TO_BASE):
        return
    scale_row = scale.to(tl.pointer_type(grad.dtype.element_ty))
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < columns
    factor = tl.full([COLUMNS], 1.0, tl.float32)
    if scale != 0:
        factor = tl.load(scale_row + column, mask=column_ok, other=1.0).to(tl.float32)
    shift = tl.zeros([COLUMNS], tl.float32)
    if BIASED:
        shift = tl.load(bias + column, mask=column_ok, other=0.0).to(tl.float32)
    products, plain = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for begin in range(first, tl.minimum(first + SUMMED, end), ROWS):
        place = begin + tl.arange(0, ROWS)
        row_ok = place < end
        row = tl.load(order + place, mask=row_ok, other=0)
        mask = row_ok[:, None] & column_ok[None, :]
        g = tl.load(grad + row[:, None] * stride_g + column[None, :], mask=mask, other=0.0).to(tl.float32)
        if TO_BASE:
            to = dbase + row[:, None] * columns + column[None, :]
            tl.store(to, (g * factor[None, :]).to(dbase.dtype.element_ty), mask=mask)
        if TO_SCALE:  # noqa: SIM102 - decided when the kernel is compiled
            if scale != 0:
                under = tl.load(base + row[:, None] * stride_b + column[None, :], mask=mask, other=0.0).to(tl.float32)
                acc = low_times_b(
                    low, table, unit, place, row_ok, column, column_ok, grad,
                    ROWS, RANKS, COLUMNS, WIDTH, False, False, PRECISION,
                )  # fmt: skip
                products += tl.sum(g * (under - shift[None, :] + acc), 0)
                plain += tl.sum(g, 0)
    if TO_SCALE:  # noqa: SIM102
        if scale != 0:
            out = partials + tile.to(tl.int64) * 2 * columns + column
            tl.store(out, products, mask=column_ok)
            tl.store(out + columns, plain, mask=column_ok)


@triton.jit(do_not_specialize=["first_unit", "last_unit"])
def lora_scale_join(
    partials, scale, dscale, dbias, starts, first_unit, last_unit, columns,
    COLUMNS: tl.constexpr, SUMMED: tl.constexpr, TO_SCALE: tl.constexpr, TO_BIAS: tl.constexpr,
):  # fmt: skip
    """dscale = the sums of an adapter's units, added in order; dbias = (1 - c) times those of the gradient, float32."""
    column = tl.program_id(0).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    column_ok = column < columns
    products, plain = tl.zeros([COLUMNS], tl.float32), tl.zeros([COLUMNS], tl.float32)
    for unit in range(first_unit, last_unit):
        start = tl.load(starts + unit + 1)
        end = tl.load(starts + unit + 2)
        tile = start // SUMMED + unit + 1
        for step in range(tl.cdiv(end - start, SUMMED)):
            at = partials + (tile + step) * 2 * columns + column
            products += tl.load(at, mask=column_ok, other=0.0)
            plain += tl.load(at + columns, mask=column_ok, other=0.0)
    if TO_SCALE:
        tl.store(dscale + column, products.to(dscale.dtype.element_ty), mask=column_ok)
    if TO_BIAS:
        factor = tl.load(scale + column, mask=column_ok, other=0.0).to(tl.float32)
        tl.store(dbias + column, (1.0 - factor) * plain, mask=column_ok)


@dataclass(frozen=True)
class _Call:
    """The rows and adapters of one backward."""

    units: Units
    grouped: Grouped
    scales: list[torch.Tensor]

    def scale_of(self, adapter: int) -> torch.Tensor | None:
        return self.scales[adapter] if self.scales and self.scales[adapter].numel() else None

    def outer(self, low: torch.Tensor, y: torch.Tensor, outs: Sequence[torch.Tensor | None], *, scaled: bool) -> None:
        """outs[l][s, r, c] = sum over the rows of a slice of adapter l of low[place, r] * y[row, c], any strides.

        scaled: times the adapter's column scale.
        """
        arch, columns, grouped, units = triton_devices.architecture(y.device), y.shape[1], self.grouped, self.units
        size = tiles.OUTER.find(arch, y.dtype)
        count = grouped.tiles(tiles.SUMMED_ROWS)
        partials = torch.empty(count, units.width, columns, dtype=torch.float32, device=y.device)
        shared = {"RANKS": size.rows, "COLUMNS": size.columns, "SUMMED": tiles.SUMMED_ROWS}
        across = triton.cdiv(columns, size.columns)
        lora_outer[(count, across, units.width // size.rows)](
            low, y, units.table, grouped.order, grouped.starts, partials, grouped.units + 1, grouped.rows, columns,
            y.stride(0), partials.stride(0),
            ROWS=size.depth, WIDTH=units.width, PRECISION=float32_precision(arch, y.dtype), **shared,
            **size.options(),
        )  # fmt: skip
        for adapter, out in enumerate(outs):
            if out is None or out.numel() == 0:
                continue
            scale = self.scale_of(adapter) if scaled else None
            slices, ranks = (out.shape[0] if out.dim() == 3 else 1), out.shape[-2]
            lora_outer_join[(slices, across, triton.cdiv(ranks, size.rows))](
                partials, out, partials if scale is None else scale, grouped.starts, units.firsts[adapter], columns,
                ranks, partials.stride(0), out.stride(0) if out.dim() == 3 else 0, *out.stride()[-2:],
                SCALED=scale is not None, **shared, num_warps=4, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip

    def scale_sums(
        self,
        grad: torch.Tensor,
        base: torch.Tensor | None,
        low: torch.Tensor | None,
        bias: torch.Tensor | None,
        dbase: torch.Tensor | None,
        dscales: Sequence[torch.Tensor | None],
        dbias: torch.Tensor | None,
    ) -> None:
        """The gradients that column scales bring: to base, to the scales, and float32 of each adapter to bias."""
        arch, columns, grouped, units = (
            triton_devices.architecture(grad.device),
            grad.shape[1],
            self.grouped,
            self.units,
        )
        size = tiles.SCALE.find(arch, grad.dtype)
        count, sums = grouped.tiles(tiles.SUMMED_ROWS), low is not None
        partials = torch.empty(count if sums else 0, 2, columns, dtype=torch.float32, device=grad.device)
        under, across = grad if base is None else base, triton.cdiv(columns, size.columns)
        lora_scale[(count, across)](
            grad, under, partials if low is None else low, units.table, grad if bias is None else bias,
            grad if dbase is None else dbase, grouped.order, grouped.starts, partials, grouped.units + 1, grouped.rows,
            columns, grad.stride(0), under.stride(0),
            ROWS=size.rows, RANKS=size.depth, COLUMNS=size.columns, SUMMED=tiles.SUMMED_ROWS, WIDTH=units.width,
            BIASED=bias is not None, TO_BASE=dbase is not None, TO_SCALE=sums,
            PRECISION=float32_precision(arch, grad.dtype), **size.options(),
        )  # fmt: skip
        for adapter, dscale in enumerate(dscales if sums else ()):
            scale = self.scale_of(adapter)
            if scale is None or (dscale is None and dbias is None):
                continue
            lora_scale_join[(across,)](
                partials, scale, scale if dscale is None else dscale, scale if dbias is None else dbias[adapter],
                grouped.starts, units.firsts[adapter], units.firsts[adapter + 1], columns,
                COLUMNS=size.columns, SUMMED=tiles.SUMMED_ROWS, TO_SCALE=dscale is not None, TO_BIAS=dbias is not None,
                num_warps=4, num_stages=1, enable_fp_fusion=False,
            )  # fmt: skip


def _like(of: Sequence[torch.Tensor], needed: Sequence[bool]) -> list[torch.Tensor | None]:
    return [
        torch.empty(one.shape, dtype=one.dtype, device=one.device) if need else None for one, need in zip(of, needed)
    ]


def lora_add_backward(
    grad: torch.Tensor,
    base: torch.Tensor | None,
    x: torch.Tensor,
    a: Sequence[torch.Tensor],
    b: Sequence[torch.Tensor],
    scaling: Sequence[float],
    adapters: torch.Tensor,
    groups: torch.Tensor | None,
    column_scales: Sequence[torch.Tensor],
    bias: torch.Tensor | None,
    need_base: bool,
    need_x: bool,
    need_a: Sequence[bool],
    need_b: Sequence[bool],
    need_scales: Sequence[bool],
    need_bias: bool,
) -> tuple[torch.Tensor, torch.Tensor, list[torch.Tensor], list[torch.Tensor], list[torch.Tensor], torch.Tensor]:
    """``toolkit::lora_add_rows_backward``: an empty tensor for a gradient that is not needed."""
    da, db, dscales = _like(a, need_a), _like(b, need_b), _like(column_scales, need_scales)
    (dbase,) = _like([grad], [need_base])
    (dx,) = _like([x], [need_x])
    dbias = torch.zeros(len(a), grad.shape[1], dtype=torch.float32, device=x.device) if need_bias else None
    if grad.numel() == 0 or not a:
        for one in (dx, *da, *db, *dscales):
            if one is not None:
                one.zero_()
        if dbase is not None:
            dbase.copy_(grad)
    else:
        first, second = readable(a, b)
        scales = [scale.contiguous() for scale in column_scales]
        units = units_of(first, second, scaling, scales, x.device)
        call = _Call(units, group_rows(unit_of_rows(adapters, groups, units), units.count), scales)
        grad, x = aligned_rows(grad), aligned_rows(x)
        scaled = any(scale.numel() for scale in scales)
        if need_x or any(need_a):
            up = shrink(grad, units, call.grouped, backward=True, scaled=scaled)
            if dx is not None:
                expand(None, up, None, dx, units, call.grouped)
            if any(need_a):
                call.outer(up, x, da, scaled=False)
        low = shrink(x, units, call.grouped) if any(need_b) or any(need_scales) or need_bias else None
        if low is not None and any(need_b):
            call.outer(low, grad, [None if one is None else one.mT for one in db], scaled=True)
        if need_base or any(need_scales) or need_bias:
            under = None if base is None else aligned_rows(base)
            shift = None if bias is None else bias.contiguous()
            summed = low if any(need_scales) or need_bias else None
            call.scale_sums(grad, under, summed, shift, dbase, dscales, dbias)

    def given(one: torch.Tensor | None) -> torch.Tensor:
        return x.new_empty(0) if one is None else one

    total = None if dbias is None else dbias.sum(0).to(x.dtype)
    lists = [[given(one) for one in of] for of in (da, db, dscales)]
    return given(dbase), given(dx), lists[0], lists[1], lists[2], given(total)
