"""The gated linear recurrence in Triton: a program takes a block of columns of a head over the segments of a tree.

Tokens are taken one by one, the state [K, columns] in registers; sums over K have an order that the tile sets. A tree's
segments are walked in order by one program, which reads the final state of a parent back from memory.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops import triton_devices
from toolkit.ops.linear_recurrence.reference import CHUNK
from toolkit.ops.linear_recurrence.tiles import tile
from toolkit.ops.triton_rows import blocks


@triton.jit
def scalars(g, beta, place, WEIGHTED: tl.constexpr):
    """exp(g) and beta of a token and head."""
    decay = tl.exp(tl.load(g + place).to(tl.float32))
    weight = 1.0
    if WEIGHTED:
        weight = tl.load(beta + place).to(tl.float32)
    return decay, weight


@triton.jit
def written(state, key, value, decay, weight, DELTA: tl.constexpr):
    """The decayed state, what it answers to the key, and beta (v - that): [K, columns], [columns], [columns]."""
    state = state * decay
    answer = tl.zeros_like(value)
    if DELTA:
        answer = tl.sum(state * key[:, None], 0)
    return state, answer, (value - answer) * weight


@triton.jit
def if_held(index, count, row, column, depth, width):
    """The part of a block that lies within [depth, width], nothing where ``index`` is not one of [0, count)."""
    held = (index >= 0) & (index < count)
    return (row < depth)[:, None] & (column < tl.where(held, width, 0))[None, :]


@triton.jit
def start_of(parent, segments, finals, initial, given, size, within, row, column, depth, width):
    """What a segment starts from: a parent's final state, one of ``given`` initial ones, or zeros."""
    inherited = if_held(parent, segments, row, column, depth, width)
    state = tl.load(finals + tl.maximum(parent, 0) * size + within, mask=inherited, other=0.0)
    index = -2 - parent
    known = if_held(index, given, row, column, depth, width)
    return state + tl.load(initial + tl.maximum(index, 0) * size + within, mask=known, other=0.0)


@triton.jit
def token(
    state, q, k, v, g, beta, out, t, head, key_head, heads, row, column, row_in, column_in, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, width, WEIGHTED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """The state after token t, whose out is stored."""
    t = tl.cast(t, tl.int64)
    key = tl.load(k + t * stride_k + key_head * stride_kh + row, mask=row_in, other=0.0).to(tl.float32)
    query = tl.load(q + t * stride_q + key_head * stride_qh + row, mask=row_in, other=0.0).to(tl.float32)
    value = tl.load(v + t * stride_v + head * stride_vh + column, mask=column_in, other=0.0).to(tl.float32)
    decay, weight = scalars(g, beta, t * heads + head, WEIGHTED)
    state, _, u = written(state, key, value, decay, weight, DELTA)
    state += key[:, None] * u[None, :]
    result = tl.sum(state * query[:, None], 0) * scale
    tl.store(out + (t * heads + head) * width + column, result.to(out.dtype.element_ty), mask=column_in)
    return state


@triton.jit(do_not_specialize=["given"])
def recurrence_forward(
    q, k, v, g, beta, offsets, parents, order, starts, initial, out, finals, kept,
    given, heads, group, depth, width, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    CHUNK: tl.constexpr, KEEP: tl.constexpr, WEIGHTED: tl.constexpr, DELTA: tl.constexpr,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tree of segment ``program_id(0)``, if that is a root: its segments are order[starts[s]:starts[s + 1]]."""
    tree, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key_head = head // group
    row, column = tl.arange(0, DEPTH), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    row_in, column_in = row < depth, column < width
    inside = row_in[:, None] & column_in[None, :]
    size = tl.num_programs(1).to(tl.int64) * depth * width
    within = row[:, None] * width + column[None, :]
    finals += head * depth * width
    initial += head * depth * width
    kept += head * depth * width
    for i in range(tl.load(starts + tree), tl.load(starts + tree + 1)):
        s = tl.load(order + i)
        first, end = tl.load(offsets + s), tl.load(offsets + s + 1)
        state = start_of(
            tl.load(parents + s), s, finals, initial, given, size, within, row, column, depth, width
        )  # fmt: skip
        for t in range(first, end):
            if KEEP:
                local = t - first
                if (local % CHUNK == 0) & (local > 0):
                    place = (first // CHUNK + local // CHUNK - 1) * size
                    tl.store(kept + place + within, state, mask=inside)
            state = token(
                state, q, k, v, g, beta, out, t, head, key_head, heads, row, column, row_in, column_in, scale,
                stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, width, WEIGHTED, DELTA,
            )  # fmt: skip
        tl.store(finals + s * size + within, state, mask=inside)
        tl.debug_barrier()  # other threads of the program may read it back as a parent's


@triton.jit(do_not_specialize=["frames"])
def recurrence_paged(
    q, k, v, g, beta, offsets, load_blocks, store_rows, store_blocks, store_starts, states, out,
    frames, heads, group, depth, width, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_f, stride_fh, stride_fk,
    WEIGHTED: tl.constexpr, DELTA: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Segment ``program_id(0)``; its saves are store_starts[s] to [s + 1].

    A frame that does not exist is read as zeros and not written.
    """
    s, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    key_head = head // group
    row, column = tl.arange(0, DEPTH), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    row_in, column_in = row < depth, column < width
    within = row[:, None] * stride_fk + column[None, :]  # one head's states take less than 2^31 elements
    states += head * stride_fh
    source = tl.load(load_blocks + s)
    held = if_held(source, frames, row, column, depth, width)
    state = tl.load(states + tl.maximum(source, 0) * stride_f + within, mask=held, other=0.0)
    tl.debug_barrier()  # all of it is read before any of it may be written
    save, last = tl.load(store_starts + s), tl.load(store_starts + s + 1)
    for t in range(tl.load(offsets + s), tl.load(offsets + s + 1)):
        state = token(
            state, q, k, v, g, beta, out, t, head, key_head, heads, row, column, row_in, column_in, scale,
            stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, width, WEIGHTED, DELTA,
        )  # fmt: skip
        while (save < last) & (tl.load(store_rows + save, mask=save < last, other=-1) == t):
            frame = tl.load(store_blocks + save)
            kept = if_held(frame, frames, row, column, depth, width)
            tl.store(states + tl.maximum(frame, 0) * stride_f + within, state, mask=kept)
            save += 1


def groups(parents: Tensor, given: int | None) -> tuple[Tensor, Tensor]:
    """(order, starts): segments by group, each group's in ascending order, on their device and without a host sync.

    A group is a tree, numbered by its root; with ``given`` initial states the trees that start from one of them are one
    group, numbered S + its index.
    """
    count = parents.shape[0]
    group = torch.where(parents >= 0, parents, torch.arange(count, device=parents.device))
    for _ in range(max(count - 1, 0).bit_length()):  # every step doubles the ancestors that are skipped
        group = group[group]
    if given is not None:
        origin = parents[group]
        group = torch.where(origin < -1, count - 2 - origin, group)
    ids, order = torch.sort(group, stable=True)
    edges = torch.arange(count + (given or 0) + 1, device=parents.device)
    return order, torch.searchsorted(ids, edges)


def unit(x: Tensor) -> Tensor:
    """x [T, heads, width] with unit stride along its last dimension."""
    return x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous()


def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, parents: Tensor,
    initial: Tensor | None, scale: float, delta: bool, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``toolkit::linear_recurrence``: float32, bfloat16 or float16, K up to 256."""
    triton_devices.check_dtype("linear_recurrence", q.dtype)
    (tokens, heads, width), depth, segments = v.shape, k.shape[2], parents.shape[0]
    shape = tile("linear_recurrence", triton_devices.architecture(q.device), depth, width)
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)  # rows of padding stay as they are
    finals = torch.empty(segments, heads, depth, width, dtype=torch.float32, device=q.device)
    kept = torch.zeros(tokens // CHUNK if keep else 0, *finals.shape[1:], dtype=torch.float32, device=q.device)
    if finals.numel():
        q, k, v, g = unit(q), unit(k), unit(v), g.contiguous()
        order, starts = groups(parents, None)
        recurrence_forward[(segments, heads, blocks(width, shape.columns))](
            q=q,
            k=k,
            v=v,
            g=g,
            beta=g if beta is None else beta.contiguous(),
            offsets=query_offsets.contiguous(),
            parents=parents.contiguous(),
            order=order,
            starts=starts,
            initial=finals if initial is None else initial.contiguous(),
            out=out,
            finals=finals,
            kept=kept,
            given=0 if initial is None else initial.shape[0],
            heads=heads,
            group=heads // q.shape[1],
            depth=depth,
            width=width,
            scale=scale,
            stride_q=q.stride(0),
            stride_qh=q.stride(1),
            stride_k=k.stride(0),
            stride_kh=k.stride(1),
            stride_v=v.stride(0),
            stride_vh=v.stride(1),
            CHUNK=CHUNK,
            KEEP=keep,
            WEIGHTED=beta is not None,
            DELTA=delta,
            DEPTH=shape.rows,
            COLUMNS=shape.columns,
            **shape.options(),
        )
    return out, finals, kept


def linear_recurrence_paged(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, load_blocks: Tensor,
    store_rows: Tensor, store_blocks: Tensor, states: Tensor, scale: float, delta: bool,
) -> Tensor:  # fmt: skip
    """``toolkit::linear_recurrence_paged``: a source that is no frame is taken as zeros, such a target is skipped."""
    triton_devices.check_dtype("linear_recurrence_paged", q.dtype)
    (_, heads, width), depth, segments = v.shape, k.shape[2], load_blocks.shape[0]
    if depth * states.stride(2) >= 2**31:
        raise ToolkitError(
            f"A head of states must span less than 2^31 elements in Triton, got strides {list(states.stride())}."
        )
    shape = tile("linear_recurrence_paged", triton_devices.architecture(q.device), depth, width)
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    if segments and heads and width:
        q, k, v, g = unit(q), unit(k), unit(v), g.contiguous()
        query_offsets, store_rows = query_offsets.contiguous(), store_rows.contiguous()
        starts = torch.searchsorted(store_rows, query_offsets)  # of each segment among the saves
        recurrence_paged[(segments, heads, blocks(width, shape.columns))](
            q=q,
            k=k,
            v=v,
            g=g,
            beta=g if beta is None else beta.contiguous(),
            offsets=query_offsets,
            load_blocks=load_blocks.contiguous(),
            store_rows=store_rows,
            store_blocks=store_blocks.contiguous(),
            store_starts=starts,
            states=states,
            out=out,
            frames=states.shape[0],
            heads=heads,
            group=heads // q.shape[1],
            depth=depth,
            width=width,
            scale=scale,
            stride_q=q.stride(0),
            stride_qh=q.stride(1),
            stride_k=k.stride(0),
            stride_kh=k.stride(1),
            stride_v=v.stride(0),
            stride_vh=v.stride(1),
            stride_f=states.stride(0),
            stride_fh=states.stride(1),
            stride_fk=states.stride(2),
            WEIGHTED=beta is not None,
            DELTA=delta,
            DEPTH=shape.rows,
            COLUMNS=shape.columns,
            **shape.options(),
        )
    return out
