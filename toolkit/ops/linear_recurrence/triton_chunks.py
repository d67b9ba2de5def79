"""The gated linear recurrence in Triton, a chunk of tokens at a time: the form whose work is matmuls.

Let a chunk have C tokens, S the state [K, V] before it, ``b_i`` the sum of the log decays of its tokens 1 to i, and
``D_ij = exp(g_(j+1) + ... + g_i)`` for j <= i, 0 for j > i. Writing the state before token i as a sum over what was
added since the chunk began turns ``u_i = beta_i (v_i - S_(i-1)^T exp(g_i) k_i)`` into a triangular system::

    (I + L) U = diag(beta) (V - diag(exp(b)) K S),    L_ij = beta_i D_ij k_i . k_j  for j < i, else 0

With ``T = (I + L)^-1`` (the UT transform), ``U = T diag(beta) V - W S`` where ``W = T diag(beta exp(b)) K``: a chunk is
a product of generalised Householder matrices in its WY form. Without the delta rule L = 0 and U = diag(beta) V. Then::

    out = scale diag(exp(b)) Q S + P U,               P_ij = scale D_ij q_i . k_j  for j <= i
    S  <- exp(b_C) S + K^T diag(exp(b_C - b)) U

A decay between two tokens is the exponential of a sum of the gates between them, never a quotient of two products nor a
difference of two sums from the chunk's beginning: it neither overflows nor cancels, and gates of -inf need no care.

T comes from blocks that double: where T holds the inverses of the diagonal blocks of size n, ``T - T M T``, M the part
of L that joins pairs of them, holds those of size 2n. Every block is an inverse, so nothing larger than the entries of
T turns up, as powers of L in a Neumann series would.

``chunk_parts`` makes W, T diag(beta) V, P and the decays of all chunks at once; ``chunk_walk`` and ``chunk_walk_paged``
take the state of a block of columns over them. Segments, trees and paged states are those of ``triton.py``.

Source: Yang et al., "Parallelizing Linear Transformers with the Delta Rule over Sequence Length" (arXiv 2406.06484);
Yang, Kautz and Hatamizadeh, "Gated Delta Networks" (arXiv 2412.06464); Dao and Gu, "Transformers are SSMs" (arXiv
2405.21060), for the form without the delta rule and the sums of gates.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.linear_recurrence.tiles import ChunkTile, chunk_tile
from toolkit.ops.linear_recurrence.triton import check_strides, groups, if_held, start_of, unit
from toolkit.ops.tiles import float32_precision
from toolkit.ops.triton_rows import blocks


@triton.jit
def rows_of(x, t, there, stride, column, width):
    """Rows t [CHUNK] of x at ``column`` [N], 0 where there is none: [CHUNK, N]."""
    inside = there[:, None] & (column < width)[None, :]
    return tl.load(x + t[:, None] * stride + column[None, :], mask=inside, other=0.0)


@triton.jit
def decays(log, i):
    """exp of the sum of ``log`` over (j, i] at [i, j]; 0 above the diagonal."""
    spans = tl.cumsum(tl.where(i[:, None] > i[None, :], log[:, None], 0.0), 0)
    return tl.where(i[:, None] >= i[None, :], tl.exp(spans), 0.0)


@triton.jit
def unit_inverse(below, i, DOUBLINGS: tl.constexpr, PRECISION: tl.constexpr):
    """(I + below)^-1 of a strictly lower triangular [CHUNK, CHUNK] of 2^DOUBLINGS rows."""
    row, column = i[:, None], i[None, :]
    pairs = (row // 2 == column // 2) & (row > column)
    inverse = tl.where(row == column, 1.0, 0.0) - tl.where(pairs, below, 0.0)
    for step in tl.static_range(1, DOUBLINGS):
        row_block, column_block = row >> step, column >> step
        joins = (row_block >> 1 == column_block >> 1) & (row_block > column_block)
        part = tl.dot(inverse, tl.where(joins, below, 0.0), input_precision=PRECISION)
        inverse -= tl.dot(part, inverse, input_precision=PRECISION)
    return inverse


@triton.jit
def chunk_parts(
    q, k, v, g, beta, starts, stops, w, tv, p, inverses, before, after, heads, group, depth, width, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    CHUNK: tl.constexpr, DOUBLINGS: tl.constexpr, WEIGHTED: tl.constexpr, DELTA: tl.constexpr, KEEP: tl.constexpr,
    PRECISION: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """What does not need the state, of chunk ``program_id(0)`` and head ``program_id(1)``.

    w [T, H, K]: W. tv [T, H, V]: T diag(beta) V. p [T, H, CHUNK]: P. before, after [T, H]: the log decays from the
    chunk's beginning to a token's end, and from there to the chunk's end. With KEEP inverses [T, H, CHUNK]: T.
    """
    first, stop = tl.load(starts + tl.program_id(0)), tl.load(stops + tl.program_id(0))
    if first < stop:
        head = tl.program_id(1).to(tl.int64)
        i, row = tl.arange(0, CHUNK), tl.arange(0, DEPTH)
        t = first + i
        there = t < stop
        place = t * heads + head
        key_head = head // group
        key = rows_of(k + key_head * stride_kh, t, there, stride_k, row, depth)
        query = rows_of(q + key_head * stride_qh, t, there, stride_q, row, depth)
        log = tl.load(g + place, mask=there, other=0.0).to(tl.float32)
        decay = decays(log, i)
        since = tl.sum(tl.where(i[:, None] >= i[None, :], log[None, :], 0.0), 1)
        until = tl.sum(tl.where(i[:, None] > i[None, :], log[:, None], 0.0), 0)
        tl.store(before + place, since, mask=there)
        tl.store(after + place, until, mask=there)
        products = tl.dot(query, tl.trans(key), input_precision="ieee") * decay * scale
        chunk_rows = place[:, None] * CHUNK + i[None, :]
        tl.store(p + chunk_rows, products.to(p.dtype.element_ty), mask=there[:, None])
        if DELTA:
            weight = tl.full([CHUNK], 1.0, tl.float32)
            if WEIGHTED:
                weight = tl.load(beta + place, mask=there, other=0.0).to(tl.float32)
            below = tl.dot(key, tl.trans(key), input_precision="ieee") * decay * weight[:, None]
            below = tl.where(i[:, None] > i[None, :], below, 0.0)
            inverse = unit_inverse(below, i, DOUBLINGS, PRECISION)
            if KEEP:
                tl.store(inverses + chunk_rows, inverse.to(inverses.dtype.element_ty), mask=there[:, None])
            factors = inverse * weight[None, :]
            faded = (factors * tl.exp(since)[None, :]).to(key.dtype)
            keys = tl.dot(faded, key, input_precision="ieee")
            inside = there[:, None] & (row < depth)[None, :]
            tl.store(w + place[:, None] * depth + row[None, :], keys.to(w.dtype.element_ty), mask=inside)
            factors = factors.to(key.dtype)
            for begin in range(0, width, COLUMNS):
                column = begin + tl.arange(0, COLUMNS)
                value = rows_of(v + head * stride_vh, t, there, stride_v, column, width)
                values = tl.dot(factors, value, input_precision="ieee")
                covered = there[:, None] & (column < width)[None, :]
                tl.store(tv + place[:, None] * width + column[None, :], values.to(tv.dtype.element_ty), mask=covered)


@triton.jit
def over_chunk(
    state, q, k, v, beta, w, tv, p, before, after, out, first, stop, head, key_head, column, heads, row, depth, width,
    scale, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    CHUNK: tl.constexpr, WEIGHTED: tl.constexpr, DELTA: tl.constexpr, KEEP: tl.constexpr,
):  # fmt: skip
    """The state after a chunk; stores the chunk's out, or with KEEP its U in the place of out."""
    i = tl.arange(0, CHUNK)
    t = first + i
    there = t < stop
    place = t * heads + head
    inside = there[:, None] & (column < width)[None, :]
    key = rows_of(k + key_head * stride_kh, t, there, stride_k, row, depth)
    held = state.to(key.dtype)
    if DELTA:
        u = rows_of(tv + head * width, t, there, heads * width, column, width).to(tl.float32)
        faded = rows_of(w + head * depth, t, there, heads * depth, row, depth)
        u -= tl.dot(faded, held, input_precision="ieee")
    else:
        u = rows_of(v + head * stride_vh, t, there, stride_v, column, width).to(tl.float32)
        if WEIGHTED:
            u *= tl.load(beta + place, mask=there, other=0.0).to(tl.float32)[:, None]
    at = place[:, None] * width + column[None, :]
    if KEEP:
        tl.store(out + at, u.to(out.dtype.element_ty), mask=inside)
    else:
        query = rows_of(q + key_head * stride_qh, t, there, stride_q, row, depth)
        since = tl.load(before + place, mask=there, other=0.0)
        result = tl.dot(query, held, input_precision="ieee") * (tl.exp(since) * scale)[:, None]
        products = tl.load(p + place[:, None] * CHUNK + i[None, :], mask=there[:, None], other=0.0)
        result = tl.dot(products, u.to(key.dtype), result, input_precision="ieee")
        tl.store(out + at, result.to(out.dtype.element_ty), mask=inside)
    until = tl.load(after + place, mask=there, other=0.0)
    added = (u * tl.exp(until)[:, None]).to(key.dtype)
    whole = tl.load(before + (stop - 1) * heads + head)
    return tl.dot(tl.trans(key), added, state * tl.exp(whole), input_precision="ieee")


@triton.jit(do_not_specialize=["given"])
def chunk_walk(
    q, k, v, beta, w, tv, p, before, after, starts, stops, borders, parents, order, trees, initial, out, finals, states,
    given, heads, group, depth, width, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    CHUNK: tl.constexpr, WEIGHTED: tl.constexpr, DELTA: tl.constexpr, KEEP: tl.constexpr,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The segments order[trees[s]:trees[s + 1]] of ``program_id(0)``; segment s has chunks borders[s] to [s + 1].

    With KEEP, for the backward, ``states`` [chunks, H, K, V] takes the state before each chunk, ``out`` takes U, and
    finals are read only.
    """
    tree, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, DEPTH), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < depth)[:, None] & (column < width)[None, :]
    within = row[:, None] * width + column[None, :]
    size = (head * 0 + heads) * depth * width
    shift = head * depth * width
    for i in range(tl.load(trees + tree), tl.load(trees + tree + 1)):
        s = tl.load(order + i)
        state = start_of(
            tl.load(parents + s), s, finals + shift, initial + shift, given, size, within, row, column, depth, width
        )  # fmt: skip
        for chunk in range(tl.load(borders + s), tl.load(borders + s + 1)):
            if KEEP:
                tl.store(states + shift + chunk * size + within, state.to(states.dtype.element_ty), mask=inside)
            state = over_chunk(
                state, q, k, v, beta, w, tv, p, before, after, out, tl.load(starts + chunk), tl.load(stops + chunk),
                head, head // group, column, heads, row, depth, width, scale,
                stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, CHUNK, WEIGHTED, DELTA, KEEP,
            )  # fmt: skip
        if not KEEP:
            tl.store(finals + shift + s * size + within, state, mask=inside)
            tl.debug_barrier()  # other threads of the program may read it back as a parent's


@triton.jit(do_not_specialize=["frames"])
def chunk_walk_paged(
    q, k, v, beta, w, tv, p, before, after, starts, stops, borders, load_blocks, store_rows, store_blocks,
    store_starts, states, out, frames, heads, group, depth, width, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_f, stride_fh, stride_fk,
    CHUNK: tl.constexpr, WEIGHTED: tl.constexpr, DELTA: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Segment ``program_id(0)``, whose saves are store_starts[s] to [s + 1]: chunks end at them."""
    s, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, DEPTH), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    within = row[:, None] * stride_fk + column[None, :]  # one takes less than 2^31 elements
    states += head * stride_fh
    source = tl.load(load_blocks + s)
    held = if_held(source, frames, row, column, depth, width)
    state = tl.load(states + tl.maximum(source, 0) * stride_f + within, mask=held, other=0.0)
    tl.debug_barrier()  # all of it is read before any of it may be written
    save, last = tl.load(store_starts + s), tl.load(store_starts + s + 1)
    for chunk in range(tl.load(borders + s), tl.load(borders + s + 1)):
        stop = tl.load(stops + chunk)
        state = over_chunk(
            state, q, k, v, beta, w, tv, p, before, after, out, tl.load(starts + chunk), stop,
            head, head // group, column, heads, row, depth, width, scale,
            stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, CHUNK, WEIGHTED, DELTA, False,
        )  # fmt: skip
        while (save < last) & (tl.load(store_rows + save, mask=save < last, other=-1) == stop - 1):
            frame = tl.load(store_blocks + save)
            kept = if_held(frame, frames, row, column, depth, width)
            tl.store(states + tl.maximum(frame, 0) * stride_f + within, state, mask=kept)
            save += 1


class Chunks(NamedTuple):
    """The chunks of a call, in order, with room for the most there may be: made on the device without a host sync.

    Args:
        starts, stops: [N] int64, first row of each chunk and the one after its last; T for both where there is none.
        borders: [S + 1] int64; segment s has the chunks ``borders[s]`` to ``[s + 1]``.
    """

    starts: Tensor
    stops: Tensor
    borders: Tensor

    @classmethod
    def of(cls, query_offsets: Tensor, rows: int, size: int, cuts: Tensor | None = None) -> "Chunks":
        """Chunks of ``size`` tokens that begin at the segments' first rows, and anew at the rows ``cuts``."""
        bounds = query_offsets if cuts is None else torch.cat([query_offsets, cuts]).sort().values
        counts = (bounds.diff() + size - 1) // size
        ends = counts.cumsum(0)
        index = torch.arange(rows // size + counts.shape[0], device=bounds.device)
        piece = torch.searchsorted(ends, index, right=True)
        known = piece < counts.shape[0]
        piece = piece.clamp_max(counts.shape[0] - 1)
        starts = bounds[piece] + (index - (ends - counts)[piece]) * size
        stops = torch.minimum(starts + size, bounds[piece + 1])
        starts, stops = (torch.where(known, x, rows) for x in (starts, stops))
        return cls(starts, stops, torch.searchsorted(starts, query_offsets))


class Parts(NamedTuple):
    """What ``chunk_parts`` makes, and the arguments that the kernels share."""

    tile: ChunkTile
    chunks: Chunks
    inverses: Tensor
    shared: dict[str, Any]

    @classmethod
    def make(
        cls, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, scale: float, delta: bool,
        query_offsets: Tensor, cuts: Tensor | None = None, keep: bool = False,
    ) -> "Parts":  # fmt: skip
        """Launches ``chunk_parts``; q, k and v have unit stride along their rows. keep: with the inverses."""
        (tokens, heads, width), depth, arch = v.shape, k.shape[2], triton_devices.architecture(q.device)
        tile = chunk_tile(arch, q.dtype, depth)
        chunks = Chunks.of(query_offsets.contiguous(), tokens, tile.chunk, cuts)
        g = g.contiguous()
        beta_or_any = g if beta is None else beta.contiguous()
        p = torch.empty(tokens, heads, tile.chunk, dtype=q.dtype, device=q.device)
        w = torch.empty(tokens, heads, depth, dtype=q.dtype, device=q.device) if delta else p
        tv = torch.empty(tokens, heads, width, dtype=q.dtype, device=q.device) if delta else p
        inverses = torch.empty_like(p) if delta and keep else p
        before = torch.empty(tokens, heads, dtype=torch.float32, device=q.device)
        after = torch.empty_like(before)
        arguments: dict[str, Any] = {
            "q": q,
            "k": k,
            "v": v,
            "beta": beta_or_any,
            "w": w,
            "tv": tv,
            "p": p,
            "before": before,
            "after": after,
            "starts": chunks.starts,
            "stops": chunks.stops,
            "heads": heads,
            "group": heads // q.shape[1],
            "depth": depth,
            "width": width,
            "scale": scale,
            "stride_q": q.stride(0),
            "stride_qh": q.stride(1),
            "stride_k": k.stride(0),
            "stride_kh": k.stride(1),
            "stride_v": v.stride(0),
            "stride_vh": v.stride(1),
            "CHUNK": tile.chunk,
            "WEIGHTED": beta is not None,
            "DELTA": delta,
            "DEPTH": tile.depth,
        }
        chunk_parts[(chunks.starts.shape[0], heads)](
            g=g,
            inverses=inverses,
            DOUBLINGS=tile.chunk.bit_length() - 1,
            KEEP=keep,
            PRECISION=float32_precision(arch, q.dtype),
            **arguments,
            **tile.parts.options(),
        )
        return cls(tile, chunks, inverses, arguments)

    def walk(
        self, out: Tensor, finals: Tensor, states: Tensor, parents: Tensor, initial: Tensor | None,
        order: Tensor, trees: Tensor, keep: bool,
    ) -> None:  # fmt: skip
        """Launches ``chunk_walk``, a program for each of the ``trees``, head and block of columns."""
        programs, columns = trees.shape[0] - 1, blocks(self.shared["width"], self.tile.walk.columns)
        chunk_walk[(programs, self.shared["heads"], columns)](
            borders=self.chunks.borders,
            parents=parents.contiguous(),
            order=order,
            trees=trees,
            initial=finals if initial is None else initial.contiguous(),
            out=out,
            finals=finals,
            states=states,
            given=0 if initial is None else initial.shape[0],
            KEEP=keep,
            **self.shared,
            **self.tile.walk.options(),
        )


def linear_recurrence_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, parents: Tensor,
    initial: Tensor | None, scale: float, delta: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``toolkit::linear_recurrence_chunked``: float32, bfloat16 or float16, K up to 256, a gate for each head."""
    triton_devices.check_dtype("linear_recurrence_chunked", q.dtype)
    (_, heads, width), depth, segments = v.shape, k.shape[2], parents.shape[0]
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)  # rows of padding stay as they are
    finals = torch.empty(segments, heads, depth, width, dtype=torch.float32, device=q.device)
    if finals.numel():
        parts = Parts.make(unit(q), unit(k), unit(v), g, beta, scale, delta, query_offsets)
        parts.walk(out, finals, finals, parents, initial, *groups(parents, None), keep=False)
    return out, finals


def linear_recurrence_paged_chunked(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, load_blocks: Tensor,
    store_rows: Tensor, store_blocks: Tensor, states: Tensor, scale: float, delta: bool,
) -> Tensor:  # fmt: skip
    """``toolkit::linear_recurrence_paged_chunked``: frames as in ``linear_recurrence_paged``."""
    triton_devices.check_dtype("linear_recurrence_paged_chunked", q.dtype)
    check_strides(k.shape[2], states)
    (_, heads, width), segments = v.shape, load_blocks.shape[0]
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    if segments and heads and width:
        query_offsets, store_rows = query_offsets.contiguous(), store_rows.contiguous()
        parts = Parts.make(unit(q), unit(k), unit(v), g, beta, scale, delta, query_offsets, store_rows + 1)
        chunk_walk_paged[(segments, heads, blocks(width, parts.tile.walk.columns))](
            borders=parts.chunks.borders,
            load_blocks=load_blocks.contiguous(),
            store_rows=store_rows,
            store_blocks=store_blocks.contiguous(),
            store_starts=torch.searchsorted(store_rows, query_offsets),
            states=states,
            out=out,
            frames=states.shape[0],
            stride_f=states.stride(0),
            stride_fh=states.stride(1),
            stride_fk=states.stride(2),
            **parts.shared,
            **parts.tile.walk.options(),
        )
    return out
