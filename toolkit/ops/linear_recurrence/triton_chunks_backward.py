"""Gradients of the chunked linear recurrence in Triton, in chunked form too. Names are those of ``triton_chunks.py``.

With dO and dS the gradients to a chunk's out and to the state after it, S the state before it::

    dU = P^T dO + diag(exp(b_C - b)) K dS
    dS <- exp(b_C) dS + scale Q^T diag(exp(b)) dO - W^T dU                        (to the state before)

and with X = T^T dU, the gradient to diag(beta) (V - diag(exp(b)) K S), every other gradient is one chunk's::

    dP = dO U^T, j <= i      dL = -X U^T, j < i      dV = diag(beta) X
    dQ = scale diag(exp(b)) dO S^T + (scale D dP) K
    dK = diag(exp(b_C - b)) U dS^T + (scale D dP)^T Q - diag(beta exp(b)) X S^T + (N + N^T) K
    N_ij = beta_i D_ij dL_ij
    dbeta_i = x_i . v_i - exp(b_i) k_i . S x_i + sum_j dL_ij D_ij k_i . k_j

A gate g_l is in each b_i with i >= l, in each b_C - b_j with j < l and in each D_ij with j < l <= i; its gradient adds
up those of their exponentials, each over just these i and j, so that a decay of 0 passes exactly nothing.

States before chunks and U are computed again by ``chunk_walk``, from segments' parents (all segments at once), so the
forward keeps nothing but its finals. ``chunk_walk_back`` takes dS from the last chunk to the first; ``chunk_grads``
takes all chunks at once. Heads of one key head are added up in order.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops import triton_devices
from toolkit.ops.linear_recurrence.triton import groups, unit
from toolkit.ops.linear_recurrence.triton_chunks import Parts, decays, rows_of
from toolkit.ops.triton_rows import blocks

Gradients = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]  # to q, k, v, g, beta, initial


@triton.jit(do_not_specialize=["given"])
def chunk_walk_back(
    grad, q, k, w, p, before, after, starts, stops, borders, parents, order, trees, pending, to_initial, to_u,
    to_states, given, heads, group, depth, width, scale, stride_q, stride_qh, stride_k, stride_kh,
    CHUNK: tl.constexpr, DELTA: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The segments order[trees[s]:trees[s + 1]] of ``program_id(0)``, last to first.

    to_u [T, H, V] takes dU, to_states [chunks, H, K, V] dS after each chunk. ``pending`` [S, H, K, V] holds the
    gradients to the segments' final states; a segment adds its own to its parent's.
    """
    tree, head = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, column = tl.arange(0, DEPTH), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    inside = (row < depth)[:, None] & (column < width)[None, :]
    within = row[:, None] * width + column[None, :]
    size = (head * 0 + heads) * depth * width
    shift = head * depth * width
    key_head = head // group
    i = tl.arange(0, CHUNK)
    begin_of_tree, end_of_tree = tl.load(trees + tree), tl.load(trees + tree + 1)
    for from_last in range(begin_of_tree, end_of_tree):
        s = tl.load(order + begin_of_tree + end_of_tree - 1 - from_last)
        above = tl.load(pending + shift + s * size + within, mask=inside, other=0.0)
        begin, end = tl.load(borders + s), tl.load(borders + s + 1)
        for forth in range(begin, end):
            chunk = begin + end - 1 - forth
            tl.store(to_states + shift + chunk * size + within, above.to(to_states.dtype.element_ty), mask=inside)
            first, stop = tl.load(starts + chunk), tl.load(stops + chunk)
            t = first + i
            there = t < stop
            place = t * heads + head
            key = rows_of(k + key_head * stride_kh, t, there, stride_k, row, depth)
            upstream = rows_of(grad + head * width, t, there, heads * width, column, width)
            until = tl.load(after + place, mask=there, other=0.0)
            products = tl.load(p + place[:, None] * CHUNK + i[None, :], mask=there[:, None], other=0.0)
            du = tl.dot(key, above.to(key.dtype), input_precision="ieee") * tl.exp(until)[:, None]
            du = tl.dot(tl.trans(products), upstream, du, input_precision="ieee").to(key.dtype)
            covered = there[:, None] & (column < width)[None, :]
            tl.store(to_u + place[:, None] * width + column[None, :], du, mask=covered)
            query = rows_of(q + key_head * stride_qh, t, there, stride_q, row, depth)
            since = tl.load(before + place, mask=there, other=0.0)
            faded = (upstream.to(tl.float32) * (tl.exp(since) * scale)[:, None]).to(key.dtype)
            whole = tl.load(before + (stop - 1) * heads + head)
            above = tl.dot(tl.trans(query), faded, above * tl.exp(whole), input_precision="ieee")
            if DELTA:
                keys = rows_of(w + head * depth, t, there, heads * depth, row, depth)
                above -= tl.dot(tl.trans(keys), du, input_precision="ieee")
        parent = tl.load(parents + s)
        if parent >= 0:
            to_parent = pending + shift + parent * size + within
            tl.store(to_parent, tl.load(to_parent, mask=inside, other=0.0) + above, mask=inside)
        elif (parent < -1) & (-2 - parent < given):
            to_given = to_initial + shift + (-2 - parent) * size + within
            tl.store(to_given, tl.load(to_given, mask=inside, other=0.0) + above, mask=inside)
        tl.debug_barrier()  # other threads of the program may read it


@triton.jit
def chunk_grads(
    grad, q, k, v, g, beta, inverses, before, after, starts, stops, u, to_u, states, to_states,
    part_q, part_k, to_v, to_g, to_beta, heads, group, depth, width, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    CHUNK: tl.constexpr, WEIGHTED: tl.constexpr, DELTA: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """All gradients of chunk ``program_id(0)`` and head ``program_id(1)`` but those to states.

    part_q, part_k [T, H, K]: a head's share of the gradients to its key head.
    """
    chunk = tl.program_id(0).to(tl.int64)
    first, stop = tl.load(starts + chunk), tl.load(stops + chunk)
    if first < stop:
        head = tl.program_id(1).to(tl.int64)
        i, row = tl.arange(0, CHUNK), tl.arange(0, DEPTH)
        t = first + i
        there = t < stop
        place = t * heads + head
        key_head = head // group
        chunk_rows = place[:, None] * CHUNK + i[None, :]
        weight = tl.full([CHUNK], 1.0, tl.float32)
        if WEIGHTED:
            weight = tl.load(beta + place, mask=there, other=0.0).to(tl.float32)
        state_of = (chunk * heads + head) * depth * width
        decay = decays(tl.load(g + place, mask=there, other=0.0).to(tl.float32), i)
        since = tl.exp(tl.load(before + place, mask=there, other=0.0))
        until = tl.exp(tl.load(after + place, mask=there, other=0.0))
        whole = tl.exp(tl.load(before + (stop - 1) * heads + head))
        inside = there[:, None] & (row < depth)[None, :]
        at = place[:, None] * depth + row[None, :]
        later = i[:, None] > i[None, :]
        # Columns are walked twice, for queries and for keys: the sums of both at once do not fit into registers.
        to_p, o_s = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK, DEPTH], tl.float32)
        for begin in range(0, width, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            covered = there[:, None] & (column < width)[None, :]
            of_state = (row < depth)[:, None] & (column < width)[None, :]
            columns_at = place[:, None] * width + column[None, :]
            upstream = tl.load(grad + columns_at, mask=covered, other=0.0)
            added = tl.load(u + columns_at, mask=covered, other=0.0)
            state = tl.load(states + state_of + row[:, None] * width + column[None, :], mask=of_state, other=0.0)
            to_p = tl.dot(upstream, tl.trans(added), to_p, input_precision="ieee")
            o_s = tl.dot(upstream, tl.trans(state), o_s, input_precision="ieee")
        key = rows_of(k + key_head * stride_kh, t, there, stride_k, row, depth)
        query = rows_of(q + key_head * stride_qh, t, there, stride_q, row, depth)
        # The gradients to logarithms: of b, of b_C - b, and of the sums between two tokens.
        to_p = to_p * decay * scale
        of_pairs = tl.where(later, to_p * tl.dot(query, tl.trans(key), input_precision="ieee"), 0.0)
        o_s *= (since * scale)[:, None]
        of_since = tl.sum(o_s * query.to(tl.float32), 1)
        to_pairs = to_p.to(key.dtype)
        tl.store(part_q + at, tl.dot(to_pairs, key, o_s, input_precision="ieee"), mask=inside)
        x_s, u_s = tl.zeros([CHUNK, DEPTH], tl.float32), tl.zeros([CHUNK, DEPTH], tl.float32)
        to_l, to_weight, across = tl.zeros([CHUNK, CHUNK], tl.float32), tl.zeros([CHUNK], tl.float32), 0.0
        for begin in range(0, width, COLUMNS):
            column = begin + tl.arange(0, COLUMNS)
            covered = there[:, None] & (column < width)[None, :]
            of_state = (row < depth)[:, None] & (column < width)[None, :]
            columns_at = place[:, None] * width + column[None, :]
            states_at = state_of + row[:, None] * width + column[None, :]
            added = tl.load(u + columns_at, mask=covered, other=0.0)
            du = tl.load(to_u + columns_at, mask=covered, other=0.0)
            state = tl.load(states + states_at, mask=of_state, other=0.0)
            above = tl.load(to_states + states_at, mask=of_state, other=0.0)
            value = rows_of(v + head * stride_vh, t, there, stride_v, column, width).to(tl.float32)
            u_s = tl.dot(added, tl.trans(above), u_s, input_precision="ieee")
            across += tl.sum(tl.sum(state.to(tl.float32) * above.to(tl.float32), 1), 0)
            x = du.to(tl.float32)
            if DELTA:
                inverse = tl.load(inverses + chunk_rows, mask=there[:, None], other=0.0)
                x = tl.dot(tl.trans(inverse), du, input_precision="ieee")
                given = x.to(du.dtype)
                to_l = tl.dot(given, tl.trans(added), to_l, input_precision="ieee")
                x_s = tl.dot(given, tl.trans(state), x_s, input_precision="ieee")
            to_weight += tl.sum(x * value, 1)
            tl.store(to_v + columns_at, (x * weight[:, None]).to(to_v.dtype.element_ty), mask=covered)
        u_s *= until[:, None]
        of_until = tl.sum(u_s * key.to(tl.float32), 1)
        to_key = tl.dot(tl.trans(to_pairs), query, u_s, input_precision="ieee")
        if DELTA:
            to_l = tl.where(later, -to_l * decay, 0.0)
            between = tl.dot(key, tl.trans(key), input_precision="ieee") * to_l
            to_weight += tl.sum(between, 1)
            of_pairs += between * weight[:, None]
            x_s *= since[:, None]
            of_keys = tl.sum(x_s * key.to(tl.float32), 1)
            to_weight -= of_keys
            of_since -= of_keys * weight
            to_key -= x_s * weight[:, None]
            to_l *= weight[:, None]
            both = (to_l + tl.trans(to_l)).to(key.dtype)
            to_key = tl.dot(both, key, to_key, input_precision="ieee")
        tl.store(part_k + at, to_key, mask=inside)
        of_gate = tl.sum(tl.where(later, tl.cumsum(of_pairs, 0, reverse=True) + of_until[None, :], 0.0), 1)
        behind = tl.sum(tl.where(i[:, None] >= i[None, :], of_since[:, None], 0.0), 0)
        tl.store(to_g + place, of_gate + behind + across * whole, mask=there)
        tl.store(to_beta + place, to_weight, mask=there)


def linear_recurrence_chunked_backward(
    grad: Tensor | None, grad_finals: Tensor | None, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None,
    query_offsets: Tensor, parents: Tensor, initial: Tensor | None, finals: Tensor, scale: float, delta: bool,
) -> Gradients:  # fmt: skip
    """``toolkit::linear_recurrence_chunked_backward``."""
    triton_devices.check_dtype("linear_recurrence_chunked_backward", q.dtype)
    (tokens, heads, width), (_, key_heads, depth), segments = v.shape, k.shape, parents.shape[0]
    device, given = q.device, 0 if initial is None else initial.shape[0]
    options: dict[str, Any] = {"dtype": torch.float32, "device": device}
    # Rows of padding stay as they are.
    to_v = torch.zeros(v.shape, dtype=v.dtype, device=device)
    part_q, part_k = (torch.zeros(tokens, heads, depth, **options) for _ in range(2))
    to_g, to_beta = (torch.zeros(tokens, heads, **options) for _ in range(2))
    to_initial = q.new_empty(0) if initial is None else torch.zeros(initial.shape, **options)
    if finals.numel():
        q, k, v = unit(q), unit(k), unit(v)
        parts = Parts.make(q, k, v, g, beta, scale, delta, query_offsets, keep=True)
        tile, chunks, shared = parts.tile, parts.chunks, parts.shared
        states = torch.empty(chunks.starts.shape[0], heads, depth, width, dtype=q.dtype, device=device)
        u, to_u, to_states = torch.empty_like(to_v), torch.empty_like(to_v), torch.empty_like(states)
        index = torch.arange(segments + 1, device=device)
        parts.walk(u, finals, states, parents, initial, index, index, keep=True)
        grad = to_v if grad is None else grad.contiguous()
        pending = torch.zeros_like(finals) if grad_finals is None else grad_finals.contiguous().clone()
        order, trees = groups(parents, given)
        walked = {name: x for name, x in shared.items() if name in chunk_walk_back.arg_names}
        chunk_walk_back[(trees.shape[0] - 1, heads, blocks(width, tile.back.columns))](
            grad=grad,
            borders=chunks.borders,
            parents=parents.contiguous(),
            order=order,
            trees=trees,
            pending=pending,
            to_initial=to_initial if given else pending,
            to_u=to_u,
            to_states=to_states,
            given=given,
            **walked,
            **tile.back.options(),
        )
        taken = {name: x for name, x in shared.items() if name in chunk_grads.arg_names}
        chunk_grads[(chunks.starts.shape[0], heads)](
            grad=grad,
            g=g.contiguous(),
            inverses=parts.inverses,
            u=u,
            to_u=to_u,
            states=states,
            to_states=to_states,
            part_q=part_q,
            part_k=part_k,
            to_v=to_v,
            to_g=to_g,
            to_beta=to_beta,
            **taken,
            **tile.grads.options(),
        )
    to_q, to_k = (x.unflatten(1, (key_heads, -1)).sum(2) for x in (part_q, part_k))
    of_beta = q.new_empty(0) if beta is None else to_beta.to(beta.dtype)
    return to_q.to(q.dtype), to_k.to(k.dtype), to_v, to_g.to(g.dtype), of_beta, to_initial
