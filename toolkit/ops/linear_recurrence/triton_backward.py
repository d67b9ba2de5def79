"""Gradients of the gated linear recurrence in Triton: tokens backwards, a block of columns of a head at a time.

States between those that the forward kept are computed again into a few places of memory that each program owns: of a
chunk of 64 tokens every eighth, then eight at a time. What sums over columns (dq, dk, dg, dbeta) is written a copy a
block and added up in order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.linear_recurrence.reference import CHUNK
from toolkit.ops.linear_recurrence.tiles import BACKWARD_PROGRAMS, tile
from toolkit.ops.linear_recurrence.triton import groups, scalars, start_of, written
from toolkit.ops.triton_rows import blocks

SPAN = 8  # tokens whose states are held at once


@triton.jit
def token_forth(
    state, k, v, g, beta, t, head, key_head, heads, key_heads, depth, width, row, column,
    WEIGHTED: tl.constexpr, DELTA: tl.constexpr,
):  # fmt: skip
    """The state after token t."""
    t = tl.cast(t, tl.int64)
    place = t * heads + head
    key = tl.load(k + (t * key_heads + key_head) * depth + row, mask=row < depth, other=0.0).to(tl.float32)
    value = tl.load(v + place * width + column, mask=column < width, other=0.0).to(tl.float32)
    decay, weight = scalars(g, beta, place, WEIGHTED)
    state, _, u = written(state, key, value, decay, weight, DELTA)
    return state + key[:, None] * u[None, :]


@triton.jit(do_not_specialize=["tokens", "tasks", "given"])
def recurrence_grad(
    grad, q, k, v, g, beta, offsets, parents, order, starts, initial, finals, kept, pending, scratch,
    to_initial, part_q, part_k, to_v, part_g, part_beta,
    tokens, tasks, given, heads, key_heads, depth, width, scale,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, WEIGHTED: tl.constexpr, DELTA: tl.constexpr, BLOCKS: tl.constexpr,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tasks ``program_id(0)``, + programs, ...: a group of trees, a head and a block of columns each.

    ``pending`` [S, H, K, V] holds the gradients to the segments' final states; a segment adds its own to its parent's.
    """
    row = tl.arange(0, DEPTH)
    row_in = row < depth
    tile = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    marks = scratch + tl.program_id(0).to(tl.int64) * ((CHUNK // SPAN + SPAN) * DEPTH * COLUMNS)
    held = marks + CHUNK // SPAN * DEPTH * COLUMNS
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        block = task % BLOCKS
        head = ((task // BLOCKS) % heads).to(tl.int64)
        tree = task // BLOCKS // heads
        key_head = head // (heads // key_heads)
        column = block * COLUMNS + tl.arange(0, COLUMNS)
        column_in = column < width
        inside = row_in[:, None] & column_in[None, :]
        head_size = depth * width
        size = (head * 0 + heads) * head_size
        shift = head * head_size
        within = row[:, None] * width + column[None, :]
        part = block.to(tl.int64) * tokens
        begin_of_tree, end_of_tree = tl.load(starts + tree).to(tl.int32), tl.load(starts + tree + 1).to(tl.int32)
        for i in range(begin_of_tree, end_of_tree):
            s = tl.load(order + begin_of_tree + end_of_tree - 1 - i)
            first, end = tl.load(offsets + s).to(tl.int32), tl.load(offsets + s + 1).to(tl.int32)
            parent = tl.load(parents + s)
            above = tl.load(pending + shift + s * size + within, mask=inside, other=0.0)
            chunks = tl.cdiv(end - first, CHUNK)
            for from_last in range(chunks):
                chunk = chunks - 1 - from_last
                begin = first + chunk * CHUNK
                stop = tl.minimum(begin + CHUNK, end)
                spans = tl.cdiv(stop - begin, SPAN)
                if chunk > 0:
                    place = (first // CHUNK + chunk - 1).to(tl.int64) * size
                    state = tl.load(kept + shift + place + within, mask=inside, other=0.0)
                else:
                    state = start_of(
                        parent, s, finals + shift, initial + shift, given, size, within, row, column, depth, width
                    )  # fmt: skip
                for span in range(spans):
                    tl.store(marks + span * (DEPTH * COLUMNS) + tile, state)
                    from_token = begin + span * SPAN
                    for t in range(from_token, tl.where(span + 1 < spans, from_token + SPAN, from_token)):
                        state = token_forth(
                            state, k, v, g, beta, t, head, key_head, heads, key_heads, depth, width, row, column,
                            WEIGHTED, DELTA,
                        )  # fmt: skip
                tl.debug_barrier()  # memory of the program: what one thread stored another may load
                for span_from_last in range(spans):
                    span = spans - 1 - span_from_last
                    from_token = begin + span * SPAN
                    to_token = tl.minimum(from_token + SPAN, stop)
                    state = tl.load(marks + span * (DEPTH * COLUMNS) + tile)
                    for forth in range(from_token, to_token):
                        t = tl.cast(forth, tl.int64)
                        tl.store(held + (t - from_token) * (DEPTH * COLUMNS) + tile, state)
                        state = token_forth(
                            state, k, v, g, beta, t, head, key_head, heads, key_heads, depth, width, row, column,
                            WEIGHTED, DELTA,
                        )  # fmt: skip
                        at = (t * heads + head) * width
                        upstream = tl.load(grad + at + column, mask=column_in, other=0.0)
                        to_query = tl.sum(state * upstream.to(tl.float32)[None, :], 1) * scale
                        tl.store(part_q + ((part + t) * heads + head) * depth + row, to_query, mask=row_in)
                    tl.debug_barrier()
                    for back in range(from_token, to_token):
                        t = tl.cast(from_token + to_token - 1 - back, tl.int64)
                        under, at = (t * key_heads + key_head) * depth, (t * heads + head) * width
                        key = tl.load(k + under + row, mask=row_in, other=0.0)
                        query = tl.load(q + under + row, mask=row_in, other=0.0)
                        value = tl.load(v + at + column, mask=column_in, other=0.0)
                        upstream = tl.load(grad + at + column, mask=column_in, other=0.0)
                        key, query, value = key.to(tl.float32), query.to(tl.float32), value.to(tl.float32)
                        decay, weight = scalars(g, beta, t * heads + head, WEIGHTED)
                        before = tl.load(held + (t - from_token) * (DEPTH * COLUMNS) + tile)
                        decayed, answer, u = written(before, key, value, decay, weight, DELTA)
                        above += (query * scale)[:, None] * upstream.to(tl.float32)[None, :]
                        to_u = tl.sum(above * key[:, None], 0)
                        to_value = to_u * weight
                        to_key = tl.sum(above * u[None, :], 1)
                        if DELTA:
                            to_key -= tl.sum(decayed * to_value[None, :], 1)
                            above -= key[:, None] * to_value[None, :]
                        to_decay = tl.sum(tl.sum(above * decayed, 0), 0)
                        above *= decay
                        place = (part + t) * heads + head
                        tl.store(part_k + place * depth + row, to_key, mask=row_in)
                        tl.store(part_g + place, to_decay)
                        tl.store(part_beta + place, tl.sum(to_u * (value - answer), 0))
                        tl.store(to_v + at + column, to_value.to(to_v.dtype.element_ty), mask=column_in)
                    tl.debug_barrier()
            if parent >= 0:
                to_parent = pending + shift + parent * size + within
                tl.store(to_parent, tl.load(to_parent, mask=inside, other=0.0) + above, mask=inside)
            elif (parent < -1) & (-2 - parent < given):
                to_given = to_initial + shift + (-2 - parent) * size + within
                tl.store(to_given, tl.load(to_given, mask=inside, other=0.0) + above, mask=inside)
            tl.debug_barrier()


def linear_recurrence_backward(
    grad: Tensor | None, grad_finals: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
    query_offsets: Tensor, parents: Tensor, initial: Tensor | None, finals: Tensor, kept: Tensor,
    scale: float, delta: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``toolkit::linear_recurrence_backward``: sums over columns, then over the heads of a key head, each in order."""
    triton_devices.check_dtype("linear_recurrence_backward", q.dtype)
    arch = triton_devices.architecture(q.device)
    (tokens, heads, width), (_, key_heads, depth), segments = v.shape, k.shape, parents.shape[0]
    shape = tile("linear_recurrence_backward", arch, depth, width, backward=True)
    count, given = blocks(width, shape.columns), 0 if initial is None else initial.shape[0]
    options: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    to_v = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    to_initial = q.new_empty(0) if initial is None else torch.zeros(initial.shape, **options)
    part_q = torch.empty(count, tokens, heads, depth, **options)
    part_k, part_g = torch.empty_like(part_q), torch.empty(count, tokens, heads, **options)
    part_beta = torch.empty_like(part_g)
    tasks = (segments + given) * heads * count
    if tasks:
        grad = to_v if grad is None else grad.contiguous()
        pending = torch.zeros_like(finals) if grad_finals is None else grad_finals.contiguous().clone()
        order, starts = groups(parents, given)
        programs = min(tasks, BACKWARD_PROGRAMS[arch])
        scratch = torch.empty(programs, CHUNK // SPAN + SPAN, shape.rows, shape.columns, **options)
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))  # their strides would take registers
        recurrence_grad[(programs,)](
            grad=grad,
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
            finals=finals,
            kept=kept,
            pending=pending,
            scratch=scratch,
            to_initial=to_initial if given else pending,
            part_q=part_q,
            part_k=part_k,
            to_v=to_v,
            part_g=part_g,
            part_beta=part_beta,
            tokens=tokens,
            tasks=tasks,
            given=given,
            heads=heads,
            key_heads=key_heads,
            depth=depth,
            width=width,
            scale=scale,
            CHUNK=CHUNK,
            SPAN=SPAN,
            WEIGHTED=beta is not None,
            DELTA=delta,
            BLOCKS=count,
            DEPTH=shape.rows,
            COLUMNS=shape.columns,
            **shape.options(),
        )
    inside = torch.arange(tokens, device=q.device) < query_offsets[-1]

    def joined(parts: Tensor, like: Tensor) -> Tensor:
        """The blocks' sums, 0 for rows of padding, which no program wrote."""
        total = parts[0] if count else parts.new_zeros(parts.shape[1:])
        for part in parts[1:]:
            total = total + part
        if like.dim() == 3:
            total = total.unflatten(1, (key_heads, -1)).sum(2)
        return torch.where(inside.view(-1, *[1] * (total.dim() - 1)), total, 0.0).to(like.dtype)

    to_beta = q.new_empty(0) if beta is None else joined(part_beta, beta)
    return joined(part_q, q), joined(part_k, k), to_v, joined(part_g, g), to_beta, to_initial
