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
from toolkit.ops.linear_recurrence.reference import CHUNK, Gradients
from toolkit.ops.linear_recurrence.tiles import BACKWARD_PROGRAMS
from toolkit.ops.linear_recurrence.triton import (
    Layout,
    gates,
    groups,
    lanes_of,
    one_of_head,
    rates_of,
    start_of,
    states_of,
    written,
)

SPAN = 8  # tokens whose states are held at once


@triton.jit
def token_forth(
    state, k, v, g, rate, beta, t, head, key_head, heads, key_heads, depth, width, row, column, inside, lane_in,
    WEIGHTED: tl.constexpr, DELTA: tl.constexpr, KEYED: tl.constexpr, RATED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The state after token t."""
    t = tl.cast(t, tl.int64)
    place = t * heads + head
    key = tl.load(k + (t * key_heads + key_head) * depth + row, mask=row < depth, other=0.0).to(tl.float32)
    value = tl.load(v + place * width + column, mask=lane_in, other=0.0).to(tl.float32)
    decay, weight = gates(g, rate, beta, place, depth, row, inside, lane_in, WEIGHTED, KEYED, RATED, HEADS)
    state, _, u = written(state, key, value, decay, weight, DELTA)
    return state + key[:, None] * u[None, :]


@triton.jit
def store_gate(
    above, decayed, g, rate, to_rates, part_g, place, part, depth, row, row_in, inside, lane_in,
    KEYED: tl.constexpr, RATED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Stores a token's gradient to its gate; returns ``to_rates`` with its gradient to the rates added.

    Args:
        place: of the token and head (with HEADS the heads of the lanes).
        part: how far from there the block's copy is.
    """
    if KEYED:
        if HEADS:
            tl.store(part_g + place[None, :] * depth + row[:, None], above * decayed, mask=inside)
        else:
            tl.store(part_g + (part + place) * depth + row, tl.sum(above * decayed, 1), mask=row_in)
    elif RATED:
        if HEADS:
            tl.store(part_g + place, tl.sum(above * decayed * rate, 0), mask=lane_in)
            to_rates += above * decayed * one_of_head(g, place, lane_in, HEADS)[None, :]
        else:
            of_keys = tl.sum(above * decayed, 1)[:, None]
            tl.store(part_g + part + place, tl.sum(tl.sum(of_keys * rate, 1), 0))
            to_rates += of_keys * one_of_head(g, place, lane_in, HEADS)
    else:
        tl.store(part_g + part + place, tl.sum(tl.sum(above * decayed, 0), 0))
    return to_rates


@triton.jit(do_not_specialize=["tokens", "tasks", "given"])
def recurrence_grad(
    grad, q, k, v, g, rates, beta, offsets, parents, order, starts, initial, finals, kept, pending, scratch,
    to_initial, part_q, part_k, to_v, part_g, part_beta, part_rates,
    tokens, tasks, given, heads, key_heads, depth, width, scale,
    CHUNK: tl.constexpr, SPAN: tl.constexpr, WEIGHTED: tl.constexpr, DELTA: tl.constexpr, BLOCKS: tl.constexpr,
    KEYED: tl.constexpr, RATED: tl.constexpr, HEADS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tasks ``program_id(0)``, + programs, ...: a group of trees, a head and a block of columns each.

    With HEADS a key head and a block of its heads.

    ``pending`` [S, H, K, V] holds the gradients to the segments' final states; a segment adds its own to its parent's.
    """
    row = tl.arange(0, DEPTH)
    row_in = row < depth
    tile = row[:, None] * COLUMNS + tl.arange(0, COLUMNS)[None, :]
    marks = scratch + tl.program_id(0).to(tl.int64) * ((CHUNK // SPAN + SPAN) * DEPTH * COLUMNS)
    held = marks + CHUNK // SPAN * DEPTH * COLUMNS
    for task in range(tl.program_id(0), tasks, tl.num_programs(0)):
        block = task % BLOCKS
        group = heads // key_heads
        units = key_heads if HEADS else heads
        unit = ((task // BLOCKS) % units).to(tl.int64)
        tree = task // BLOCKS // units
        lane = block * COLUMNS + tl.arange(0, COLUMNS)
        head, key_head, column, lanes = lanes_of(unit, lane, group, width, HEADS)
        lane_in = lane < lanes
        inside = row_in[:, None] & lane_in[None, :]
        head_size = depth * width
        size = (unit * 0 + heads) * head_size
        shift, within = states_of(unit, head, row, column, head_size, width, HEADS)
        rate = rates_of(rates, head, depth, row, inside, RATED, HEADS)
        to_rates = tl.zeros([DEPTH, COLUMNS if HEADS else 1], tl.float32)
        part = block.to(tl.int64) * tokens
        of_heads = part * (0 if HEADS else heads)  # a head's lanes may have copies, lanes of heads have none
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
                        parent, s, finals + shift, initial + shift, given, size, within, row, lane, depth, lanes
                    )  # fmt: skip
                for span in range(spans):
                    tl.store(marks + span * (DEPTH * COLUMNS) + tile, state)
                    from_token = begin + span * SPAN
                    for t in range(from_token, tl.where(span + 1 < spans, from_token + SPAN, from_token)):
                        state = token_forth(
                            state, k, v, g, rate, beta, t, head, key_head, heads, key_heads, depth, width, row, column,
                            inside, lane_in, WEIGHTED, DELTA, KEYED, RATED, HEADS,
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
                            state, k, v, g, rate, beta, t, head, key_head, heads, key_heads, depth, width, row, column,
                            inside, lane_in, WEIGHTED, DELTA, KEYED, RATED, HEADS,
                        )  # fmt: skip
                        at = (t * heads + head) * width
                        upstream = tl.load(grad + at + column, mask=lane_in, other=0.0)
                        to_query = tl.sum(state * upstream.to(tl.float32)[None, :], 1) * scale
                        tl.store(part_q + ((part + t) * units + unit) * depth + row, to_query, mask=row_in)
                    tl.debug_barrier()
                    # Nothing is hoisted: a token's addresses would take registers through the loop.
                    for back in tl.range(from_token, to_token, disable_licm=True):
                        t = tl.cast(from_token + to_token - 1 - back, tl.int64)
                        under, at = (t * key_heads + key_head) * depth, (t * heads + head) * width
                        key = tl.load(k + under + row, mask=row_in, other=0.0)
                        query = tl.load(q + under + row, mask=row_in, other=0.0)
                        value = tl.load(v + at + column, mask=lane_in, other=0.0)
                        upstream = tl.load(grad + at + column, mask=lane_in, other=0.0)
                        key, query, value = key.to(tl.float32), query.to(tl.float32), value.to(tl.float32)
                        place = t * heads + head
                        decay, weight = gates(
                            g, rate, beta, place, depth, row, inside, lane_in, WEIGHTED, KEYED, RATED, HEADS
                        )  # fmt: skip
                        before = tl.load(held + (t - from_token) * (DEPTH * COLUMNS) + tile)
                        decayed, answer, u = written(before, key, value, decay, weight, DELTA)
                        above += (query * scale)[:, None] * upstream.to(tl.float32)[None, :]
                        to_u = tl.sum(above * key[:, None], 0)
                        to_value = to_u * weight
                        to_key = tl.sum(above * u[None, :], 1)
                        if DELTA:
                            to_key -= tl.sum(decayed * to_value[None, :], 1)
                            above -= key[:, None] * to_value[None, :]
                        to_rates = store_gate(
                            above, decayed, g, rate, to_rates, part_g, place, of_heads, depth, row, row_in, inside,
                            lane_in, KEYED, RATED, HEADS,
                        )  # fmt: skip
                        above *= decay
                        tl.store(part_k + ((part + t) * units + unit) * depth + row, to_key, mask=row_in)
                        if HEADS:
                            tl.store(part_beta + place, to_u * (value - answer), mask=lane_in)
                        else:
                            tl.store(part_beta + of_heads + place, tl.sum(to_u * (value - answer), 0))
                        tl.store(to_v + at + column, to_value.to(to_v.dtype.element_ty), mask=lane_in)
                    tl.debug_barrier()
            if parent >= 0:
                to_parent = pending + shift + parent * size + within
                tl.store(to_parent, tl.load(to_parent, mask=inside, other=0.0) + above, mask=inside)
            elif (parent < -1) & (-2 - parent < given):
                to_given = to_initial + shift + (-2 - parent) * size + within
                tl.store(to_given, tl.load(to_given, mask=inside, other=0.0) + above, mask=inside)
            tl.debug_barrier()
        if RATED:
            if HEADS:
                tl.store(part_rates + head[None, :] * depth + row[:, None], to_rates, mask=inside)
            else:
                tl.store(part_rates + (block * heads + head) * depth + row[:, None], to_rates, mask=row_in[:, None])


def linear_recurrence_backward(
    grad: Tensor | None, grad_finals: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
    query_offsets: Tensor, parents: Tensor, initial: Tensor | None, finals: Tensor, kept: Tensor,
    scale: float, delta: bool, rates: Tensor | None = None,
) -> Gradients:  # fmt: skip
    """``toolkit::linear_recurrence_backward``: sums over columns, then over the heads of a key head, each in order.

    Rates sum over all tokens: with them a program takes the segments of all trees.
    """
    triton_devices.check_dtype("linear_recurrence_backward", q.dtype)
    arch = triton_devices.architecture(q.device)
    (tokens, heads, width), (_, key_heads, depth), segments = v.shape, k.shape, parents.shape[0]
    layout = Layout.choose("linear_recurrence_backward", q, v, g, beta, rates, backward=True)
    in_heads, count, given = layout.options["HEADS"], layout.blocks, 0 if initial is None else initial.shape[0]
    copies = 1 if in_heads else count
    options: dict[str, Any] = {"dtype": torch.float32, "device": q.device}
    to_v = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    to_initial = q.new_empty(0) if initial is None else torch.zeros(initial.shape, **options)
    part_q = torch.empty(count, tokens, layout.units, depth, **options)
    part_k, part_g = torch.empty_like(part_q), torch.empty(copies, *g.shape, **options)
    part_beta = torch.empty(copies, tokens, heads, **options)
    part_rates = torch.zeros(copies, heads, depth, **options) if rates is not None else part_g
    trees = segments + given if rates is None else min(segments, 1)
    tasks = trees * layout.units * count
    if tasks:
        grad = to_v if grad is None else grad.contiguous()
        pending = torch.zeros_like(finals) if grad_finals is None else grad_finals.contiguous().clone()
        order, starts = groups(parents, given)
        if rates is not None:
            order, starts = (torch.arange(n, device=q.device) for n in (segments, 2))
            starts = starts * segments
        programs = min(tasks, BACKWARD_PROGRAMS[arch])
        scratch = torch.empty(programs, CHUNK // SPAN + SPAN, layout.tile.rows, layout.tile.columns, **options)
        q, k, v, g = (x.contiguous() for x in (q, k, v, g))  # their strides would take registers
        recurrence_grad[(programs,)](
            grad=grad,
            q=q,
            k=k,
            v=v,
            g=g,
            rates=g if rates is None else rates.contiguous(),
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
            part_rates=part_rates,
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
            DELTA=delta,
            BLOCKS=count,
            **layout.options,
        )
    inside = torch.arange(tokens, device=q.device) < query_offsets[-1]

    def added(parts: Tensor) -> Tensor:
        """The blocks' sums: of blocks of columns one after the other; those of heads are many."""
        if in_heads or not len(parts):
            return parts.sum(0)
        total = parts[0]
        for part in parts[1:]:
            total = total + part
        return total

    def joined(parts: Tensor, like: Tensor, of_keys: bool = False) -> Tensor:
        """The blocks' sums, 0 for rows of padding, which no program wrote."""
        total = added(parts)
        if of_keys:
            total = total.unflatten(1, (key_heads, -1)).sum(2)
        return torch.where(inside.view(-1, *[1] * (total.dim() - 1)), total, 0.0).to(like.dtype)

    to_q, to_k = joined(part_q, q, of_keys=True), joined(part_k, k, of_keys=True)
    to_beta = q.new_empty(0) if beta is None else joined(part_beta, beta)
    to_rates = q.new_empty(0) if rates is None else added(part_rates).to(rates.dtype)
    return to_q, to_k, to_v, joined(part_g, g), to_beta, to_initial, to_rates
