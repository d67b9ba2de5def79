"""Norm, rotation and writing of new keys and values in Triton: one launch, whose programs take rows of queries, of keys
or of values.

A row's partner channels are read a second time (they are in the cache) instead of being exchanged between lanes, and
normed by the row's one factor. The tile is that of ``rms_norm``, so that a row's sum has the same order, and every
value is rounded where the ops one after the other round it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.triton_devices import check_dtype
from toolkit.ops.triton_norm import normalize
from toolkit.ops.triton_rows import MAX_WIDTH, blocks, whole_row


@triton.jit
def load_row_scale(weight, column, inside, offset):
    return tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset


@triton.jit
def turned_rows(
    x, weight, cos, sin, row, rows, stride_t, stride_h, stride_c, stride_s, eps, offset,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, NORMED: tl.constexpr, WEIGHTED: tl.constexpr,
    INTERLEAVED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """[ROWS, BLOCK] float32: rows (token by token, head by head) normed, rounded to x's dtype, and rotated."""
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    token = row // HEADS
    source = x + token * stride_t + (row % HEADS) * stride_h
    values = tl.load(source + column, mask=inside, other=0.0).to(tl.float32)
    if INTERLEAVED:
        partner, angle, first = column ^ 1, column // 2, column % 2 == 0
    else:
        partner, angle, first = tl.where(column < HALF, column + HALF, column - HALF), column, column < HALF
    turns = column < 2 * HALF
    partners = tl.load(source + partner, mask=inside & turns, other=0.0).to(tl.float32)
    if NORMED:
        values, scale = normalize(values, column < WIDTH, eps, WIDTH, False)
        partners = partners * scale
        if WEIGHTED:
            values = values * load_row_scale(weight, column, column < WIDTH, offset)
            partners = partners * load_row_scale(weight, partner, turns, offset)
        values = values.to(x.dtype.element_ty).to(tl.float32)
        partners = partners.to(x.dtype.element_ty).to(tl.float32)
    c = tl.load(cos + token * stride_c + angle, mask=(row < rows) & turns, other=0.0).to(tl.float32)
    s = tl.load(sin + token * stride_s + angle, mask=(row < rows) & turns, other=0.0).to(tl.float32)
    product = partners * s
    return tl.where(turns, values * c + tl.where(first, -product, product), values)


@triton.jit
def write_rows(
    pool,
    rows_of_tile,
    slots,
    row,
    rows,
    most,
    stride_p,
    stride_ph,
    HEADS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """pool[slots[t], h] = row t * HEADS + h; a slot that is not in the pool is left out."""
    column = tl.arange(0, BLOCK)[None, :]
    slot = tl.load(slots + row // HEADS, mask=row < rows, other=-1)
    kept = (slot >= 0) & (slot < most) & (column < WIDTH)
    target = pool + slot * stride_p + (row % HEADS) * stride_ph + column
    tl.store(target, rows_of_tile.to(pool.dtype.element_ty), mask=kept)


@triton.jit(do_not_specialize=["tokens", "key_slots", "value_slots"])
def rotary_write_rows(
    q, k, v, q_weight, k_weight, cos, sin, keys, values, slots, turned, tokens, key_slots, value_slots,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_c, stride_s,
    stride_ks, stride_kp, stride_vs, stride_vp, eps, offset,
    Q_HEADS: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr, VALUE_WIDTH: tl.constexpr, HALF: tl.constexpr,
    NORMED: tl.constexpr, Q_WEIGHTED: tl.constexpr, K_WEIGHTED: tl.constexpr, INTERLEAVED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr, VALUE_ROWS: tl.constexpr, VALUE_BLOCK: tl.constexpr,
):  # fmt: skip
    """The rows of queries by the first programs, then those of keys, then those of values."""
    program = tl.program_id(0)
    of_q, of_k = tl.cdiv(tokens * Q_HEADS, ROWS), tl.cdiv(tokens * HEADS, ROWS)
    # Names differ: a value that two branches assign must have one shape and dtype.
    if program < of_q:
        q_row = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        q_turned = turned_rows(
            q, q_weight, cos, sin, q_row, tokens * Q_HEADS, stride_qt, stride_qh, stride_c, stride_s, eps, offset,
            Q_HEADS, WIDTH, HALF, NORMED, Q_WEIGHTED, INTERLEAVED, BLOCK,
        )  # fmt: skip
        q_column = tl.arange(0, BLOCK)[None, :]
        q_inside = (q_row < tokens * Q_HEADS) & (q_column < WIDTH)
        tl.store(turned + q_row * WIDTH + q_column, q_turned.to(turned.dtype.element_ty), mask=q_inside)
    elif program < of_q + of_k:
        k_row = (program - of_q).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
        k_turned = turned_rows(
            k, k_weight, cos, sin, k_row, tokens * HEADS, stride_kt, stride_kh, stride_c, stride_s, eps, offset,
            HEADS, WIDTH, HALF, NORMED, K_WEIGHTED, INTERLEAVED, BLOCK,
        )  # fmt: skip
        write_rows(keys, k_turned, slots, k_row, tokens * HEADS, key_slots, stride_ks, stride_kp, HEADS, WIDTH, BLOCK)
    else:
        v_row = (program - of_q - of_k).to(tl.int64) * VALUE_ROWS + tl.arange(0, VALUE_ROWS)[:, None]
        v_column = tl.arange(0, VALUE_BLOCK)[None, :]
        v_inside = (v_row < tokens * HEADS) & (v_column < VALUE_WIDTH)
        source = v + (v_row // HEADS) * stride_vt + (v_row % HEADS) * stride_vh
        write_rows(
            values, tl.load(source + v_column, mask=v_inside, other=0.0), slots, v_row, tokens * HEADS,
            value_slots, stride_vs, stride_vp, HEADS, VALUE_WIDTH, VALUE_BLOCK,
        )  # fmt: skip


def rotary_write(
    q: Tensor, k: Tensor, v: Tensor, q_weight: Tensor | None, k_weight: Tensor | None, eps: float | None,
    offset: float, cos: Tensor, sin: Tensor, interleaved: bool, keys: Tensor, values: Tensor, slots: Tensor,
) -> Tensor:  # fmt: skip
    """``toolkit::rotary_write``: float32, bfloat16 or float16; q, k and v are read where they lie.

    A slot that is not in the pool is skipped, as ``state_write`` skips it: an error would have to wait for the device.
    """
    check_dtype("rotary_write", q.dtype)
    tokens, heads, width, value_width = slots.numel(), keys.shape[1], keys.shape[2], values.shape[2]
    if {k.dtype, v.dtype, keys.dtype, values.dtype} != {q.dtype}:
        raise ToolkitError(
            f"q, k, v and the pools of rotary_write must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype},"
            f" {keys.dtype} and {values.dtype}."
        )
    if max(width, value_width) > MAX_WIDTH:
        raise ToolkitError(f"Heads must have <= {MAX_WIDTH} elements in rotary_write, got {max(width, value_width)}.")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.shape[0] != tokens or cos.shape[1] % 2 or cos.shape[1] > width:
        raise ToolkitError(
            f"cos and sin of rotary_write must have shape [{tokens}, R], R even and at most {width},"
            f" got {list(cos.shape)} and {list(sin.shape)}."
        )
    for pool in (keys, values):
        if pool.shape[2] > 1 and pool.stride(2) != 1:
            raise ToolkitError(f"pool must have a contiguous last dimension, got strides {list(pool.stride())}.")
    queries, new_keys = (x.reshape(tokens, -1, width) for x in (q, k))
    new_values = v.reshape(tokens, -1, value_width)
    if new_keys.shape[1] != heads or new_values.shape[1] != heads or values.shape[1] != heads:
        raise ToolkitError(
            f"k and v of rotary_write must have the {heads} heads of the pools,"
            f" got {list(k.shape)} and {list(v.shape)} for {tokens} tokens."
        )
    queries, new_keys, new_values = (
        x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous() for x in (queries, new_keys, new_values)
    )
    turned = torch.empty(queries.shape, dtype=q.dtype, device=q.device)
    c, s = (table if table.dtype != torch.float64 else table.float() for table in (cos.contiguous(), sin.contiguous()))
    tile, value_tile = whole_row(width, q.itemsize), whole_row(value_width, v.itemsize)
    weights = [new_keys if weight is None else weight.contiguous() for weight in (q_weight, k_weight)]
    programs = (
        blocks(tokens * queries.shape[1], tile.rows)
        + blocks(tokens * heads, tile.rows)
        + blocks(tokens * heads, value_tile.rows)
    )
    rotary_write_rows[(programs,)](
        queries, new_keys, new_values, *weights, c, s, keys, values, slots.contiguous(), turned,
        tokens, keys.shape[0], values.shape[0],
        *queries.stride()[:2], *new_keys.stride()[:2], *new_values.stride()[:2], c.stride(0), s.stride(0),
        *keys.stride()[:2], *values.stride()[:2], 0.0 if eps is None else eps, offset,
        Q_HEADS=queries.shape[1], HEADS=heads, WIDTH=width, VALUE_WIDTH=value_width, HALF=cos.shape[1] // 2,
        NORMED=eps is not None, Q_WEIGHTED=q_weight is not None, K_WEIGHTED=k_weight is not None,
        INTERLEAVED=interleaved, VALUE_ROWS=value_tile.rows, VALUE_BLOCK=value_tile.block, **tile.options(),
    )  # fmt: skip
    return turned
