"""Backward of contiguous, variable-length attention in Triton.

Two kernels, no atomics: one owns a tile of queries and sums dq over its keys in order, the other owns a tile
of rows of k and v of one head and sums dk, dv over sequences, the head group and query tiles in order. The
probabilities are recomputed from the saved log-sum-exp; nothing of size queries x keys is kept.
"""

import torch
import triton
import triton.language as tl

from toolkit.ops import triton_devices
from toolkit.ops.attention import tiles
from toolkit.ops.attention.triton import (
    check,
    find_tile,
    launch_sizes,
    query_grid,
    rows_contiguous,
    tanh,
    visible_keys,
)


@triton.jit
def probabilities(products, seen, lse, scale, softcap, CAPPED: tl.constexpr):
    """exp(score - lse) and d score / d product from a tile of q.k products; ``lse`` broadcasts."""
    if CAPPED:
        squashed = tanh(products * scale / softcap)
        scores = squashed * softcap
        slope = (1.0 - squashed * squashed) * scale
    else:
        scores = products * scale
        slope = tl.zeros_like(products) + scale
    exponent = tl.where(seen, scores - lse, float("-inf"))
    return tl.math.exp2(exponent * 1.4426950408889634), slope


@triton.jit
def sliced_products(
    a, b, a_row, a_ok, b_row, b_ok, width,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLUMNS] products of rows of a and b, a slice of their width at a time.

    Without a matrix unit for the dtype every thread holds whole rows of both operands, which for wide heads is more
    than its registers.
    """
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, BLOCK, SLICE):
        d = start + tl.arange(0, SLICE)
        left = tl.load(a + a_row[:, None] + d[None, :], mask=a_ok[:, None] & (d < width)[None, :], other=0.0)
        right = tl.load(b + b_row[:, None] + d[None, :], mask=b_ok[:, None] & (d < width)[None, :], other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "window"])
def attention_backward_queries(
    grad, q, k, v, out, lse, delta, dq, query_offsets, kv_offsets, kv_lengths,
    num_sequences, num_rows, scale, window, softcap,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_ot, stride_oh, stride_lt, stride_dt,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SLICE: tl.constexpr,
):  # fmt: skip
    """dq of a tile of rows, and delta = sum(out * grad) of each row for the other kernel.

    SLICE, where not 0, is how much of the head dimension a product takes at a time.
    """
    QUERIES: tl.constexpr = ROWS // HEADS
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    sequence, start, local = find_tile(query_offsets, num_sequences, tl.program_id(0), QUERIES)
    real = sequence < num_sequences
    end = tl.load(query_offsets + sequence + 1, mask=real, other=num_rows)
    kv_length = tl.load(kv_lengths + sequence, mask=real, other=0).to(tl.int32)
    base = tl.load(kv_offsets + sequence, mask=real, other=0)
    first = start + local * QUERIES
    if first >= end:
        return
    kv_head = tl.program_id(1) // HEAD_TILES
    row = tl.arange(0, ROWS)
    query = first + row // HEADS
    member = (tl.program_id(1) % HEAD_TILES) * HEADS + row % HEADS
    head = kv_head * GROUP + member
    row_ok = (row < QUERIES * HEADS) & (query < end) & (member < GROUP)
    position = kv_length - (end - query).to(tl.int32)
    first_position = kv_length - (end - first).to(tl.int32)
    stop = tl.minimum(kv_length, first_position + QUERIES)
    begin = tl.zeros_like(stop)
    if WINDOWED:
        begin = tl.maximum(first_position - window + 1, 0) // KEYS * KEYS

    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    d_ok = row_ok[:, None] & (d < HEAD_DIM)[None, :]
    e_ok = row_ok[:, None] & (e < V_DIM)[None, :]
    q_tile = tl.load(q + query[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :], mask=d_ok, other=0.0)
    g_tile = tl.load(grad + query[:, None] * stride_gt + head[:, None] * stride_gh + e[None, :], mask=e_ok, other=0.0)
    o_tile = tl.load(out + query[:, None] * stride_ot + head[:, None] * stride_oh + e[None, :], mask=e_ok, other=0.0)
    row_lse = tl.load(lse + query * stride_lt + head, mask=row_ok, other=0.0)
    row_delta = tl.sum(o_tile.to(tl.float32) * g_tile.to(tl.float32), 1)
    tl.store(delta + query * stride_lt + head, row_delta, mask=row_ok)
    acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
    for key_start in range(begin, stop, KEYS):
        key = key_start + tl.arange(0, KEYS)
        key_ok = key < kv_length
        slot = base + key
        k_tile = tl.load(
            k + slot[:, None] * stride_kt + kv_head * stride_kh + d[None, :],
            mask=key_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
        if SLICE:
            q_row, k_row = query * stride_qt + head * stride_qh, slot * stride_kt + kv_head * stride_kh
            products = sliced_products(q, k, q_row, row_ok, k_row, key_ok, HEAD_DIM, ROWS, KEYS, BLOCK_D, SLICE)
        else:
            products = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
        seen = visible_keys(key, position, kv_length, window, WINDOWED)
        weights, slope = probabilities(products, seen, row_lse[:, None], scale, softcap, CAPPED)
        if SLICE:
            g_row, v_row = query * stride_gt + head * stride_gh, slot * stride_vt + kv_head * stride_vh
            grad_weights = sliced_products(grad, v, g_row, row_ok, v_row, key_ok, V_DIM, ROWS, KEYS, BLOCK_V, SLICE)
        else:
            v_tile = tl.load(
                v + slot[:, None] * stride_vt + kv_head * stride_vh + e[None, :],
                mask=key_ok[:, None] & (e < V_DIM)[None, :], other=0.0,
            )  # fmt: skip
            grad_weights = tl.dot(g_tile, tl.trans(v_tile), input_precision="ieee")
        grad_products = weights * (grad_weights - row_delta[:, None]) * slope
        acc = tl.dot(grad_products.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    tl.store(
        dq + query[:, None] * stride_dt + head[:, None] * HEAD_DIM + d[None, :],
        acc.to(dq.dtype.element_ty),
        mask=d_ok,
    )


@triton.jit(do_not_specialize=["num_sequences", "num_keys", "window"])
def attention_backward_keys(
    grad, q, k, v, lse, delta, dk, dv, query_offsets, kv_offsets, kv_lengths,
    num_sequences, num_keys, scale, window, softcap,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_lt, stride_dkt, stride_dvt,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr,
):  # fmt: skip
    """dk, dv of a tile of rows of k and v, summed over the sequences that hold them, in their order."""
    kv_head = tl.program_id(1)
    slot = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    d_ok = (slot < num_keys)[:, None] & (d < HEAD_DIM)[None, :]
    e_ok = (slot < num_keys)[:, None] & (e < V_DIM)[None, :]
    k_tile = tl.load(k + slot[:, None] * stride_kt + kv_head * stride_kh + d[None, :], mask=d_ok, other=0.0)
    v_tile = tl.load(v + slot[:, None] * stride_vt + kv_head * stride_vh + e[None, :], mask=e_ok, other=0.0)
    dk_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_acc = tl.zeros([KEYS, BLOCK_V], tl.float32)
    for sequence in range(num_sequences):
        base = tl.load(kv_offsets + sequence)
        kv_length = tl.load(kv_lengths + sequence).to(tl.int32)
        start = tl.load(query_offsets + sequence)
        num_queries = (tl.load(query_offsets + sequence + 1) - start).to(tl.int32)
        past = kv_length - num_queries  # position of the sequence's first query in this batch
        first_key = (tl.program_id(0).to(tl.int64) * KEYS - base).to(tl.int32)
        key = first_key + tl.arange(0, KEYS)
        overlaps = (first_key < kv_length) & (first_key + KEYS > 0)
        begin = tl.maximum(first_key - past, 0) // ROWS * ROWS
        stop = tl.where(overlaps, num_queries, 0)
        if WINDOWED:
            stop = tl.minimum(stop, first_key + KEYS - 1 + window - past)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            for row_start in range(begin, stop, ROWS):
                row = row_start + tl.arange(0, ROWS)
                row_ok = row < num_queries
                query = start + row
                q_tile = tl.load(
                    q + query[:, None] * stride_qt + head * stride_qh + d[None, :],
                    mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
                )  # fmt: skip
                g_tile = tl.load(
                    grad + query[:, None] * stride_gt + head * stride_gh + e[None, :],
                    mask=row_ok[:, None] & (e < V_DIM)[None, :], other=0.0,
                )  # fmt: skip
                row_lse = tl.load(lse + query * stride_lt + head, mask=row_ok, other=0.0)
                row_delta = tl.load(delta + query * stride_lt + head, mask=row_ok, other=0.0)
                products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
                seen = (key >= 0)[:, None] & row_ok[None, :]
                seen = seen & tl.trans(visible_keys(key, past + row, kv_length, window, WINDOWED))
                weights, slope = probabilities(products, seen, row_lse[None, :], scale, softcap, CAPPED)
                dv_acc = tl.dot(weights.to(g_tile.dtype), g_tile, dv_acc, input_precision="ieee")
                grad_weights = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
                # Selected, not multiplied: a row of v that this sequence does not hold may be anything.
                grad_products = tl.where(seen, weights * (grad_weights - row_delta[None, :]) * slope, 0.0)
                dk_acc = tl.dot(grad_products.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    tl.store(
        dk + slot[:, None] * stride_dkt + kv_head * HEAD_DIM + d[None, :],
        dk_acc.to(dk.dtype.element_ty),
        mask=d_ok,
    )
    tl.store(
        dv + slot[:, None] * stride_dvt + kv_head * V_DIM + e[None, :],
        dv_acc.to(dv.dtype.element_ty),
        mask=e_ok,
    )


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
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``toolkit::attention_backward`` on a GPU (or on CPU tensors in Triton's interpreter).

    (dq, dk, dv) for contiguous keys, in the dtypes of q, k, v; sums in float32, in an order fixed by the tile
    table. Sequences may share rows of k and v; rows that no query sees get zero.
    """
    check(q, k, v)
    grad, q, k, v, out = (rows_contiguous(x) for x in (grad, q, k, v, out))
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), torch.zeros_like(k), torch.zeros_like(v)
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    lse = lse.contiguous()
    delta = torch.empty_like(lse)
    sizes = launch_sizes(q, k, v, tiles.BACKWARD_QUERIES)
    arch = triton_devices.architecture(q.device)
    choice = tiles.tile(tiles.BACKWARD_QUERIES, arch, q.dtype, max(q.shape[-1], v.shape[-1]))
    flags = {"WINDOWED": window > 0, "CAPPED": softcap > 0}
    sequences, kv_heads = kv_lengths.shape[0], k.shape[1]
    strides = [stride for x in (grad, q, k, v) for stride in x.stride()[:2]]
    attention_backward_queries[query_grid(q, kv_heads, sequences, sizes)](
        grad, q, k, v, out, lse, delta, dq, query_offsets, kv_offsets, kv_lengths,
        sequences, q.shape[0], scale, window, softcap,
        *strides,
        out.stride(0), out.stride(1), lse.stride(0), dq.stride(0), SLICE=choice.slice, **flags, **sizes,
    )  # fmt: skip
    sizes = launch_sizes(q, k, v, tiles.BACKWARD_KEYS)
    del sizes["HEADS"]
    attention_backward_keys[(triton.cdiv(k.shape[0], sizes["KEYS"]), kv_heads)](
        grad, q, k, v, lse, delta, dk, dv, query_offsets, kv_offsets, kv_lengths,
        sequences, k.shape[0], scale, window, softcap,
        *strides,
        lse.stride(0), dk.stride(0), dv.stride(0), **flags, **sizes,
    )  # fmt: skip
    return dq, dk, dv
