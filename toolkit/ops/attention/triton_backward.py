"""Backward of variable-length attention in Triton, over contiguous keys or through block tables.

Two kernels, no atomics: one owns a tile of queries and sums dq over its keys in order, the other owns a tile
of rows of k and v of one head and sums dk, dv over their queries in order. The probabilities are recomputed from the
saved log-sum-exp; nothing of size queries x keys is kept.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from toolkit.errors import ToolkitError
from toolkit.ops.attention import tiles
from toolkit.ops.attention.triton_backward_keys import (
    attention_backward_keys,
    attention_backward_sinks,
    probabilities,
)
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
    seen_range,
    sliced_products,
    store_rows,
    visible_keys,
)
from toolkit.ops.tiles import GemmTile, TileTable


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "window"])
def attention_backward_queries(
    grad, q, k, v, out, lse, delta, dq, positions, query_offsets, kv_offsets, kv_lengths, block_tables, parameters,
    spans, num_sequences, num_rows, scale, window, softcap,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_ot, stride_oh, stride_lt, stride_dt, stride_table,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TAIL: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PAGE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SLICE: tl.constexpr,
    BOTH: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr, PARAMETERS: tl.constexpr, SPANNED: tl.constexpr,
):  # fmt: skip
    """dq of a tile of rows, and for the other kernels delta = sum(out * grad) and with pages the position of each row.

    SLICE, where not 0, is how much of the head dimension a product takes at a time; TAIL columns of dq follow BLOCK_D.
    """
    sequence, _, kv_length, first, end, kv_head, query, head, position, row_ok = owned_rows(
        query_offsets, kv_lengths, num_sequences, num_rows, tl.program_id(0), GROUP, HEADS, ROWS
    )
    if first >= end:
        return
    base = tl.load(kv_offsets + sequence, mask=sequence < num_sequences, other=0)
    table = block_tables + sequence.to(tl.int64) * stride_table
    own = parameters + (tl.where(row_ok, head, 0) * PARAMETERS)[:, None]
    span_first, span_end = row_spans(spans, query, row_ok, kv_length, SPANNED)
    begin, stop = seen_range(
        kv_length, first, end, position, row_ok, own, window, span_first, span_end,
        ROWS // HEADS, KEYS, WINDOWED, FIRST, SPANNED,
    )  # fmt: skip
    q_row, g_row = query * stride_qt + head * stride_qh, query * stride_gt + head * stride_gh
    if not SLICE:
        q_tile = load_rows(q, q_row, row_ok, 0, HEAD_DIM, BLOCK_D)
    g_tile = load_rows(grad, g_row, row_ok, 0, V_DIM, BLOCK_V)
    o_tile = load_rows(out, query * stride_ot + head * stride_oh, row_ok, 0, V_DIM, BLOCK_V)
    row_lse = tl.load(lse + query * stride_lt + head, mask=row_ok, other=0.0)
    row_delta = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    tl.store(delta + query * stride_lt + head, row_delta, mask=row_ok)
    if PAGE:
        tl.store(positions + query, position, mask=row_ok & (head == 0))
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    rest = tl.zeros([ROWS, TAIL if TAIL else 16], tl.float32)
    for key_start in range(begin, stop, KEYS):
        key = key_start + tl.arange(0, KEYS)
        key_ok = key < kv_length
        slot = key_slots(key, key_ok, base, table, PAGE)
        k_row, v_row = slot * stride_kt + kv_head * stride_kh, slot * stride_vt + kv_head * stride_vh
        k_tile = load_rows(k, k_row, key_ok, 0, HEAD_DIM, BLOCK_D)
        if SLICE:
            products = sliced_products(q, k, q_row, row_ok, k_row, key_ok, HEAD_DIM, ROWS, KEYS, SLICE)
        else:
            products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = visible_keys(
            key[None, :], position[:, None], kv_length, own, window, span_first[:, None], span_end[:, None],
            WINDOWED, MASK, SPANNED,
        )  # fmt: skip
        weights, slope, seen = probabilities(
            products, seen, row_lse[:, None], position[:, None], key[None, :], own, scale, softcap, CAPPED, BOTH
        )
        if SLICE:
            grad_weights = sliced_products(grad, v, g_row, row_ok, v_row, key_ok, V_DIM, ROWS, KEYS, SLICE)
        else:
            v_tile = load_rows(v, v_row, key_ok, 0, V_DIM, BLOCK_V)
            grad_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
        grad_products = weights * (grad_weights - row_delta[:, None]) * slope
        if BOTH is not None:  # where nothing is seen, the slope may be anything
            grad_products = tl.where(seen, grad_products, 0.0)
        acc = tl.dot(grad_products.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
        if TAIL:
            k_rest = load_rows(k, k_row, key_ok, BLOCK_D, HEAD_DIM, TAIL)
            rest = tl.dot(grad_products.to(k_tile.dtype), k_rest, rest, input_precision="ieee")
    d_row = query * stride_dt + head * HEAD_DIM
    store_rows(dq, d_row, row_ok, 0, acc, HEAD_DIM, BLOCK_D)
    if TAIL:
        store_rows(dq, d_row, row_ok, BLOCK_D, rest, HEAD_DIM, TAIL)


def backward_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: TileTable[GemmTile]) -> dict[str, Any]:
    """``launch_sizes``, with wide heads cut into a power of two and a rest."""
    sizes = launch_sizes(q, k, v, table)
    head_dim, sizes["TAIL"] = q.shape[-1], 0
    if head_dim > 256 and sizes["BLOCK_D"] > head_dim:
        sizes["BLOCK_D"] //= 2
        sizes["TAIL"] = max(16, triton.next_power_of_2(head_dim - sizes["BLOCK_D"]))
    return sizes


def attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    query_offsets: torch.Tensor,
    kv_offsets: torch.Tensor,
    kv_lengths: torch.Tensor,
    scale: float,
    window: int,
    softcap: float,
    block_tables: torch.Tensor | None = None,
    block_size: int = 0,
    sinks: torch.Tensor | None = None,
    modifier: str = "",
    parameters: torch.Tensor | None = None,
    query_ranges: torch.Tensor | None = None,
    spans: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``toolkit::attention_backward`` on a GPU (or on CPU tensors in Triton's interpreter).

    (dq, dk, dv, dsinks), in the dtypes of q, k, v and sinks; sums in float32, in an order fixed by the tile
    table. Sequences may share rows of k and v; rows that no query sees get zero. With block tables, ``query_ranges``
    says which queries see a row.
    """
    check(q, k, v)
    if block_tables is not None and (query_ranges is None or query_ranges.shape != (k.shape[0], 3)):
        given = "None" if query_ranges is None else f"shape {list(query_ranges.shape)}"
        raise ToolkitError(
            f"query_ranges must have shape {[k.shape[0], 3]} for gradients through block_tables in Triton, got {given};"
            " give first query, end and position of each row of k."
        )
    grad, q, k, v, out = (rows_contiguous(x) for x in (grad, q, k, v, out))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dsinks = q.new_zeros(0) if sinks is None else torch.zeros_like(sinks)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), torch.zeros_like(k), torch.zeros_like(v), dsinks
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    positions = torch.empty(0 if block_tables is None else q.shape[0], dtype=torch.int32, device=q.device)
    own, functions = inlined(modifier, parameters, q)
    sequences, kv_heads = kv_lengths.shape[0], k.shape[1]
    shared: dict[str, Any] = {
        "grad": grad,
        "q": q,
        "k": k,
        "v": v,
        "lse": lse,
        "delta": delta,
        "positions": positions,
        "query_offsets": query_offsets,
        "kv_lengths": kv_lengths,
        "parameters": own,
        "spans": kv_lengths if spans is None else spans.contiguous(),
        "num_sequences": sequences,
        "scale": scale,
        "window": window,
        "softcap": softcap,
        "stride_gt": grad.stride(0),
        "stride_gh": grad.stride(1),
        "stride_qt": q.stride(0),
        "stride_qh": q.stride(1),
        "stride_kt": k.stride(0),
        "stride_kh": k.stride(1),
        "stride_vt": v.stride(0),
        "stride_vh": v.stride(1),
        "stride_lt": lse.stride(0),
        "WINDOWED": window > 0,
        "CAPPED": softcap > 0,
        "BOTH": functions["both"],
        "MASK": functions["visible"],
        "FIRST": functions["first"],
        "PARAMETERS": 0 if parameters is None else parameters.shape[1],
        "SPANNED": spans is not None,
    }
    table = kv_lengths if block_tables is None else block_tables.contiguous()
    sizes = backward_sizes(q, k, v, tiles.BACKWARD_QUERIES)
    attention_backward_queries[query_grid(q, kv_heads, sequences, sizes)](
        **shared,
        out=out,
        dq=dq,
        kv_offsets=kv_offsets if block_tables is None else kv_lengths,
        block_tables=table,
        num_rows=q.shape[0],
        stride_ot=out.stride(0),
        stride_oh=out.stride(1),
        stride_dt=dq.stride(0),
        stride_table=0 if block_tables is None else table.stride(0),
        PAGE=0 if block_tables is None else block_size,
        **sizes,
    )
    sizes = backward_sizes(q, k, v, tiles.BACKWARD_KEYS)
    del sizes["HEADS"]
    ranges = None if block_tables is None else query_ranges
    attention_backward_keys[(triton.cdiv(k.shape[0], sizes["KEYS"]), kv_heads)](
        **shared,
        dk=dk,
        dv=dv,
        kv_offsets=kv_offsets,
        query_ranges=query_offsets if ranges is None else ranges.contiguous(),
        num_keys=k.shape[0],
        stride_dkt=dk.stride(0),
        stride_dvt=dv.stride(0),
        SHARED=ranges is not None,
        **sizes,
    )
    if sinks is not None:
        heads, tile = q.shape[1], tiles.SINKS
        parts = triton.cdiv(q.shape[0], tile.rows * tile.steps)
        partials = torch.empty(parts, heads, dtype=torch.float32, device=q.device)
        attention_backward_sinks[(parts, triton.cdiv(heads, tile.heads))](
            lse,
            delta,
            sinks.float(),
            partials,
            q.shape[0],
            HEADS=heads,
            STEPS=tile.steps,
            ROWS=tile.rows,
            BLOCK=tile.heads,
            num_warps=4,
            enable_fp_fusion=False,
        )
        dsinks = partials.sum(0).to(sinks.dtype)
    return dq, dk, dv, dsinks
