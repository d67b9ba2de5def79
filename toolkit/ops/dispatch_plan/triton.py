"""``dispatch_plan`` in Triton: count the slots of each expert block by block, add up the counts, place the slots.

A stable counting sort: a slot's row is where its expert's rows begin, plus the slots of that expert in earlier blocks,
plus those before it in its own. Integers only, no atomics of ours, nothing read by the host; three kernels, whatever
the number of slots.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.dispatch_plan.reference import tile_bound

_BLOCK = 64  # slots of a program
_SCAN = (128, 16)  # blocks and bins that a program of the scan holds
_HELD = 2048  # tiles of the plan, times bins, that a program holds


@triton.jit(do_not_specialize=["slots"])
def bins_of(experts, slot, slots, EXPERTS: tl.constexpr):
    """The experts of slots as int32; EXPERTS for a slot that is skipped, one more for a slot there is not."""
    there = slot < slots
    expert = tl.load(experts + slot, mask=there, other=0)
    known = (expert >= 0) & (expert < EXPERTS)
    return tl.where(there, tl.where(known, expert, EXPERTS), EXPERTS + 1).to(tl.int32)


@triton.jit(do_not_specialize=["slots"])
def count_slots(experts, counts, slots, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr):
    """counts[block, bin]: the slots of each expert, and of those skipped, in a block of slots."""
    slot = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    found = tl.histogram(bins_of(experts, slot, slots, EXPERTS), BINS)
    tl.store(counts + tl.program_id(0).to(tl.int64) * BINS + tl.arange(0, BINS), found.to(tl.int64))


@triton.jit(do_not_specialize=["blocks"])
def add_counts(counts, totals, blocks, BINS: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """counts[block, bin] become those of all earlier blocks; totals[bin] those of all blocks."""
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    running = tl.zeros([COLUMNS], tl.int64)
    for first in range(0, blocks, ROWS):
        block = first + tl.arange(0, ROWS)
        at = counts + block.to(tl.int64)[:, None] * BINS + column[None, :]
        own = tl.load(at, mask=(block < blocks)[:, None], other=0)
        tl.store(at, running[None, :] + tl.cumsum(own, 0) - own, mask=(block < blocks)[:, None])
        running += tl.sum(own, 0)
    tl.store(totals + column, running)


@triton.jit(do_not_specialize=["slots", "tile_count"])
def place_slots(
    experts, earlier, totals, order, rows, offsets, tiles, slots, tile_count,
    TILE: tl.constexpr, EXPERTS: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """order and rows of a block of slots; the programs share out the plan's tiles, and the first writes the offsets."""
    program = tl.program_id(0)
    bins = tl.arange(0, BINS)
    total = tl.load(totals + bins)
    begin = tl.cumsum(total, 0) - total
    if program == 0:
        tl.store(offsets + bins, begin, mask=bins <= EXPERTS)
    slot = program.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    expert = bins_of(experts, slot, slots, EXPERTS)
    before = tl.arange(0, BLOCK)[None, :] < tl.arange(0, BLOCK)[:, None]
    alike = expert[:, None] == tl.reshape(expert, [1, BLOCK])
    row = tl.sum((before & alike).to(tl.int64), 1)
    row += tl.load(earlier + program.to(tl.int64) * BINS + expert, mask=slot < slots, other=0)
    row += tl.gather(begin, expert, 0)
    tl.store(order + row, slot, mask=slot < slots)
    tl.store(rows + slot, tl.where(expert < EXPERTS, row, -1), mask=slot < slots)
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


def dispatch_plan(experts: Tensor, num_experts: int, tile: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """``toolkit::dispatch_plan`` on a GPU (or on CPU tensors in Triton's interpreter)."""
    slots, count = experts.numel(), tile_bound(experts.numel(), num_experts, tile)

    def made(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.int64, device=experts.device)

    order, rows, offsets, tiles = made(slots), made(*experts.shape), made(num_experts + 1), made(count, 2)
    if not slots:
        return order, rows, offsets.zero_(), tiles
    blocks, (height, width) = triton.cdiv(slots, _BLOCK), _SCAN
    bins = max(width, triton.next_power_of_2(num_experts + 2))
    counts, totals = made(blocks, bins), made(bins)
    ids, options = experts.contiguous(), {"num_warps": 4, "num_stages": 1}
    fixed = {"EXPERTS": num_experts, "BINS": bins, "BLOCK": _BLOCK}
    count_slots[(blocks,)](ids, counts, slots, **fixed, **options)
    add_counts[(bins // width,)](counts, totals, blocks, BINS=bins, ROWS=height, COLUMNS=width, **options)
    place_slots[(blocks,)](
        ids,
        counts,
        totals,
        order,
        rows,
        offsets,
        tiles,
        slots,
        count,
        TILE=tile,
        TILES=max(1, _HELD // bins),
        **fixed,
        **options,
    )
    return order, rows, offsets, tiles
