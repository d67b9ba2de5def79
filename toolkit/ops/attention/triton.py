"""Paged, variable-length attention forward in Triton: one kernel for prefill, chunks and decode.

A program owns a tile of rows (queries of one sequence x the query heads of one key/value head) and walks that
sequence's keys from key 0 in tiles of a fixed size, with an online softmax in that order. A key tile that a
row cannot see leaves the row as it was (its probabilities are 0 and its rescale is 1), so a row's bits depend
on its own query, its keys and the tile table: not on chunking, page layout, neighbours or batch size. There
are no atomics. Floating-point contraction is pinned off, so that a compiler default cannot move bits between versions
or between the kernel's variants.

The sums start anew at every split of keys, of a fixed size from key 0 on, and the splits are joined in order; a split
that a row cannot see leaves it as it was. Shapes decide whether one program takes the splits in turn, or each has a
separate program and a second kernel joins them; no bit depends on it.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from toolkit.ops import triton_devices
from toolkit.ops.attention import tiles
from toolkit.ops.attention.triton_common import (
    check,
    inlined,
    key_slots,
    launch_sizes,
    load_rows,
    owned_rows,
    query_grid,
    row_spans,
    rows_contiguous,
    rows_of,
    seen_range,
    sliced_products,
    tanh,
    visible_keys,
)
from toolkit.ops.attention.triton_splits import finish_rows, join, join_kept, keep_rows, kept_rows, splits_of


@triton.jit
def attend_keys(
    q, k, v, q_row, row_ok, position, span_first, span_end, begin, stop,
    kv_length, kv_head, base, table, own, scale, window, softcap, stride_kt, stride_kh, stride_vt, stride_vh,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, PAGE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
    SLICE: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, SPANNED: tl.constexpr,
):  # fmt: skip
    """Of keys ``begin`` ... ``stop``: each row's largest score (times log2 e), sum of weights, and weighted values."""
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    if not SLICE:
        q_tile = load_rows(q, q_row, row_ok, 0, HEAD_DIM, BLOCK_D)
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    for key_start in range(begin, stop, KEYS):
        key = key_start + tl.arange(0, KEYS)
        key_ok = key < kv_length
        slot = key_slots(key, key_ok, base, table, PAGE)
        if SLICE:
            k_row = slot * stride_kt + kv_head * stride_kh
            scores = sliced_products(q, k, q_row, row_ok, k_row, key_ok, HEAD_DIM, ROWS, KEYS, SLICE)
        else:
            k_tile = tl.load(
                k + slot[None, :] * stride_kt + kv_head * stride_kh + d[:, None],
                mask=key_ok[None, :] & (d < HEAD_DIM)[:, None], other=0.0,
            )  # fmt: skip
            scores = tl.dot(q_tile, k_tile, input_precision="ieee")
        seen = visible_keys(
            key[None, :], position[:, None], kv_length, own, window, span_first[:, None], span_end[:, None],
            WINDOWED, MASK, SPANNED,
        )  # fmt: skip
        if SCORE is not None:
            scores = tanh(scores * scale / softcap) * softcap if CAPPED else scores * scale
            scores = SCORE(scores, position[:, None], key[None, :], own) * 1.4426950408889634
        elif CAPPED:
            scores = tanh(scores * scale / softcap) * softcap * 1.4426950408889634
        else:
            scores = scores * (scale * 1.4426950408889634)
        scores = tl.where(seen, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.math.exp2(top - anchor)
        weights = tl.math.exp2(scores - anchor[:, None])
        total = total * rescale + tl.sum(weights, 1)
        v_tile = tl.load(
            v + slot[:, None] * stride_vt + kv_head * stride_vh + e[None, :],
            mask=key_ok[:, None] & (e < V_DIM)[None, :], other=0.0,
        )  # fmt: skip
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * rescale[:, None], input_precision="ieee")
        top = new_top
    return top, total, acc


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "first_tile", "window"])
def attention_forward(
    q, k, v, out, lse, sums, marks, query_offsets, kv_offsets, kv_lengths, block_tables, sinks, parameters, spans,
    num_sequences, num_rows, first_tile, scale, window, softcap,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_lt, stride_table,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PAGE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SLICE: tl.constexpr,
    SUNK: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, PARAMETERS: tl.constexpr,
    SPANNED: tl.constexpr, SPLIT: tl.constexpr, APART: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """PAGE 0 means contiguous keys. SLICE, where not 0, is how much of the head dimension a product takes at a time.

    SPLIT 0: no sequence has more keys than a split. Otherwise ``sums`` and ``marks`` hold what is summed so far: with
    APART every split, for ``attention_join``, else what the program itself picks up again after its next split.
    """
    QUERIES: tl.constexpr = ROWS // HEADS
    sequence, local, kv_length, first, end, kv_head, query, head, position, row_ok = owned_rows(
        query_offsets, kv_lengths, num_sequences, num_rows, first_tile + tl.program_id(0), GROUP, HEADS, ROWS
    )
    if first >= end:
        return
    real = sequence < num_sequences
    base = tl.load(kv_offsets + sequence, mask=real, other=0)
    table = block_tables + sequence.to(tl.int64) * stride_table
    own = parameters + (tl.where(row_ok, head, 0) * PARAMETERS)[:, None]
    span_first, span_end = row_spans(spans, query, row_ok, kv_length, SPANNED)
    begin, stop = seen_range(
        kv_length, first, end, position, row_ok, own, window, span_first, span_end,
        QUERIES, KEYS, WINDOWED, FIRST, SPANNED,
    )  # fmt: skip
    if SPLIT:
        first_split, stop_split = splits_of(begin, stop, SPLIT)
        from_split, to_split = first_split, stop_split
        if APART:
            from_split = first_split + tl.program_id(2)
            to_split = tl.minimum(from_split + 1, stop_split)
        # Rows are looked up again for every split, and nothing is hoisted: addresses that are only needed after the
        # loop over keys would take its registers.
        for split in tl.range(from_split, to_split, disable_licm=True):
            kv_length, first, end, kv_head, query, head, position, row_ok = rows_of(
                query_offsets, kv_lengths, num_sequences, num_rows, sequence, local, GROUP, HEADS, ROWS
            )
            base = tl.load(kv_offsets + sequence, mask=real, other=0)
            q_row = query * stride_qt + head * stride_qh
            own = parameters + (tl.where(row_ok, head, 0) * PARAMETERS)[:, None]
            own_first, own_end = row_spans(spans, query, row_ok, kv_length, SPANNED)
            top, total, acc = attend_keys(
                q, k, v, q_row, row_ok, position, own_first, own_end,
                tl.maximum(begin, split * SPLIT), tl.minimum(stop, (split + 1) * SPLIT),
                kv_length, kv_head, base, table, own, scale, window, softcap,
                stride_kt, stride_kh, stride_vt, stride_vh,
                HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, ROWS, KEYS, PAGE, WINDOWED, CAPPED, SLICE, SCORE, MASK, SPANNED,
            )  # fmt: skip
            if stop_split == first_split + 1:
                finish_rows(
                    top, total, acc, out, lse, sinks, query, head, row_ok, real, 0,
                    stride_ot, stride_lt, V_DIM, BLOCK_V, SUNK,
                )  # fmt: skip
            else:
                if APART:
                    place = (query * stride_lt + head) * tl.num_programs(2) + (split - first_split)
                    keep_rows(top, total, acc, sums, marks, place, row_ok, V_DIM, BLOCK_V)
                else:
                    program = (tl.program_id(0) * tl.num_programs(1) + tl.program_id(1)).to(tl.int64)
                    place = (program * ROWS + tl.arange(0, ROWS)) * 2
                    slot = (split > first_split).to(tl.int32)
                    keep_rows(top, total, acc, sums, marks, place + slot, row_ok, V_DIM, BLOCK_V)
                    if split > first_split:
                        join_kept(
                            sums, marks, place, out, lse, sinks, query, head, row_ok, real, split + 1 == stop_split,
                            stride_ot, stride_lt, V_DIM, COLUMNS, SUNK,
                        )  # fmt: skip
    else:
        q_row = query * stride_qt + head * stride_qh
        top, total, acc = attend_keys(
            q, k, v, q_row, row_ok, position, span_first, span_end, begin, stop,
            kv_length, kv_head, base, table, own, scale, window, softcap,
            stride_kt, stride_kh, stride_vt, stride_vh,
            HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, ROWS, KEYS, PAGE, WINDOWED, CAPPED, SLICE, SCORE, MASK, SPANNED,
        )  # fmt: skip
        finish_rows(
            top, total, acc, out, lse, sinks, query, head, row_ok, real, 0,
            stride_ot, stride_lt, V_DIM, BLOCK_V, SUNK,
        )  # fmt: skip


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "slots", "window"])
def attention_join(
    sums, marks, out, lse, query_offsets, kv_lengths, sinks, parameters, spans,
    num_sequences, num_rows, slots, window, stride_ot, stride_lt,
    V_DIM: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr, WINDOWED: tl.constexpr, SUNK: tl.constexpr, FIRST: tl.constexpr, PARAMETERS: tl.constexpr,
    SPANNED: tl.constexpr, SPLIT: tl.constexpr,
):  # fmt: skip
    """out and lse of the tiles of rows that have several splits, COLUMNS of the values a program."""
    sequence, _, kv_length, first, end, _, query, head, position, row_ok = owned_rows(
        query_offsets, kv_lengths, num_sequences, num_rows, tl.program_id(0), GROUP, HEADS, ROWS
    )
    if first >= end:
        return
    own = parameters + (tl.where(row_ok, head, 0) * PARAMETERS)[:, None]
    span_first, span_end = row_spans(spans, query, row_ok, kv_length, SPANNED)
    begin, stop = seen_range(
        kv_length, first, end, position, row_ok, own, window, span_first, span_end,
        ROWS // HEADS, KEYS, WINDOWED, FIRST, SPANNED,
    )  # fmt: skip
    first_split, stop_split = splits_of(begin, stop, SPLIT)
    if stop_split == first_split + 1:
        return
    column = tl.program_id(2) * COLUMNS
    place = (query * stride_lt + head) * slots
    top, total, acc = kept_rows(sums, marks, place, row_ok, column, V_DIM, COLUMNS)
    for slot in range(1, stop_split - first_split):
        later = kept_rows(sums, marks, place + slot, row_ok, column, V_DIM, COLUMNS)
        top, total, acc = join(top, total, acc, later[0], later[1], later[2])
    finish_rows(
        top, total, acc, out, lse, sinks, query, head, row_ok, sequence < num_sequences, column,
        stride_ot, stride_lt, V_DIM, COLUMNS, SUNK,
    )  # fmt: skip


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_offsets: torch.Tensor,
    kv_offsets: torch.Tensor,
    kv_lengths: torch.Tensor,
    block_tables: torch.Tensor | None,
    block_size: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None = None,
    modifier: str = "",
    parameters: torch.Tensor | None = None,
    query_ranges: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``toolkit::attention`` on a GPU (or on CPU tensors in Triton's interpreter).

    q [T, Hq, D]; k [rows, Hkv, D], v [rows, Hkv, Dv]; float32, bfloat16 or float16, products in IEEE
    precision, softmax and sums in float32. Returns out [T, Hq, Dv] in q's dtype and lse [T, Hq] in float32.
    Slots that no sequence holds are never read. A sequence's own values must be finite, also the later ones:
    a probability of 0 still multiplies what stands in its tile.
    """
    check(q, k, v)
    q, k, v = rows_contiguous(q), rows_contiguous(k), rows_contiguous(v)
    out = torch.empty(q.shape[0], q.shape[1], v.shape[-1], dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[0], q.shape[1], dtype=torch.float32, device=q.device)
    if q.numel() == 0:
        return out, lse
    sizes = launch_sizes(q, k, v, tiles.FORWARD)
    sequences = kv_lengths.shape[0]
    table = kv_lengths if block_tables is None else block_tables.contiguous()
    own, functions = inlined(modifier, parameters, q)
    logits = lse if sinks is None else sinks.float()
    flags: dict[str, Any] = {
        "WINDOWED": window > 0,
        "SUNK": sinks is not None,
        "FIRST": functions["first"],
        "PARAMETERS": 0 if parameters is None else parameters.shape[1],
        "SPANNED": spans is not None,
        "spans": kv_lengths if spans is None else spans.contiguous(),
    }
    grid = query_grid(q, k.shape[1], sequences, sizes)
    # No length is read on the host: the bound of a sequence's keys is what its block table or the rows can hold.
    longest = k.shape[0] if block_tables is None else block_tables.shape[1] * block_size
    split = tiles.SPLITS.find(triton_devices.architecture(q.device), q.dtype, max(q.shape[-1], v.shape[-1]))
    slots = triton.cdiv(longest, split)
    if window > 0 and spans is None:
        slots = min(slots, (window + sizes["ROWS"] // sizes["HEADS"] - 2) // split + 2)
    apart = slots > 1 and q.shape[0] <= tiles.APART_ROWS and out.numel() * slots <= tiles.WORKSPACE
    columns = min(sizes["BLOCK_V"], tiles.JOINED_COLUMNS)
    tiles_a_launch, kept = grid[0], 0
    if apart:
        kept = q.shape[0] * q.shape[1] * slots
    elif slots > 1:
        rows_a_tile = 2 * grid[1] * sizes["ROWS"]  # what is summed so far, and the split at hand
        tiles_a_launch = min(grid[0], max(1, tiles.WORKSPACE // (rows_a_tile * v.shape[-1])))
        kept = tiles_a_launch * rows_a_tile
    sums = torch.empty(kept * v.shape[-1], dtype=torch.float32, device=q.device)
    marks = torch.empty(kept * 2, dtype=torch.float32, device=q.device)
    for first_tile in range(0, grid[0], tiles_a_launch):
        count = min(tiles_a_launch, grid[0] - first_tile)
        attention_forward[(count, grid[1], slots if apart else 1)](
            q=q,
            k=k,
            v=v,
            out=out,
            lse=lse,
            sums=sums,
            marks=marks,
            query_offsets=query_offsets,
            kv_offsets=kv_lengths if block_tables is not None else kv_offsets,
            kv_lengths=kv_lengths,
            block_tables=table,
            sinks=logits,
            parameters=own,
            num_sequences=sequences,
            num_rows=q.shape[0],
            first_tile=first_tile,
            scale=scale,
            window=window,
            softcap=softcap,
            stride_qt=q.stride(0),
            stride_qh=q.stride(1),
            stride_kt=k.stride(0),
            stride_kh=k.stride(1),
            stride_vt=v.stride(0),
            stride_vh=v.stride(1),
            stride_ot=out.stride(0),
            stride_lt=lse.stride(0),
            stride_table=0 if block_tables is None else table.stride(0),
            PAGE=0 if block_tables is None else block_size,
            CAPPED=softcap > 0,
            SCORE=functions["score"],
            MASK=functions["visible"],
            SPLIT=split if slots > 1 else 0,
            APART=apart,
            COLUMNS=columns,
            **flags,
            **sizes,
        )
    if apart:
        attention_join[(*grid, triton.cdiv(v.shape[-1], columns))](
            sums=sums,
            marks=marks,
            out=out,
            lse=lse,
            query_offsets=query_offsets,
            kv_lengths=kv_lengths,
            sinks=logits,
            parameters=own,
            num_sequences=sequences,
            num_rows=q.shape[0],
            slots=slots,
            window=window,
            stride_ot=out.stride(0),
            stride_lt=lse.stride(0),
            V_DIM=v.shape[-1],
            COLUMNS=columns,
            SPLIT=split,
            num_warps=4,
            enable_fp_fusion=False,
            **flags,
            **{name: sizes[name] for name in ("GROUP", "HEADS", "ROWS", "KEYS")},
        )
    return out, lse
