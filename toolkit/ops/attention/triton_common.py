"""What the attention kernels share: which rows and keys a program has, how it reads them, and how it is launched."""

from typing import Any

import torch
import triton
import triton.language as tl

from toolkit.errors import ToolkitError
from toolkit.ops import triton_devices
from toolkit.ops.attention import tiles
from toolkit.ops.attention.modifiers import NAMES, find
from toolkit.ops.tiles import GemmTile, TileTable


@triton.jit
def tanh(x):
    """tanh from exp2; the series near 0 avoids the cancellation of 1 - t."""
    magnitude = tl.abs(x)
    t = tl.math.exp2(magnitude * -2.8853900817779268)
    far = (1.0 - t) / (1.0 + t)
    square = x * x
    series = -0.008863235529902197
    series = series * square + 0.021869488536155203
    series = series * square - 0.05396825396825397
    series = series * square + 0.13333333333333333
    series = series * square - 0.3333333333333333
    near = x + x * square * series
    return tl.where(magnitude < 0.25, near, tl.where(x < 0, -far, far))


@triton.jit
def find_tile(starts, count, tile, SIZE: tl.constexpr):
    """The sequence that owns ``tile``, and the tile's place in it.

    Sequence s begins at tile ``starts[s] // SIZE + s``: at least its number of tiles apart from the next one,
    and known without reading the longest length on the host. ``count`` stands for the rows past the end.
    """
    low = tile * 0
    high = low + count
    while low < high:
        middle = (low + high + 1) // 2
        before = (tl.load(starts + middle) // SIZE + middle).to(tl.int32) <= tile
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle - 1)
    start = tl.load(starts + low)
    return low, start, tile - (start // SIZE + low).to(tl.int32)


@triton.jit
def owned_rows(
    query_offsets, kv_lengths, num_sequences, num_rows, tile,
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The rows of tile number ``tile``, of the key/value head and head tile ``program_id(1)``: HEADS query heads of
    GROUP share it with ROWS // HEADS queries. The sequence, the tile's place in it, and what ``rows_of`` gives.
    """
    sequence, _, local = find_tile(query_offsets, num_sequences, tile, ROWS // HEADS)
    kv_length, first, end, kv_head, query, head, position, row_ok = rows_of(
        query_offsets, kv_lengths, num_sequences, num_rows, sequence, local, GROUP, HEADS, ROWS
    )
    return sequence, local, kv_length, first, end, kv_head, query, head, position, row_ok


@triton.jit
def rows_of(
    query_offsets, kv_lengths, num_sequences, num_rows, sequence, local,
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Of a sequence's tile number ``local``: the sequence's number of keys, the first query, the end of the sequence's
    queries (at or before the first one: there are no rows), the key/value head; and of every row the query, the head,
    the position, and whether it is one.
    """
    QUERIES: tl.constexpr = ROWS // HEADS
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    real = sequence < num_sequences
    end = tl.load(query_offsets + sequence + 1, mask=real, other=num_rows)
    kv_length = tl.load(kv_lengths + sequence, mask=real, other=0).to(tl.int32)
    first = tl.load(query_offsets + sequence) + local * QUERIES
    kv_head = tl.program_id(1) // HEAD_TILES
    row = tl.arange(0, ROWS)
    query = first + row // HEADS
    member = (tl.program_id(1) % HEAD_TILES) * HEADS + row % HEADS
    row_ok = (row < QUERIES * HEADS) & (query < end) & (member < GROUP)
    position = kv_length - (end - query).to(tl.int32)
    return kv_length, first, end, kv_head, query, kv_head * GROUP + member, position, row_ok


@triton.jit
def row_spans(spans, query, row_ok, kv_length, SPANNED: tl.constexpr):
    """Each row's span of keys, cut at its sequence's end; one that is none begins after every key and ends at 0."""
    if SPANNED:
        first = tl.load(spans + query * 2, mask=row_ok, other=0).to(tl.int32)
        end = tl.minimum(tl.load(spans + query * 2 + 1, mask=row_ok, other=0).to(tl.int32), kv_length)
        none = first >= end
        first = tl.where(none, 0x7FFFFFFF, first)
        end = tl.where(none, 0, end)
    else:  # not looked at
        first = query
        end = query
    return first, end


@triton.jit
def smaller(number, bound):
    """The smaller one, where ``bound`` is the result of a reduction.

    Triton knows no alignment of addresses that such a number is part of, and would load element by element; of what
    a loop passes on it knows what it knows of ``number``.
    """
    while bound < number:
        number = bound
    return number


@triton.jit
def seen_range(
    kv_length, first, end, position, row_ok, own, window, span_first, span_end,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, WINDOWED: tl.constexpr, FIRST: tl.constexpr, SPANNED: tl.constexpr,
):  # fmt: skip
    """The keys that rows of a tile may see: from a multiple of KEYS on, and before an end that may be below it."""
    first_position = kv_length - (end - first).to(tl.int32)
    stop = tl.minimum(kv_length, first_position + QUERIES)
    begin = tl.zeros_like(stop)
    if WINDOWED:
        begin = tl.maximum(first_position - window + 1, 0)
    if FIRST is not None:
        begin = tl.maximum(begin, tl.min(tl.where(row_ok[:, None], FIRST(position[:, None], own), 0x7FFFFFFF)))
    if SPANNED:
        if WINDOWED or FIRST is not None:  # otherwise it is 0
            begin = smaller(begin, tl.min(span_first, 0))
        stop = tl.maximum(stop, tl.max(span_end, 0))
    return begin // KEYS * KEYS, stop


@triton.jit
def visible_keys(
    key, position, kv_length, own, window, span_first, span_end,
    WINDOWED: tl.constexpr, MASK: tl.constexpr, SPANNED: tl.constexpr,
):  # fmt: skip
    """Which keys before it, of its window and by a modifier, a row sees, and which of its span.

    Keys are one dimension of the result and rows the other one, as the numbers of either are given.
    """
    seen = (key <= position) & (key < kv_length)
    if WINDOWED:
        seen = seen & (key > position - window)
    if MASK is not None:
        seen = seen & MASK(position, key, own)
    if SPANNED:
        seen = seen | ((key >= span_first) & (key < span_end))
    return seen


@triton.jit
def key_slots(key, key_ok, base, table, PAGE: tl.constexpr):
    """Rows of k and v of a sequence's keys: from ``base`` on, or through its block table."""
    if PAGE:
        return tl.load(table + key // PAGE, mask=key_ok, other=0) * PAGE + key % PAGE
    else:
        return base + key


@triton.jit
def sliced_products(
    a, b, a_row, a_ok, b_row, b_ok, width: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, SLICE: tl.constexpr
):
    """[ROWS, COLUMNS] products of rows of a and b, a slice of their width at a time.

    Wide heads are more than a program can hold; and without a matrix unit for the dtype every thread holds whole rows
    of both operands, which is more than its registers.
    """
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(0, width, SLICE):
        d = start + tl.arange(0, SLICE)
        left = tl.load(a + a_row[:, None] + d[None, :], mask=a_ok[:, None] & (d < width)[None, :], other=0.0)
        right = tl.load(b + b_row[:, None] + d[None, :], mask=b_ok[:, None] & (d < width)[None, :], other=0.0)
        acc = tl.dot(left, tl.trans(right), acc, input_precision="ieee")
    return acc


@triton.jit
def load_rows(x, row, ok, start, width: tl.constexpr, BLOCK: tl.constexpr):
    """Elements start ... start + BLOCK of rows of ``width``."""
    d = start + tl.arange(0, BLOCK)
    return tl.load(x + row[:, None] + d[None, :], mask=ok[:, None] & (d < width)[None, :], other=0.0)


@triton.jit
def store_rows(x, row, ok, start, values, width: tl.constexpr, BLOCK: tl.constexpr):
    d = start + tl.arange(0, BLOCK)
    place = x + row[:, None] + d[None, :]
    tl.store(place, values.to(x.dtype.element_ty), mask=ok[:, None] & (d < width)[None, :])


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x`` with unit stride in its last dimension, copied only where it has another one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """One sentence for shapes and dtypes that the kernels do not take."""
    if not (q.dtype == k.dtype == v.dtype):
        raise ToolkitError(f"attention: the dtypes of q, k, v must be equal, got {q.dtype}, {k.dtype}, {v.dtype}.")
    if q.shape[-1] != k.shape[-1] or k.shape[:2] != v.shape[:2] or q.shape[1] % k.shape[1]:
        raise ToolkitError(
            "attention: q, k, v must have shapes [T, Hq, D], [rows, Hkv, D], [rows, Hkv, Dv] with Hq a multiple of Hkv,"
            f" got {list(q.shape)}, {list(k.shape)}, {list(v.shape)}."
        )


def launch_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: TileTable[GemmTile]) -> dict[str, Any]:
    """The compile-time sizes and launch options that the forward and the backward kernels share."""
    head_dim, v_dim = q.shape[-1], v.shape[-1]
    if v_dim > tiles.MAX_V_DIM:
        raise ToolkitError(
            f"The head size of v must be <= {tiles.MAX_V_DIM} in the Triton kernels of attention, got {v_dim}."
        )
    choice = table.find(triton_devices.architecture(q.device), q.dtype, max(head_dim, v_dim))
    group = q.shape[1] // k.shape[1]
    return {
        "HEAD_DIM": head_dim,
        "V_DIM": v_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(v_dim)),
        "GROUP": group,
        "HEADS": min(group, choice.rows),
        "ROWS": choice.rows,
        "KEYS": choice.columns,
        "SLICE": choice.depth,
        **choice.options(),
    }


def inlined(modifier: str, parameters: torch.Tensor | None, q: torch.Tensor) -> tuple[torch.Tensor, dict[str, Any]]:
    """A modifier's parameters (q stands for none) and its Triton functions by name, None for what it lacks."""
    found = find(modifier)
    functions = dict.fromkeys(NAMES) if found is None else found.device()
    return q if parameters is None else parameters.to(q.device, torch.float32).contiguous(), functions


def query_grid(q: torch.Tensor, kv_heads: int, sequences: int, sizes: dict[str, Any]) -> tuple[int, int]:
    """Programs over (row tiles, key/value heads x head tiles): a bound from shapes, with no host sync."""
    queries = sizes["ROWS"] // sizes["HEADS"]
    return q.shape[0] // queries + sequences + 1, kv_heads * triton.cdiv(sizes["GROUP"], sizes["HEADS"])
