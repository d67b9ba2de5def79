"""``dispatch_plan`` in Triton: a stable counting sort of (token, k) pairs by expert, in three kernels.

Count the pairs of each expert per block of pairs, scan the counts over blocks, assign the rows: a pair's row is its
expert's first row, plus that expert's pairs in earlier blocks, plus those before it in its own block. Integers only,
no explicit atomics, no host sync.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.dispatch_plan.reference import tile_bound

_BLOCK = 64  # pairs per program
_SCAN = (128, 16)  # blocks and bins per program of the scan
_HELD = 2048  # tiles of the plan times bins, per program


@triton.jit(do_not_specialize=["pairs"])
def bins_of(topk_ids, pair, pairs, EXPERTS: tl.constexpr):
    """The experts of pairs as int32; EXPERTS for a skipped pair, EXPERTS + 1 past the last pair."""
    there = pair < pairs
    expert = tl.load(topk_ids + pair, mask=there, other=0)
    known = (expert >= 0) & (expert < EXPERTS)
    return tl.where(there, tl.where(known, expert, EXPERTS), EXPERTS + 1).to(tl.int32)


@triton.jit(do_not_specialize=["pairs"])
def count_pairs(topk_ids, counts, pairs, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[block, bin]: the pairs of each expert, and the skipped ones, in a block of pairs."""
    pair = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.histogram(bins_of(topk_ids, pair, pairs, EXPERTS), BINS)
    tl.store(counts + tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS), found.to(tl.int64))


@triton.jit(do_not_specialize=["blocks"])
def add_counts(counts, totals, blocks, BINS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """counts[block, bin] becomes the exclusive sum over blocks, totals[bin] the sum over all blocks."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    running = tl.zeros([COLUMNS], tl.int64)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        at = counts + block.to(tl.int64)[:, None] * BINS + column[None, :]
        own = tl.load(at, mask=(block < blocks)[:, None], other=0)
        tl.store(at, running[None, :] + tl.cumsum(own, 0) - own, mask=(block < blocks)[:, None])
        running += tl.sum(own, 0)
    tl.store(totals + column, running)


@triton.jit(do_not_specialize=["pairs", "tile_count"])
def assign_rows(
    topk_ids, earlier, totals, order, rows, offsets, tiles, pairs, tile_count,
    TILE: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """order and rows of a block of pairs; all programs write a share of the tiles, the first writes the offsets."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.load(totals + bins)
    begin = tl.cumsum(total, 0) - total
    if program == 0:
        tl.store(offsets + bins, begin, mask=bins <= EXPERTS)
    pair = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = bins_of(topk_ids, pair, pairs, EXPERTS)
    before = tl.arange(0, BLOCK)[None, :] < tl.arange(0, BLOCK)[:, None]
    equal = expert[:, None] == tl.reshape(expert, [1, BLOCK])
    row = tl.sum((before & equal).to(tl.int64), 1)
    row += tl.load(earlier + program.to(tl.int64) * BINS + expert, mask=pair < pairs, other=0)
    row += tl.gather(begin, expert, 0)
    tl.store(order + row, pair, mask=pair < pairs)
    tl.store(rows + pair, tl.where(expert < EXPERTS, row, -1), mask=pair < pairs)
    high = tl.where(bins < EXPERTS, (total + TILE - 1) // TILE, 0)  # tiles of each expert
    ends = tl.cumsum(high, 0)
    for first in range(program * TILES, tile_count, tl.num_programs(0) * TILES):
        index = first + tl.arange(0, TILES)
        owner = tl.sum(((ends[None, :] <= index[:, None]) & (bins < EXPERTS)[None, :]).to(tl.int64), 1)
        own = bins[None, :] == owner[:, None]
        start = tl.sum(tl.where(own, begin[None, :], 0), 1)
        local = index - tl.sum(tl.where(own, (ends - high)[None, :], 0), 1)
        start += tl.where(owner < EXPERTS, local * TILE, 0)
        tl.store(tiles + 2 * index, owner, mask=index < tile_count)
        tl.store(tiles + 2 * index + 1, start, mask=index < tile_count)


def dispatch_plan(topk_ids: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``toolkit::dispatch_plan`` on a GPU (or on CPU tensors in Triton's interpreter)."""
    pairs, count = topk_ids.numel(), tile_bound(topk_ids.numel(), num_experts, tile)

    def empty(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=topk_ids.device)

    order, rows, offsets, tiles = empty(pairs), empty(*topk_ids.shape), empty(num_experts + 1), empty(count, 2)
    if not pairs:
        return order, rows, offsets.zero_(), tiles
    blocks, (height, width) = triton.cdiv(pairs, _BLOCK), _SCAN
    bins = max(width, triton.next_power_of_2(num_experts + 2))
    counts, totals = empty(blocks, bins), empty(bins)
    ids, options = topk_ids.contiguous(), {"num_warps": 4, "num_stages": 1}
    constants = {"EXPERTS": num_experts, "BINS": bins, "BLOCK": _BLOCK}
    count_pairs[(blocks,)](ids, counts, pairs, **constants, **options)
    add_counts[(bins // width,)](counts, totals, blocks, BINS=bins, ROWS=height, COLUMNS=width, **options)
    assign_rows[(blocks,)](
        topk_ids=ids,
        earlier=counts,
        totals=totals,
        order=order,
        rows=rows,
        offsets=offsets,
        tiles=tiles,
        pairs=pairs,
        tile_count=count,
        TILE=tile,
        TILES=max(1, _HELD // bins),
        **constants,
        **options,
    )
    return order, rows, offsets, tiles
