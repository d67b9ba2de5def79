"""Selection of keys in Triton: scores of some rows at a time, then an exact search for each row's threshold.

Scores become integers of the same order. A row's threshold, the k-th largest of them, is found bit by bit from the top,
by counting; above it every key is taken, and of the keys at it those of the lowest positions. Counts are integers, so
no order of additions matters. There are no atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from toolkit.ops import triton_devices
from toolkit.ops.attention.triton_common import key_slots
from toolkit.ops.select_keys import tiles


@triton.jit
def seen_keys(query_offsets, kv_lengths, num_sequences, row):
    """The sequence of a row, and how many keys the row sees: none of a row of padding."""
    low = row * 0
    high = low + num_sequences
    while low < high:
        middle = (low + high + 1) // 2
        before = tl.load(query_offsets + middle) <= row
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    real = low < num_sequences
    length = tl.load(kv_lengths + low, mask=real, other=0)
    end = tl.load(query_offsets + low + 1, mask=real, other=0)
    return low, tl.where(real, tl.maximum(length - end + row + 1, 0), 0)


@triton.jit(do_not_specialize=["num_sequences", "first_row", "bound", "topk"])
def index_scores(
    q, k, weights, ranks, query_offsets, kv_offsets, kv_lengths, block_tables, num_sequences, first_row, bound, topk,
    scale, stride_qt, stride_qh, stride_kt, stride_wt, stride_table,
    HEADS: tl.constexpr, DEPTH: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    SLICE: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """The ranks of a tile of keys for one row: integers [bound] in the order of the scores."""
    local = tl.program_id(0)
    row = (first_row + local).to(tl.int64)
    sequence, seen = seen_keys(query_offsets, kv_lengths, num_sequences, row)
    start = tl.program_id(1) * KEYS
    if (start >= seen) | (seen <= topk):
        return
    key = start + tl.arange(0, KEYS)
    key_ok = key < seen
    base = tl.load(kv_offsets + sequence)
    slot = key_slots(key, key_ok, base, block_tables + sequence.to(tl.int64) * stride_table, PAGE)
    scores = tl.zeros([KEYS], tl.float32)
    for first in range(0, HEADS, ROWS):
        head = first + tl.arange(0, ROWS)
        head_ok = head < HEADS
        products = tl.zeros([ROWS, KEYS], tl.float32)
        for begin in tl.static_range(0, BLOCK_D, SLICE):
            d = begin + tl.arange(0, SLICE)
            left = tl.load(
                q + row * stride_qt + head[:, None] * stride_qh + d[None, :],
                mask=head_ok[:, None] & (d < DEPTH)[None, :], other=0.0,
            )  # fmt: skip
            right = tl.load(
                k + slot[None, :] * stride_kt + d[:, None], mask=key_ok[None, :] & (d < DEPTH)[:, None], other=0.0
            )
            products = tl.dot(left, right, products, input_precision="ieee")
        weight = tl.load(weights + row * stride_wt + head, mask=head_ok, other=0.0).to(tl.float32)
        products = products * scale
        positive = tl.where(products <= 0.0, 0.0, products)
        scores += tl.sum(weight[:, None] * positive, 0)
    scores = tl.where(scores == scores, scores, float("-inf"))
    scores = tl.where(scores == 0.0, 0.0, scores)  # without the sign of zero
    bits = scores.to(tl.int32, bitcast=True)
    rank = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    tl.store(ranks + local.to(tl.int64) * bound + key, rank, mask=key_ok)


@triton.jit(do_not_specialize=["num_sequences", "first_row", "bound", "topk"])
def select_ranked(
    ranks, out, query_offsets, kv_lengths, num_sequences, first_row, bound, topk, stride_out, KEYS: tl.constexpr
):  # fmt: skip
    """The positions of the ``topk`` keys of the highest ranks of one row, ascending."""
    local = tl.program_id(0).to(tl.int64)
    row = first_row + local
    _, seen = seen_keys(query_offsets, kv_lengths, num_sequences, row)
    own = ranks + local * bound
    target = out + row * stride_out
    # Ranks from 0 on in int64. The threshold is the largest number that at least topk of them reach, found by two bits
    # at a time; -1, below every rank, where the row sees no more keys than are selected.
    steps = tl.where(seen <= topk, 0, 16)
    threshold = tl.where(seen <= topk, -1, 0).to(tl.int64)
    above = tl.zeros([], tl.int64)
    for step in range(steps):
        unit = tl.full([], 1, tl.int64) << (30 - 2 * step)
        one = tl.zeros([KEYS], tl.int32)
        two = tl.zeros([KEYS], tl.int32)
        three = tl.zeros([KEYS], tl.int32)
        for start in range(0, seen, KEYS):
            key = start + tl.arange(0, KEYS)
            rank = tl.load(own + key, mask=key < seen, other=0).to(tl.int64) + 0x80000000
            rank = tl.where(key < seen, rank, -1)
            one += (rank >= threshold + unit).to(tl.int32)
            two += (rank >= threshold + 2 * unit).to(tl.int32)
            three += (rank >= threshold + 3 * unit).to(tl.int32)
        reached = (tl.sum(one) >= topk).to(tl.int64) + (tl.sum(two) >= topk).to(tl.int64)
        threshold += unit * (reached + (tl.sum(three) >= topk).to(tl.int64))
    for start in range(0, seen, KEYS):
        key = start + tl.arange(0, KEYS)
        rank = tl.load(own + key, mask=key < seen, other=0).to(tl.int64) + 0x80000000
        above += tl.sum(((rank > threshold) & (key < seen)).to(tl.int64))
    equal_left = topk - above
    written = tl.zeros([], tl.int64)
    for start in range(0, seen, KEYS):
        key = start + tl.arange(0, KEYS)
        key_ok = key < seen
        rank = tl.load(own + key, mask=key_ok, other=0).to(tl.int64) + 0x80000000
        equal = (rank == threshold) & key_ok
        turn = tl.cumsum(equal.to(tl.int64), 0)
        taken = key_ok & ((rank > threshold) | (equal & (turn <= equal_left)))
        index = written + tl.cumsum(taken.to(tl.int64), 0) - 1
        tl.store(target + index, key.to(tl.int64), mask=taken)
        written += tl.sum(taken.to(tl.int64))
        equal_left -= tl.sum(equal.to(tl.int64))


def select_keys(
    q: torch.Tensor,
    k: torch.Tensor,
    weights: torch.Tensor,
    query_offsets: torch.Tensor,
    kv_offsets: torch.Tensor,
    kv_lengths: torch.Tensor,
    block_tables: torch.Tensor | None,
    block_size: int,
    topk: int,
    width: int,
    scale: float,
) -> torch.Tensor:
    """``toolkit::select_keys`` on a GPU (or on CPU tensors in Triton's interpreter): float32, bfloat16 or float16,
    products and sums in float32. The ranks of at most ``tiles.WORKSPACE`` (row, key) pairs are held at a time."""
    arch = triton_devices.architecture(q.device)
    tile = tiles.SCORES.find(arch, q.dtype, q.shape[-1])
    out = torch.full((q.shape[0], width), -1, dtype=torch.int64, device=q.device)
    sequences = kv_lengths.shape[0]
    if out.numel() == 0 or sequences == 0:
        return out
    q, k, weights = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, weights))
    # No length is read on the host: the bound of a sequence's keys is what its block table or the rows can hold.
    bound = k.shape[0] if block_tables is None else block_tables.shape[1] * block_size
    rows = max(1, min(q.shape[0], tiles.WORKSPACE // bound))
    ranks = torch.empty(rows * bound, dtype=torch.int32, device=q.device)
    table = kv_lengths if block_tables is None else block_tables.contiguous()
    shared: dict[str, Any] = {
        "query_offsets": query_offsets,
        "kv_lengths": kv_lengths,
        "num_sequences": sequences,
        "bound": bound,
        "topk": topk,
    }
    block = max(16, triton.next_power_of_2(q.shape[-1]))
    for first in range(0, q.shape[0], rows):
        count = min(rows, q.shape[0] - first)
        index_scores[(count, triton.cdiv(bound, tile.columns))](
            q,
            k,
            weights,
            ranks,
            kv_offsets=kv_lengths if block_tables is not None else kv_offsets,
            block_tables=table,
            first_row=first,
            scale=scale,
            stride_qt=q.stride(0),
            stride_qh=q.stride(1),
            stride_kt=k.stride(0),
            stride_wt=weights.stride(0),
            stride_table=0 if block_tables is None else table.stride(0),
            HEADS=q.shape[1],
            DEPTH=q.shape[-1],
            BLOCK_D=block,
            ROWS=tile.rows,
            KEYS=tile.columns,
            SLICE=min(block, tile.depth),
            PAGE=0 if block_tables is None else block_size,
            **shared,
            **tile.options(),
        )
        select_ranked[(count,)](
            ranks,
            out,
            first_row=first,
            stride_out=out.stride(0),
            KEYS=tiles.SELECT.keys(arch),
            num_warps=tiles.SELECT.warps,
            enable_fp_fusion=False,
            **shared,
        )
    return out
