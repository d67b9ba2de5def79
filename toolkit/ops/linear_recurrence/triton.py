"""The gated linear recurrence in Triton: a program takes a block of columns of a head over the segments of a tree.

Tokens are taken one by one, the state [K, lanes] in registers; sums over K have an order that the tile sets. A lane is
a column of one head or, where values are single numbers and keys have separate decays (a selective scan), a head
of one key head. A tree's segments are walked in order by one program, which reads the final state of a parent back
from memory.
"""

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops import triton_devices
from toolkit.ops.linear_recurrence.reference import CHUNK
from toolkit.ops.linear_recurrence.tiles import tile
from toolkit.ops.tiles import GemmTile
from toolkit.ops.triton_rows import blocks


@triton.jit
def lanes_of(unit, lane, group, width, HEADS: tl.constexpr):
    """(head, key head, column, how many there are) of lanes of a head, or with HEADS of a key head."""
    if HEADS:
        return unit * group + lane, unit, lane * 0, group
    else:
        return unit, unit // group, lane, width


@triton.jit
def states_of(unit, head, row, column, stride_head, stride_key, HEADS: tl.constexpr):
    """A number and [K, lanes], whose sums are offsets within a state [H, K, V]: one head's take no 64-bit tile."""
    if HEADS:
        return unit * 0, head[None, :] * stride_head + row[:, None] * stride_key
    else:
        return unit * stride_head, row[:, None] * stride_key + column[None, :]


@triton.jit
def rates_of(rates, head, depth, row, inside, RATED: tl.constexpr, HEADS: tl.constexpr):
    """The rates of a head as a column, or with HEADS of every lane's; 0 where there are none."""
    if RATED:
        if HEADS:
            return tl.load(rates + head[None, :] * depth + row[:, None], mask=inside, other=0.0).to(tl.float32)
        else:
            return tl.load(rates + head * depth + row, mask=row < depth, other=0.0).to(tl.float32)[:, None]
    else:
        return 0.0


@triton.jit
def one_of_head(x, place, lane_in, HEADS: tl.constexpr):
    """A number of a token for its head, or with HEADS for every lane's."""
    if HEADS:
        return tl.load(x + place, mask=lane_in, other=0.0).to(tl.float32)
    else:
        return tl.load(x + place).to(tl.float32)


@triton.jit
def gates(
    g, rate, beta, place, depth, row, inside, lane_in,
    WEIGHTED: tl.constexpr, KEYED: tl.constexpr, RATED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """exp of a token's gate, which broadcasts to [K, lanes], and its beta."""
    if KEYED:
        if HEADS:
            log = tl.load(g + place[None, :] * depth + row[:, None], mask=inside, other=0.0).to(tl.float32)
        else:
            log = tl.load(g + place * depth + row, mask=row < depth, other=0.0).to(tl.float32)[:, None]
    else:
        log = one_of_head(g, place, lane_in, HEADS)
        if RATED:
            if HEADS:
                log = log[None, :]
            log = log * rate
    weight = 1.0
    if WEIGHTED:
        weight = one_of_head(beta, place, lane_in, HEADS)
    return tl.exp(log), weight


@triton.jit
def written(state, key, value, decay, weight, DELTA: tl.constexpr):
    """The decayed state, what it answers to the key, and beta (v - that): [K, columns], [columns], [columns]."""
    state = state * decay
    answer = tl.zeros_like(value)
    if DELTA:
        answer = tl.sum(state * key[:, None], 0)
    return state, answer, (value - answer) * weight


@triton.jit
def if_held(index, count, row, lane, depth, lanes):
    """The part of a block that lies within [depth, lanes], nothing where ``index`` is not one of [0, count)."""
    held = (index >= 0) & (index < count)
    return (row < depth)[:, None] & (lane < tl.where(held, lanes, 0))[None, :]


@triton.jit
def start_of(parent, segments, finals, initial, given, size, within, row, lane, depth, lanes):
    """What a segment starts from: a parent's final state, one of ``given`` initial ones, or zeros."""
    inherited = if_held(parent, segments, row, lane, depth, lanes)
    state = tl.load(finals + tl.maximum(parent, 0) * size + within, mask=inherited, other=0.0)
    index = -2 - parent
    known = if_held(index, given, row, lane, depth, lanes)
    return state + tl.load(initial + tl.maximum(index, 0) * size + within, mask=known, other=0.0)


@triton.jit
def token(
    state, q, k, v, g, rate, beta, out, t, head, key_head, column, heads, row, row_in, inside, lane_in, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, depth, width,
    WEIGHTED: tl.constexpr, DELTA: tl.constexpr, KEYED: tl.constexpr, RATED: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """The state after token t, whose out is stored."""
    t = tl.cast(t, tl.int64)
    key = tl.load(k + t * stride_k + key_head * stride_kh + row, mask=row_in, other=0.0).to(tl.float32)
    query = tl.load(q + t * stride_q + key_head * stride_qh + row, mask=row_in, other=0.0).to(tl.float32)
    value = tl.load(v + t * stride_v + head * stride_vh + column, mask=lane_in, other=0.0).to(tl.float32)
    place = t * heads + head
    decay, weight = gates(g, rate, beta, place, depth, row, inside, lane_in, WEIGHTED, KEYED, RATED, HEADS)
    state, _, u = written(state, key, value, decay, weight, DELTA)
    state += key[:, None] * u[None, :]
    result = tl.sum(state * query[:, None], 0) * scale
    tl.store(out + place * width + column, result.to(out.dtype.element_ty), mask=lane_in)
    return state


@triton.jit(do_not_specialize=["given"])
def recurrence_forward(
    q, k, v, g, rates, beta, offsets, parents, order, starts, initial, out, finals, kept,
    given, heads, group, depth, width, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh,
    CHUNK: tl.constexpr, KEEP: tl.constexpr, WEIGHTED: tl.constexpr, DELTA: tl.constexpr,
    KEYED: tl.constexpr, RATED: tl.constexpr, HEADS: tl.constexpr, DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The tree of segment ``program_id(0)``, if that is a root: its segments are order[starts[s]:starts[s + 1]]."""
    tree, unit = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, lane = tl.arange(0, DEPTH), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    head, key_head, column, lanes = lanes_of(unit, lane, group, width, HEADS)
    row_in, lane_in = row < depth, lane < lanes
    inside = row_in[:, None] & lane_in[None, :]
    head_size = depth * width
    size = (unit * 0 + heads) * head_size
    shift, within = states_of(unit, head, row, column, head_size, width, HEADS)
    finals += shift
    initial += shift
    kept += shift
    rate = rates_of(rates, head, depth, row, inside, RATED, HEADS)
    for i in range(tl.load(starts + tree), tl.load(starts + tree + 1)):
        s = tl.load(order + i)
        first, end = tl.load(offsets + s), tl.load(offsets + s + 1)
        state = start_of(
            tl.load(parents + s), s, finals, initial, given, size, within, row, lane, depth, lanes
        )  # fmt: skip
        for t in range(first, end):
            if KEEP:
                local = t - first
                if (local % CHUNK == 0) & (local > 0):
                    place = (first // CHUNK + local // CHUNK - 1) * size
                    tl.store(kept + place + within, state, mask=inside)
            state = token(
                state, q, k, v, g, rate, beta, out, t, head, key_head, column, heads, row, row_in, inside, lane_in,
                scale, stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, depth, width,
                WEIGHTED, DELTA, KEYED, RATED, HEADS,
            )  # fmt: skip
        tl.store(finals + s * size + within, state, mask=inside)
        tl.debug_barrier()  # other threads of the program may read it back as a parent's


@triton.jit(do_not_specialize=["frames"])
def recurrence_paged(
    q, k, v, g, rates, beta, offsets, load_blocks, store_rows, store_blocks, store_starts, states, out,
    frames, heads, group, depth, width, scale,
    stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, stride_f, stride_fh, stride_fk,
    WEIGHTED: tl.constexpr, DELTA: tl.constexpr, KEYED: tl.constexpr, RATED: tl.constexpr, HEADS: tl.constexpr,
    DEPTH: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Segment ``program_id(0)``; its saves are store_starts[s] to [s + 1].

    A frame that does not exist is read as zeros and not written.
    """
    s, unit = tl.program_id(0), tl.program_id(1).to(tl.int64)
    row, lane = tl.arange(0, DEPTH), tl.program_id(2) * COLUMNS + tl.arange(0, COLUMNS)
    head, key_head, column, lanes = lanes_of(unit, lane, group, width, HEADS)
    row_in, lane_in = row < depth, lane < lanes
    inside = row_in[:, None] & lane_in[None, :]
    shift, within = states_of(unit, head, row, column, stride_fh, stride_fk, HEADS)  # one takes less than 2^31 elements
    states += shift
    rate = rates_of(rates, head, depth, row, inside, RATED, HEADS)
    source = tl.load(load_blocks + s)
    held = if_held(source, frames, row, lane, depth, lanes)
    state = tl.load(states + tl.maximum(source, 0) * stride_f + within, mask=held, other=0.0)
    tl.debug_barrier()  # all of it is read before any of it may be written
    save, last = tl.load(store_starts + s), tl.load(store_starts + s + 1)
    for t in range(tl.load(offsets + s), tl.load(offsets + s + 1)):
        state = token(
            state, q, k, v, g, rate, beta, out, t, head, key_head, column, heads, row, row_in, inside, lane_in, scale,
            stride_q, stride_qh, stride_k, stride_kh, stride_v, stride_vh, depth, width,
            WEIGHTED, DELTA, KEYED, RATED, HEADS,
        )  # fmt: skip
        while (save < last) & (tl.load(store_rows + save, mask=save < last, other=-1) == t):
            frame = tl.load(store_blocks + save)
            kept = if_held(frame, frames, row, lane, depth, lanes)
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


def check_strides(depth: int, states: Tensor) -> None:
    """ToolkitError for paged states of K = ``depth`` whose heads 32 bits do not count."""
    if depth * states.stride(2) >= 2**31:
        raise ToolkitError(
            f"A head of states must span less than 2^31 elements in Triton, got strides {list(states.stride())}."
        )


class Layout(NamedTuple):
    """How the states of a call are split: the tile, blocks of lanes, and the constants that say what a lane is.

    Args:
        units: what has lanes: heads, or key heads.
        lanes: of a unit: columns of a head, or heads of a key head.
        tile: of a program.
        options: constants of the kernels.
    """

    units: int
    lanes: int
    tile: GemmTile
    options: dict[str, Any]

    @classmethod
    def choose(
        cls, op: str, q: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, rates: Tensor | None, backward: bool = False
    ) -> "Layout":
        """Lanes are heads where a column would be one number and keys have separate decays."""
        (_, heads, width), (key_heads, depth) = v.shape, q.shape[1:]
        in_heads = width == 1 and (rates is not None or g.dim() == 3)
        units, lanes = (key_heads, heads // key_heads) if in_heads else (heads, width)
        arch = triton_devices.architecture(q.device)
        shape = tile(op, arch, depth, lanes, backward=backward, heads=in_heads)
        options = {
            "WEIGHTED": beta is not None,
            "KEYED": g.dim() == 3,
            "RATED": rates is not None,
            "HEADS": in_heads,
            "DEPTH": shape.rows,
            "COLUMNS": shape.columns,
        }
        return cls(units, lanes, shape, options | shape.options())

    @property
    def blocks(self) -> int:
        """Blocks of lanes of a unit."""
        return blocks(self.lanes, self.tile.columns)


def linear_recurrence(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, parents: Tensor,
    initial: Tensor | None, scale: float, delta: bool, keep: bool, rates: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """``toolkit::linear_recurrence``: float32, bfloat16 or float16, K up to 256."""
    triton_devices.check_dtype("linear_recurrence", q.dtype)
    (tokens, heads, width), depth, segments = v.shape, k.shape[2], parents.shape[0]
    layout = Layout.choose("linear_recurrence", q, v, g, beta, rates)
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)  # rows of padding stay as they are
    finals = torch.empty(segments, heads, depth, width, dtype=torch.float32, device=q.device)
    kept = torch.zeros(tokens // CHUNK if keep else 0, *finals.shape[1:], dtype=torch.float32, device=q.device)
    if finals.numel():
        q, k, v, g = unit(q), unit(k), unit(v), g.contiguous()
        order, starts = groups(parents, None)
        recurrence_forward[(segments, layout.units, layout.blocks)](
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
            DELTA=delta,
            **layout.options,
        )
    return out, finals, kept


def linear_recurrence_paged(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, query_offsets: Tensor, load_blocks: Tensor,
    store_rows: Tensor, store_blocks: Tensor, states: Tensor, scale: float, delta: bool, rates: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """``toolkit::linear_recurrence_paged``: a source that is no frame is taken as zeros, such a target is skipped."""
    triton_devices.check_dtype("linear_recurrence_paged", q.dtype)
    (_, heads, width), depth, segments = v.shape, k.shape[2], load_blocks.shape[0]
    check_strides(depth, states)
    layout = Layout.choose("linear_recurrence_paged", q, v, g, beta, rates)
    out = torch.zeros(v.shape, dtype=v.dtype, device=v.device)
    if segments and heads and width:
        q, k, v, g = unit(q), unit(k), unit(v), g.contiguous()
        query_offsets, store_rows = query_offsets.contiguous(), store_rows.contiguous()
        starts = torch.searchsorted(store_rows, query_offsets)  # of each segment among the saves
        recurrence_paged[(segments, layout.units, layout.blocks)](
            q=q,
            k=k,
            v=v,
            g=g,
            rates=g if rates is None else rates.contiguous(),
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
            DELTA=delta,
            **layout.options,
        )
    return out
