"""Splits of keys in the attention forward: a row's sums over each are kept, joined in order, and finished."""

import triton
import triton.language as tl

from toolkit.ops.attention.triton_common import load_rows, store_rows


@triton.jit
def join(top, total, acc, later_top, later_total, later_acc):
    """A row's sums over a later split added to those over the splits before it."""
    new_top = tl.maximum(top, later_top)
    anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
    before, after = tl.math.exp2(top - anchor), tl.math.exp2(later_top - anchor)
    return new_top, total * before + later_total * after, acc * before[:, None] + later_acc * after[:, None]


@triton.jit
def keep_rows(top, total, acc, sums, marks, place, row_ok, V_DIM: tl.constexpr, BLOCK_V: tl.constexpr):
    """A row's sums put aside at ``place``."""
    store_rows(sums, place * V_DIM, row_ok, 0, acc, V_DIM, BLOCK_V)
    tl.store(marks + place * 2, top, mask=row_ok)
    tl.store(marks + place * 2 + 1, total, mask=row_ok)


@triton.jit
def kept_rows(sums, marks, place, row_ok, column, V_DIM: tl.constexpr, COLUMNS: tl.constexpr):
    """What ``keep_rows`` put aside, COLUMNS from ``column`` on."""
    top = tl.load(marks + place * 2, mask=row_ok, other=float("-inf"))
    total = tl.load(marks + place * 2 + 1, mask=row_ok, other=0.0)
    return top, total, load_rows(sums, place * V_DIM, row_ok, column, V_DIM, COLUMNS)


@triton.jit
def splits_of(begin, stop, SPLIT: tl.constexpr):
    """The first split of keys ``begin`` ... ``stop`` and the end of their splits: one at least."""
    first = begin // SPLIT
    return first, tl.maximum(tl.cdiv(stop, SPLIT), first + 1)


@triton.jit
def finish_rows(
    top, total, acc, out, lse, sinks, query, head, row_ok, real, column, stride_ot, stride_lt,
    V_DIM: tl.constexpr, COLUMNS: tl.constexpr, SUNK: tl.constexpr,
):  # fmt: skip
    """out's columns from ``column`` on, from a row's sums over all its keys; with column 0 the lse, too."""
    if SUNK:  # one more logit, without a value
        sink = tl.load(sinks + head, mask=row_ok, other=float("-inf")) * 1.4426950408889634
        sink = tl.where(real, sink, float("-inf"))  # padding sees nothing
        new_top = tl.maximum(top, sink)
        anchor = tl.where(new_top == float("-inf"), 0.0, new_top)
        rescale = tl.math.exp2(top - anchor)
        total = total * rescale + tl.math.exp2(sink - anchor)
        acc = acc * rescale[:, None]
        top = new_top
    empty = total == 0.0
    result = acc / tl.where(empty, 1.0, total)[:, None]
    store_rows(out, query * stride_ot + head * V_DIM, row_ok, column, result, V_DIM, COLUMNS)
    log_sum = (tl.where(empty, 0.0, top) + tl.math.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    if column == 0:
        tl.store(lse + query * stride_lt + head, tl.where(empty, float("-inf"), log_sum), mask=row_ok)


@triton.jit
def join_kept(
    sums, marks, place, out, lse, sinks, query, head, row_ok, real, last, stride_ot, stride_lt,
    V_DIM: tl.constexpr, COLUMNS: tl.constexpr, SUNK: tl.constexpr,
):  # fmt: skip
    """What was kept at ``place + 1`` added to ``place``, or with the ``last`` split finished, by a single program.

    Some columns at a time: a second set of a row's sums is more than a program can hold.
    """
    for column in range(0, V_DIM, COLUMNS):
        tl.debug_barrier()  # other threads wrote what this one reads; and an unrolled loop must not load all at once
        top, total, acc = kept_rows(sums, marks, place, row_ok, column, V_DIM, COLUMNS)
        later = kept_rows(sums, marks, place + 1, row_ok, column, V_DIM, COLUMNS)
        new_top, new_total, acc = join(top, total, acc, later[0], later[1], later[2])
        if last:
            finish_rows(
                new_top, new_total, acc, out, lse, sinks, query, head, row_ok, real, column,
                stride_ot, stride_lt, V_DIM, COLUMNS, SUNK,
            )  # fmt: skip
        else:
            store_rows(sums, place * V_DIM, row_ok, column, acc, V_DIM, COLUMNS)
    top, total, none = kept_rows(sums, marks, place, row_ok, V_DIM, V_DIM, 16)
    later = kept_rows(sums, marks, place + 1, row_ok, V_DIM, V_DIM, 16)
    top, total, none = join(top, total, none, later[0], later[1], later[2])
    tl.debug_barrier()
    tl.store(marks + place * 2, top, mask=row_ok)
    tl.store(marks + place * 2 + 1, total, mask=row_ok)
