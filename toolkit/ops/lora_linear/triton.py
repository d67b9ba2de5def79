"""Low-rank adapters in Triton: rows grouped by adapter on the device, a shrink and an expand kernel.

A stable sort lists the rows adapter by adapter. A program finds the adapter and the rows of its tile from the
groups' starts (``find_tile``), so grids are bounded by shapes and nothing is read back. A row's bits depend on
that row and its adapter: it is one row of GEMMs whose sums run in an order set by K, N, R and the
tile table. What lies between (``low``, [places, ranks] in the sorted order) is float32 and already scaled.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from toolkit.ops import triton_devices
from toolkit.ops.attention.triton_common import find_tile
from toolkit.ops.linear.triton import aligned_rows
from toolkit.ops.lora_linear import tiles
from toolkit.ops.triton_rows import power_of_2


@triton.jit(do_not_specialize=["groups", "num_rows"])
def lora_shrink(
    x, weight, scaling, order, starts, partials, groups, num_rows, depth, ranks,
    stride_x, stride_wl, stride_wr, stride_wk, stride_p,
    ROWS: tl.constexpr, RANKS: tl.constexpr, DEPTH: tl.constexpr, SPLIT: tl.constexpr, PADDED: tl.constexpr,
    EVEN: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """scaling[l] * sum_k x[row, k] * weight[l, r, k] over one split of k, for a tile of rows of adapter l.

    Group 0 has no adapter, group l + 1 adapter l; the rows past the last group name none that exists. EVEN: depth
    is a whole number of steps; ALIGNED: ranks is PADDED.
    """
    group, start, local = find_tile(starts, groups, tl.program_id(0), ROWS)
    adapter = group - 1
    end = tl.load(starts + group + 1, mask=group < groups, other=num_rows)
    place = start + local.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if (adapter < 0) | (group >= groups) | (start + local.to(tl.int64) * ROWS >= end):
        return
    row_ok = place < end
    row = tl.load(order + place, mask=row_ok, other=0)
    rank = tl.program_id(2) * RANKS + tl.arange(0, RANKS)
    first = tl.program_id(1) * SPLIT
    k = first + tl.arange(0, DEPTH)
    x_tile = x + row[:, None] * stride_x + k[None, :]
    w_tile = (
        weight + adapter.to(tl.int64) * stride_wl
        + rank.to(tl.int64)[None, :] * stride_wr + k.to(tl.int64)[:, None] * stride_wk
    )  # fmt: skip
    rank_ok = (rank < ranks)[None, :]
    acc = tl.zeros([ROWS, RANKS], tl.float32)
    for begin in range(first, tl.minimum(first + SPLIT, depth), DEPTH):
        if EVEN:
            left = tl.load(x_tile, mask=row_ok[:, None], other=0.0)
            right = tl.load(w_tile) if ALIGNED else tl.load(w_tile, mask=rank_ok, other=0.0)
        else:
            left_k, right_k = tl.arange(0, DEPTH) < depth - begin, tl.arange(0, DEPTH) < depth - begin
            left = tl.load(x_tile, mask=row_ok[:, None] & left_k[None, :], other=0.0)
            right = tl.load(w_tile, mask=rank_ok & right_k[:, None], other=0.0)
        acc = tl.dot(left, right, acc, input_precision="ieee")
        x_tile += DEPTH
        w_tile += DEPTH * stride_wk
    acc *= tl.load(scaling + adapter)
    out = partials + tl.program_id(1) * stride_p + place[:, None] * PADDED + rank[None, :]
    tl.store(out, acc, mask=row_ok[:, None])


@triton.jit(do_not_specialize=["size"])
def lora_join(partials, low, size, SPLITS: tl.constexpr, BLOCK: tl.constexpr):
    """low = sum of SPLITS partials of ``size`` elements each, in order."""
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    total = tl.load(partials + at, mask=inside, other=0.0)
    for split in range(1, SPLITS):
        total += tl.load(partials + split * size.to(tl.int64) + at, mask=inside, other=0.0)
    tl.store(low + at, total, mask=inside)


@triton.jit(do_not_specialize=["groups", "num_rows"])
def lora_expand(
    base, low, weight, out, order, starts, groups, num_rows, columns, ranks,
    stride_b, stride_wl, stride_wc, stride_wr, stride_o,
    ROWS: tl.constexpr, RANKS: tl.constexpr, COLUMNS: tl.constexpr, PADDED: tl.constexpr,
    BASED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """out[row, c] = base[row, c] + sum_r low[place, r] * weight[l, c, r]; without BASED the base is 0."""
    group, start, local = find_tile(starts, groups, tl.program_id(0), ROWS)
    adapter = group - 1
    end = tl.load(starts + group + 1, mask=group < groups, other=num_rows)
    place = start + local.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    if start + local.to(tl.int64) * ROWS >= end:
        return
    row_ok = place < end
    row = tl.load(order + place, mask=row_ok, other=0)
    column = tl.program_id(1).to(tl.int64) * COLUMNS + tl.arange(0, COLUMNS)
    mask = row_ok[:, None] & (column < columns)[None, :]
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if group >= groups:
        acc += float("nan")
    elif adapter >= 0:
        for first in range(0, PADDED, RANKS):
            rank = first + tl.arange(0, RANKS)
            left = tl.load(low + place[:, None] * PADDED + rank[None, :], mask=row_ok[:, None], other=0.0)
            right = tl.load(
                weight + adapter.to(tl.int64) * stride_wl
                + column[None, :] * stride_wc + rank.to(tl.int64)[:, None] * stride_wr,
                mask=(column < columns)[None, :] & (rank < ranks)[:, None], other=0.0,
            )  # fmt: skip
            acc = tl.dot(left, right.to(tl.float32), acc, input_precision=PRECISION)
    if BASED:
        under = tl.load(base + row[:, None] * stride_b + column[None, :], mask=mask, other=0.0)
        acc = tl.where(adapter < 0, under.to(tl.float32), acc + under.to(tl.float32))
    tl.store(out + row[:, None] * stride_o + column[None, :], acc.to(out.dtype.element_ty), mask=mask)


@dataclass(frozen=True)
class Grouped:
    """Rows by adapter: ``order`` [T] lists them, ``starts`` [L + 2] is where the group of each adapter begins.

    Group 0 holds the rows without adapter, group l + 1 those of adapter l; from starts[L + 1] on are the rows of
    adapters that do not exist.
    """

    order: torch.Tensor
    starts: torch.Tensor
    adapters: int
    rows: int

    def tiles(self, size: int) -> int:
        """A bound on the tiles of ``size`` rows, from shapes."""
        return self.rows // size + self.adapters + 2


def group_rows(adapters: torch.Tensor, count: int) -> Grouped:
    """Group rows by adapter on their device, in their order, with no host sync."""
    ids, order = torch.sort(adapters, stable=True)
    bounds = torch.searchsorted(ids, torch.arange(count + 1, device=ids.device))
    return Grouped(order, torch.cat([bounds.new_zeros(1), bounds]), count, adapters.numel())


def padded_ranks(ranks: int) -> int:
    return max(16, power_of_2(ranks))


def shrink(x: torch.Tensor, weight: torch.Tensor, scaling: torch.Tensor, grouped: Grouped) -> torch.Tensor:
    """scaling[l] * x[row] . weight[l, r] for x [T, depth], weight [L, R, depth] of any strides: low [T, padded R].

    Rows of low lie in the sorted order; those without adapter are undefined.
    """
    size = tiles.SHRINK.find(triton_devices.architecture(x.device), x.dtype)
    (_, ranks, depth), padded = weight.shape, padded_ranks(weight.shape[1])
    splits = max(1, triton.cdiv(depth, tiles.SPLIT))
    partials = torch.empty(splits, x.shape[0], padded, dtype=torch.float32, device=x.device)
    block = min(size.columns, padded)
    aligned = depth % 16 == 0 and ranks % 16 == 0
    step = size.depth if aligned else min(size.depth, tiles.UNALIGNED_DEPTH)
    lora_shrink[(grouped.tiles(size.rows), splits, padded // block)](
        x=x,
        weight=weight,
        scaling=scaling,
        order=grouped.order,
        starts=grouped.starts,
        partials=partials,
        groups=grouped.adapters + 1,
        num_rows=grouped.rows,
        depth=depth,
        ranks=ranks,
        stride_x=x.stride(0),
        stride_wl=weight.stride(0),
        stride_wr=weight.stride(1),
        stride_wk=weight.stride(2),
        stride_p=partials.stride(0),
        ROWS=size.rows,
        RANKS=block,
        DEPTH=step,
        SPLIT=tiles.SPLIT,
        PADDED=padded,
        EVEN=depth % step == 0,
        ALIGNED=ranks == padded,
        **size.options(),
    )
    if splits == 1:
        return partials[0]
    low = torch.empty(x.shape[0], padded, dtype=torch.float32, device=x.device)
    lora_join[(triton.cdiv(low.numel(), 1024),)](
        partials, low, low.numel(), SPLITS=splits, BLOCK=1024, num_warps=4, num_stages=1, enable_fp_fusion=False
    )
    return low


def expand(
    base: torch.Tensor | None, low: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, grouped: Grouped
) -> None:
    """out[row, c] = base[row, c] + low[place] . weight[l, c] for weight [L, columns, R] of any strides."""
    arch = triton_devices.architecture(out.device)
    size = tiles.EXPAND.find(arch, out.dtype)
    (_, columns, ranks), padded = weight.shape, low.shape[1]
    under = out if base is None else base
    lora_expand[(grouped.tiles(size.rows), triton.cdiv(columns, size.columns))](
        base=under,
        low=low,
        weight=weight,
        out=out,
        order=grouped.order,
        starts=grouped.starts,
        groups=grouped.adapters + 1,
        num_rows=grouped.rows,
        columns=columns,
        ranks=ranks,
        stride_b=under.stride(0),
        stride_wl=weight.stride(0),
        stride_wc=weight.stride(1),
        stride_wr=weight.stride(2),
        stride_o=out.stride(0),
        ROWS=size.rows,
        RANKS=min(size.depth, padded),
        COLUMNS=size.columns,
        PADDED=padded,
        BASED=base is not None,
        PRECISION=tiles.float32_precision(arch, out.dtype),
        **size.options(),
    )


def lora_add(
    base: torch.Tensor,
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scaling: torch.Tensor,
    adapters: torch.Tensor,
) -> torch.Tensor:
    """``toolkit::lora_add`` on a GPU (or on CPU tensors in Triton's interpreter).

    base [T, N], x [T, K], a [L, R, K], b [L, N, R], float32, bfloat16 or float16; scaling [L]; adapters [T].
    """
    out = torch.empty(base.shape, dtype=base.dtype, device=base.device)
    if out.numel() == 0:
        return out
    grouped = group_rows(adapters, a.shape[0])
    low = shrink(aligned_rows(x), a, scaling.to(torch.float32).contiguous(), grouped)
    expand(aligned_rows(base), low, b, out, grouped)
    return out
