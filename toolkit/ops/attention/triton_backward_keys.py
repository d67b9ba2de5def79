"""The kernels that own rows of k and v, and so of dk and dv, and the one of the sinks' gradient.

A program takes a tile of rows of one key/value head and sums over the queries that see them in a fixed order; there are
no atomics. The queries of contiguous keys are found by walking the sequences; for keys behind block tables, which
sequences may share, a range of queries is given for each row.
"""

import triton
import triton.language as tl

from toolkit.ops.attention.triton_common import load_rows, row_spans, sliced_products, store_rows, tanh, visible_keys


@triton.jit
def probabilities(products, seen, lse, query, key, own, scale, softcap, CAPPED: tl.constexpr, BOTH: tl.constexpr):
    """exp(score - lse), d score / d product, and what is seen, from a tile of q.k products; the others broadcast."""
    if CAPPED:
        squashed = tanh(products * scale / softcap)
        scores = squashed * softcap
        slope = (1.0 - squashed * squashed) * scale
    else:
        scores = products * scale
        slope = tl.zeros_like(products) + scale
    if BOTH is not None:
        scores, derivative = BOTH(scores, query, key, own)
        slope = slope * derivative
        seen = seen & (scores != float("-inf"))
    exponent = tl.where(seen, scores - lse, float("-inf"))
    return tl.math.exp2(exponent * 1.4426950408889634), slope, seen


@triton.jit
def add_queries(
    dk_acc, dk_rest, dv_acc, k_tile, v_tile, k_row, v_row, key_ok, first, end, key, query, row_ok, position, head,
    spans, grad, q, k, v, lse, delta, parameters, scale, window, softcap,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_lt, SHARED: tl.constexpr, WINDOWED: tl.constexpr,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TAIL: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr, SLICE: tl.constexpr,
    CAPPED: tl.constexpr, BOTH: tl.constexpr, MASK: tl.constexpr, PARAMETERS: tl.constexpr, SPANNED: tl.constexpr,
):  # fmt: skip
    """dk and dv of a tile of keys with what a tile of queries of one head adds to them.

    The keys are those of one sequence of length ``end``. With SHARED each is seen by the queries ``first`` ... ``end``.
    """
    q_row, g_row = query * stride_qt + head * stride_qh, query * stride_gt + head * stride_gh
    q_tile = load_rows(q, q_row, row_ok, 0, HEAD_DIM, BLOCK_D)
    g_tile = load_rows(grad, g_row, row_ok, 0, V_DIM, BLOCK_V)
    row_lse = tl.load(lse + query * stride_lt + head, mask=row_ok, other=0.0)
    row_delta = tl.load(delta + query * stride_lt + head, mask=row_ok, other=0.0)
    own = parameters + head * PARAMETERS
    if SLICE:
        products = sliced_products(k, q, k_row, key_ok, q_row, row_ok, HEAD_DIM, KEYS, ROWS, SLICE)
    else:
        products = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")
    if SHARED:
        seen = (query[None, :] >= first[:, None]) & (query[None, :] < end[:, None])
        length = 0x7FFFFFFF  # who is of a key's range has it
    else:
        seen = (key >= 0)[:, None] & row_ok[None, :]
        length = end
    span_first, span_end = row_spans(spans, query, row_ok, length, SPANNED)
    seen = seen & visible_keys(
        key[:, None], position[None, :], length, own, window, span_first[None, :], span_end[None, :],
        WINDOWED, MASK, SPANNED,
    )  # fmt: skip
    weights, slope, seen = probabilities(
        products, seen, row_lse[None, :], position[None, :], key[:, None], own, scale, softcap, CAPPED, BOTH
    )
    dv_acc = tl.dot(weights.to(g_tile.dtype), g_tile, dv_acc, input_precision="ieee")
    if SLICE:
        grad_weights = sliced_products(v, grad, v_row, key_ok, g_row, row_ok, V_DIM, KEYS, ROWS, SLICE)
    else:
        grad_weights = tl.dot(v_tile, tl.trans(g_tile), input_precision="ieee")
    # Selected, not multiplied: a row of v that this sequence does not hold may be anything.
    grad_products = tl.where(seen, weights * (grad_weights - row_delta[None, :]) * slope, 0.0).to(q_tile.dtype)
    dk_acc = tl.dot(grad_products, q_tile, dk_acc, input_precision="ieee")
    if TAIL:
        rest = load_rows(q, q_row, row_ok, BLOCK_D, HEAD_DIM, TAIL)
        dk_rest = tl.dot(grad_products, rest, dk_rest, input_precision="ieee")
    return dk_acc, dk_rest, dv_acc


@triton.jit
def rows_before_bound(past, count, last_key, own, FIRST: tl.constexpr):
    """How many of ``count`` queries from position ``past`` on have their bound at or below ``last_key``."""
    low = count * 0
    high = tl.maximum(count, 0)
    while low < high:
        middle = (low + high) // 2
        near = FIRST(past + middle, own) <= last_key
        low = tl.where(near, middle + 1, low)
        high = tl.where(near, high, middle)
    return low


@triton.jit
def rows_before_key(spans, past, count, kv_length, key):
    """How many of ``count`` queries from position ``past`` on see no key from ``key`` on; ``spans`` are theirs."""
    low = count * 0
    high = tl.maximum(count, 0)
    while low < high:
        middle = (low + high) // 2
        end = row_spans(spans, middle.to(tl.int64), True, kv_length, True)[1]
        before = tl.maximum(end, past + middle + 1) <= key
        low = tl.where(before, middle + 1, low)
        high = tl.where(before, high, middle)
    return low


@triton.jit
def rows_that_reach(spans, past, count, kv_length, last_key, own, window, WINDOWED: tl.constexpr, FIRST: tl.constexpr):
    """How many of ``count`` queries from position ``past`` on see, or come before those that see, ``last_key``."""
    low = count * 0
    high = tl.maximum(count, 0)
    while low < high:
        middle = (low + high) // 2
        begin = middle * 0
        if WINDOWED:
            begin = tl.maximum(begin, past + middle - window + 1)
        if FIRST is not None:
            begin = tl.maximum(begin, FIRST(past + middle, own))
        near = tl.minimum(begin, row_spans(spans, middle.to(tl.int64), True, kv_length, True)[0]) <= last_key
        low = tl.where(near, middle + 1, low)
        high = tl.where(near, high, middle)
    return low


@triton.jit(do_not_specialize=["num_sequences", "num_keys", "window"])
def attention_backward_keys(
    grad, q, k, v, lse, delta, dk, dv, query_offsets, kv_offsets, kv_lengths, positions, query_ranges, parameters,
    spans, num_sequences, num_keys, scale, window, softcap,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh,
    stride_lt, stride_dkt, stride_dvt,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr, TAIL: tl.constexpr,
    GROUP: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, SLICE: tl.constexpr,
    WINDOWED: tl.constexpr, CAPPED: tl.constexpr, BOTH: tl.constexpr, MASK: tl.constexpr, FIRST: tl.constexpr,
    PARAMETERS: tl.constexpr, SPANNED: tl.constexpr, SHARED: tl.constexpr,
):  # fmt: skip
    """dk, dv of a tile of rows of k and v, summed over the queries that see them, in their order.

    Without SHARED the sequences that hold the rows are found by their offsets. With SHARED each row is seen by one
    range of queries: ``query_ranges`` [num_keys, 3] of int64 holds the range's begin and end, and the row's position in
    its sequences; ``positions`` those of the queries.
    """
    kv_head = tl.program_id(1)
    slot = tl.program_id(0).to(tl.int64) * KEYS + tl.arange(0, KEYS)
    held = slot < num_keys
    k, v = k + kv_head * stride_kh, v + kv_head * stride_vh
    k_row, v_row = slot * stride_kt, slot * stride_vt
    k_tile, v_tile = k_row, v_row  # not used in slices
    if not SLICE:
        k_tile = load_rows(k, k_row, held, 0, HEAD_DIM, BLOCK_D)
        v_tile = load_rows(v, v_row, held, 0, V_DIM, BLOCK_V)
    dk_acc = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dk_rest = tl.zeros([KEYS, TAIL if TAIL else 16], tl.float32)
    dv_acc = tl.zeros([KEYS, BLOCK_V], tl.float32)
    if SHARED:
        first = tl.load(query_ranges + slot * 3, mask=held, other=0).to(tl.int32)
        end = tl.load(query_ranges + slot * 3 + 1, mask=held, other=0).to(tl.int32)
        key = tl.load(query_ranges + slot * 3 + 2, mask=held, other=0).to(tl.int32)
        read = first < end
        begin = tl.min(tl.where(read, first, 0x7FFFFFFF), 0) // ROWS * ROWS
        stop = tl.max(tl.where(read, end, 0), 0)
        last_key = tl.max(tl.where(read, key, 0), 0)
        for member in range(GROUP):
            head = kv_head * GROUP + member
            for row_start in tl.range(begin, stop, ROWS, disable_licm=True):  # hoisted addresses would take registers
                row = row_start + tl.arange(0, ROWS)
                row_ok = row < stop
                position = tl.load(positions + row, mask=row_ok, other=0x7FFFFFFF)
                near = True
                if WINDOWED:  # whole tiles of queries may be past the window, or all below a modifier's bound
                    near = tl.min(position, 0) - window < last_key
                if FIRST is not None:
                    near = near & (FIRST(tl.min(position, 0), parameters + head * PARAMETERS) <= last_key)
                if SPANNED:
                    span_first, _ = row_spans(spans, row.to(tl.int64), row_ok, 0x7FFFFFFF, SPANNED)
                    near = near | (tl.min(span_first, 0) <= last_key)
                if near:
                    dk_acc, dk_rest, dv_acc = add_queries(
                        dk_acc, dk_rest, dv_acc, k_tile, v_tile, k_row, v_row, held, first, end, key,
                        tl.cast(row_start, tl.int64) + tl.arange(0, ROWS), row_ok, position, head,
                        spans, grad, q, k, v, lse, delta, parameters, scale, window, softcap,
                        stride_gt, stride_gh, stride_qt, stride_qh, stride_lt, True, WINDOWED,
                        HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, TAIL, ROWS, KEYS, SLICE,
                        CAPPED, BOTH, MASK, PARAMETERS, SPANNED,
                    )  # fmt: skip
    else:
        for sequence in range(num_sequences):
            base = tl.load(kv_offsets + sequence)
            kv_length = tl.load(kv_lengths + sequence).to(tl.int32)
            start = tl.load(query_offsets + sequence)
            num_queries = (tl.load(query_offsets + sequence + 1) - start).to(tl.int32)
            past = kv_length - num_queries  # position of the sequence's first query in this batch
            first_key = (tl.program_id(0).to(tl.int64) * KEYS - base).to(tl.int32)
            key = first_key + tl.arange(0, KEYS)
            overlaps = (first_key < kv_length) & (first_key + KEYS > 0)
            begin = tl.maximum(first_key - past, 0)
            stop = tl.where(overlaps, num_queries, 0)
            own_spans = spans + start * 2
            if SPANNED:
                begin = rows_before_key(own_spans, past, stop, kv_length, first_key)
            begin = begin // ROWS * ROWS
            if WINDOWED and not SPANNED:
                stop = tl.minimum(stop, first_key + KEYS - 1 + window - past)
            for member in range(GROUP):
                head = kv_head * GROUP + member
                near = stop
                if SPANNED:
                    near = rows_that_reach(
                        own_spans, past, stop, kv_length, first_key + KEYS - 1, parameters + head * PARAMETERS, window,
                        WINDOWED, FIRST,
                    )  # fmt: skip
                elif FIRST is not None:
                    near = rows_before_bound(past, stop, first_key + KEYS - 1, parameters + head * PARAMETERS, FIRST)
                for row_start in tl.range(begin, near, ROWS, disable_licm=True):  # as above
                    row = row_start + tl.arange(0, ROWS)
                    row_ok = row < num_queries
                    dk_acc, dk_rest, dv_acc = add_queries(
                        dk_acc, dk_rest, dv_acc, k_tile, v_tile, k_row, v_row, held, base, kv_length, key,
                        start + row_start + tl.arange(0, ROWS), row_ok, past + row, head,
                        spans, grad, q, k, v, lse, delta, parameters, scale, window, softcap,
                        stride_gt, stride_gh, stride_qt, stride_qh, stride_lt, False, WINDOWED,
                        HEAD_DIM, V_DIM, BLOCK_D, BLOCK_V, TAIL, ROWS, KEYS, SLICE,
                        CAPPED, BOTH, MASK, PARAMETERS, SPANNED,
                    )  # fmt: skip
    dk, dv = dk + kv_head * HEAD_DIM, dv + kv_head * V_DIM
    dk_row, dv_row = slot * stride_dkt, slot * stride_dvt
    store_rows(dk, dk_row, held, 0, dk_acc, HEAD_DIM, BLOCK_D)
    if TAIL:
        store_rows(dk, dk_row, held, BLOCK_D, dk_rest, HEAD_DIM, TAIL)
    store_rows(dv, dv_row, held, 0, dv_acc, V_DIM, BLOCK_V)


@triton.jit(do_not_specialize=["num_rows"])
def attention_backward_sinks(
    lse, delta, sinks, partials, num_rows, HEADS: tl.constexpr,
    STEPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A part's sum of -exp(sink - lse) * delta over STEPS * ROWS rows, in order, for every head."""
    part = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    sink = tl.load(sinks + head, mask=head < HEADS, other=0.0)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(STEPS):
        row = (part * STEPS + step) * ROWS + tl.arange(0, ROWS)
        inside = (row < num_rows)[:, None] & (head < HEADS)[None, :]
        place = row[:, None] * HEADS + head[None, :]
        log_sum = tl.load(lse + place, mask=inside, other=float("-inf"))
        share = tl.load(delta + place, mask=inside, other=0.0)
        masked = log_sum == float("-inf")  # padding, and fully masked rows
        exponent = tl.where(masked, float("-inf"), sink[None, :] - log_sum)
        sums -= tl.where(masked, 0.0, tl.math.exp2(exponent * 1.4426950408889634) * share)
    tl.store(partials + part * HEADS + head, tl.sum(sums, 0), mask=head < HEADS)
