"""Paged, variable-length attention forward in Triton: one kernel for prefill, chunks and decode.

A program owns a tile of rows (queries of one sequence x the query heads of one key/value head) and walks that
sequence's keys from key 0 in tiles of a fixed size, with an online softmax in that order. A key tile that a
row cannot see leaves the row as it was (its probabilities are 0 and its rescale is 1), so a row's bits depend
on its own query, its keys and the tile table: not on chunking, page layout, neighbours or batch size. There
are no atomics and keys are never split by a count. Floating-point contraction is pinned off, so that a
compiler default cannot move bits between versions or between the paged and the contiguous variant.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from toolkit.errors import ToolkitError
from toolkit.ops import triton_devices
from toolkit.ops.attention import tiles
from toolkit.ops.attention.modifiers import find


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
def visible_keys(key, position, kv_length, window, WINDOWED: tl.constexpr):
    """[rows, keys] causal (and windowed) visibility of key indices to query positions."""
    seen = (key[None, :] <= position[:, None]) & (key[None, :] < kv_length)
    if WINDOWED:
        seen = seen & (key[None, :] > position[:, None] - window)
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


@triton.jit(do_not_specialize=["num_sequences", "num_rows", "window"])
def attention_forward(
    q, k, v, out, lse, query_offsets, kv_offsets, kv_lengths, block_tables, sinks, parameters,
    num_sequences, num_rows, scale, window, softcap,
    stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_ot, stride_lt, stride_table,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
    PAGE: tl.constexpr, WINDOWED: tl.constexpr, CAPPED: tl.constexpr, SLICE: tl.constexpr,
    SUNK: tl.constexpr, SCORE: tl.constexpr, MASK: tl.constexpr, PARAMETERS: tl.constexpr,
):  # fmt: skip
    """HEADS query heads of GROUP share a program with ROWS // HEADS queries; PAGE 0 means contiguous keys.

    SLICE, where not 0, is how much of the head dimension a product takes at a time.
    """
    QUERIES: tl.constexpr = ROWS // HEADS
    HEAD_TILES: tl.constexpr = (GROUP + HEADS - 1) // HEADS
    sequence, start, local = find_tile(query_offsets, num_sequences, tl.program_id(0), QUERIES)
    real = sequence < num_sequences
    end = tl.load(query_offsets + sequence + 1, mask=real, other=num_rows)
    kv_length = tl.load(kv_lengths + sequence, mask=real, other=0).to(tl.int32)
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
    if not SLICE:
        q_tile = tl.load(
            q + query[:, None] * stride_qt + head[:, None] * stride_qh + d[None, :],
            mask=row_ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
        )  # fmt: skip
    own = parameters + (tl.where(row_ok, head, 0) * PARAMETERS)[:, None]
    top = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, BLOCK_V], tl.float32)
    base = tl.load(kv_offsets + sequence, mask=real, other=0)
    table = block_tables + sequence.to(tl.int64) * stride_table
    for key_start in range(begin, stop, KEYS):
        key = key_start + tl.arange(0, KEYS)
        key_ok = key < kv_length
        slot = key_slots(key, key_ok, base, table, PAGE)
        if SLICE:
            q_row, k_row = query * stride_qt + head * stride_qh, slot * stride_kt + kv_head * stride_kh
            scores = sliced_products(q, k, q_row, row_ok, k_row, key_ok, HEAD_DIM, ROWS, KEYS, SLICE)
        else:
            k_tile = tl.load(
                k + slot[None, :] * stride_kt + kv_head * stride_kh + d[:, None],
                mask=key_ok[None, :] & (d < HEAD_DIM)[:, None], other=0.0,
            )  # fmt: skip
            scores = tl.dot(q_tile, k_tile, input_precision="ieee")
        seen = visible_keys(key, position, kv_length, window, WINDOWED)
        if MASK is not None:
            seen = seen & MASK(position[:, None], key[None, :], own)
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
    tl.store(
        out + query[:, None] * stride_ot + head[:, None] * V_DIM + e[None, :],
        result.to(out.dtype.element_ty), mask=row_ok[:, None] & (e < V_DIM)[None, :],
    )  # fmt: skip
    log_sum = (tl.where(empty, 0.0, top) + tl.math.log2(tl.where(empty, 1.0, total))) * 0.6931471805599453
    tl.store(lse + query * stride_lt + head, tl.where(empty, float("-inf"), log_sum), mask=row_ok)


def rows_contiguous(x: torch.Tensor) -> torch.Tensor:
    """``x`` with unit stride in its last dimension, copied only where it has another one."""
    return x if x.stride(-1) == 1 or x.shape[-1] == 1 else x.contiguous()


def check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """One sentence for shapes and dtypes that the kernels do not take."""
    if not (q.dtype == k.dtype == v.dtype):
        raise ToolkitError(f"attention got q, k, v of dtypes {q.dtype}, {k.dtype}, {v.dtype}; they must be equal.")
    if q.shape[-1] != k.shape[-1] or k.shape[:2] != v.shape[:2] or q.shape[1] % k.shape[1]:
        raise ToolkitError(
            f"attention got q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}; allowed are "
            f"q [T, Hq, D], k [rows, Hkv, D], v [rows, Hkv, Dv] with Hq a multiple of Hkv."
        )


def launch_sizes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, table: tiles.Table) -> dict[str, Any]:
    """The compile-time sizes and launch options that the forward and the backward kernels share."""
    head_dim, v_dim = q.shape[-1], v.shape[-1]
    if v_dim > tiles.MAX_V_DIM:
        raise ToolkitError(f"attention got values of width {v_dim}; its Triton kernels take up to {tiles.MAX_V_DIM}.")
    choice = tiles.tile(table, triton_devices.architecture(q.device), q.dtype, max(head_dim, v_dim))
    group = q.shape[1] // k.shape[1]
    return {
        "HEAD_DIM": head_dim,
        "V_DIM": v_dim,
        "BLOCK_D": max(16, triton.next_power_of_2(head_dim)),
        "BLOCK_V": max(16, triton.next_power_of_2(v_dim)),
        "GROUP": group,
        "HEADS": min(group, choice.rows),
        "ROWS": choice.rows,
        "KEYS": choice.keys,
        "SLICE": choice.slice,
        "num_warps": choice.warps,
        "num_stages": choice.stages,
        "enable_fp_fusion": False,
    }


def inlined(modifier: str, parameters: torch.Tensor | None, q: torch.Tensor) -> tuple[torch.Tensor, Any, Any, Any]:
    """A modifier's parameters (q stands for none) and its score, score with slope, and mask as Triton functions."""
    found = find(modifier)
    score, both, visible = (None, None, None) if found is None else found.device()
    return q if parameters is None else parameters.to(q.device, torch.float32).contiguous(), score, both, visible


def query_grid(q: torch.Tensor, kv_heads: int, sequences: int, sizes: dict[str, Any]) -> tuple[int, int]:
    """Programs over (row tiles, key/value heads x head tiles): a bound from shapes, with no host sync."""
    queries = sizes["ROWS"] // sizes["HEADS"]
    return q.shape[0] // queries + sequences + 1, kv_heads * triton.cdiv(sizes["GROUP"], sizes["HEADS"])


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    query_offsets: torch.Tensor,
    kv_offsets: torch.Tensor,
    kv_lengths: torch.Tensor,
    block_tables: torch.Tensor | None,
    page_size: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: torch.Tensor | None = None,
    modifier: str = "",
    parameters: torch.Tensor | None = None,
    readers: torch.Tensor | None = None,
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
    own, score, _, visible = inlined(modifier, parameters, q)
    attention_forward[query_grid(q, k.shape[1], sequences, sizes)](
        q, k, v, out, lse, query_offsets, kv_lengths if block_tables is not None else kv_offsets, kv_lengths, table,
        lse if sinks is None else sinks.float(), own,
        sequences, q.shape[0], scale, window, softcap,
        q.stride(0), q.stride(1), k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        out.stride(0), lse.stride(0), 0 if block_tables is None else table.stride(0),
        PAGE=0 if block_tables is None else page_size, WINDOWED=window > 0, CAPPED=softcap > 0,
        SUNK=sinks is not None, SCORE=score, MASK=visible,
        PARAMETERS=0 if parameters is None else parameters.shape[1], **sizes,
    )  # fmt: skip
    return out, lse
