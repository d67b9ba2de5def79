"""Attention in plain torch, one sequence at a time: the specification.

On the CPU the arithmetic is float64 and each result is rounded once, so that a row of float32 almost never
depends on the rows computed beside it (about one value in 10^8 does: a GEMM is free to change its
reduction order with its shape). Exact row invariance is what the native kernel gives. Elsewhere float32 is used.
"""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.attention.modifiers import find


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the reference calculates in: float64 on the CPU and for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 or x.device.type == "cpu" else torch.float32


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of lse: float64 for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def key_rows(sequence: int, keys: Tensor, kv_offset: int, block_tables: Tensor | None, block_size: int) -> Tensor:
    """Row numbers in k and v of keys of a sequence."""
    if block_tables is None:
        return keys + kv_offset
    return block_tables[sequence, keys // block_size] * block_size + keys % block_size


def check_spans(spans: Tensor, positions: Tensor, length: int, window: int) -> None:
    """ToolkitError unless spans hold their queries and leave what a query sees one run whose ends never fall."""
    first, end = spans.unbind(1)
    given = first < end
    outside = given & ((first < 0) | (first > positions) | (end <= positions))
    begins = (positions - window + 1).clamp_min(0) if window > 0 else torch.zeros_like(positions)
    begins = torch.where(given, torch.minimum(begins, first), begins)
    ends = torch.where(given, torch.maximum(positions + 1, end.clamp_max(length)), positions + 1).clamp_min(0)
    falls = (begins.diff() < 0) | (ends.diff() < 0)
    if bool(outside.any()) or bool(falls.any()):
        row = int(outside.nonzero()[0]) if bool(outside.any()) else int(falls.nonzero()[0]) + 1
        raise ToolkitError(
            "spans must hold the position of their row, and neither end of what rows see may fall within a sequence, "
            f"got keys {int(first[row])} to {int(end[row])} at position {int(positions[row])}."
        )


class _Sequence:
    """The positions of a sequence's queries, and of the keys that they may see."""

    def __init__(
        self,
        queries: int,
        length: int,
        window: int,
        modifier: str,
        parameters: Tensor | None,
        spans: Tensor | None,
        like: Tensor,
    ) -> None:
        self.modifier, self.own = find(modifier), []
        if parameters is not None:
            self.own = [column[:, None, None] for column in parameters.to(like.device, compute_dtype(like)).unbind(1)]
        first = max(0, length - queries - window + 1) if window > 0 else 0
        if self.modifier is not None and self.modifier.first is not None and queries:
            bounds = self.modifier.first(torch.tensor(length - queries, device=like.device), *self.own)
            first = max(first, int(bounds.min()))
        query = torch.arange(length - queries, length, device=like.device)[:, None]
        spans = spans if queries else None
        if spans is not None:
            check_spans(spans, query[:, 0], length, window)
            with_span = spans[:, 0] < spans[:, 1]
            first = min(first, int(torch.where(with_span, spans[:, 0], length).min()))
        self.keys = torch.arange(min(first, length) if queries else length, length, device=like.device)
        key = self.keys[None, :]
        self.positions = query, key
        self.seen = (key <= query) & (key > query - window) if window > 0 else key <= query
        if self.modifier is not None and self.modifier.visible is not None:
            self.seen = self.seen & self.modifier.visible(query, key, *self.own)
        if spans is not None:
            self.seen = self.seen | (key >= spans[:, :1]) & (key < spans[:, 1:])

    def scores(self, q: Tensor, k: Tensor, scale: float, softcap: float) -> tuple[Tensor, Tensor]:
        """[heads, queries, keys] of q [queries, heads, D] and k [keys, heads, D], before and after the modifier."""
        s = torch.einsum("qhd,khd->hqk", q, k) * scale
        s = softcap * torch.tanh(s / softcap) if softcap > 0 else s
        if self.modifier is None or self.modifier.score is None:
            return s, s
        return s, self.modifier.score(s, *self.positions, *self.own)

    def score_mod_backward(self, ds: Tensor, s: Tensor) -> Tensor:
        """The gradient of what goes into the modifier, from that of what comes out."""
        if self.modifier is None or self.modifier.derivative is None:
            return ds
        return torch.where(ds == 0, 0.0, ds * self.modifier.derivative(s, *self.positions, *self.own))


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    kv_offsets: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor | None,
    block_size: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    modifier: str = "",
    parameters: Tensor | None = None,
    query_ranges: Tensor | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``toolkit.ops.attention.attention``. Differentiable by autograd, also through block tables."""
    group = q.shape[1] // k.shape[1]
    dtype = compute_dtype(q)
    outs, sums = [], []
    ends = query_offsets.tolist()
    begins = kv_lengths.tolist() if block_tables is not None else kv_offsets.tolist()
    for s, length in enumerate(kv_lengths.tolist()):
        queries = ends[s + 1] - ends[s]
        own_spans = None if spans is None else spans[ends[s] : ends[s + 1]]
        plan = _Sequence(queries, length, window, modifier, parameters, own_spans, q)
        rows = key_rows(s, plan.keys, begins[s], block_tables, block_size)
        keys = k[rows].to(dtype).repeat_interleave(group, 1)
        values = v[rows].to(dtype).repeat_interleave(group, 1)
        x = plan.scores(q[ends[s] : ends[s + 1]].to(dtype), keys, scale, softcap)[1].masked_fill(~plan.seen, -torch.inf)
        if sinks is not None:
            x = torch.cat([x, sinks.to(dtype)[:, None, None].expand(-1, queries, 1)], -1)
        fully_masked = (x == -torch.inf).all(-1, keepdim=True)
        lse = (
            x.masked_fill(fully_masked, 0.0).logsumexp(-1, keepdim=True)
            if x.shape[-1]
            else x.new_zeros(*x.shape[:2], 1)
        )
        weights = torch.exp(x - lse)[..., : len(rows)]
        outs.append(torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype))
        sums.append(lse.masked_fill(fully_masked, -torch.inf)[..., 0].T.to(result_dtype(q)))
    padding = q.shape[0] - ends[-1]
    outs.append(q.new_zeros(padding, q.shape[1], v.shape[2]))
    sums.append(q.new_full((padding, q.shape[1]), -torch.inf, dtype=result_dtype(q)))
    return torch.cat(outs), torch.cat(sums)


def attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    query_offsets: Tensor,
    kv_offsets: Tensor,
    kv_lengths: Tensor,
    scale: float,
    window: int,
    softcap: float,
    block_tables: Tensor | None = None,
    block_size: int = 0,
    sinks: Tensor | None = None,
    modifier: str = "",
    parameters: Tensor | None = None,
    query_ranges: Tensor | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and sinks, by the formulas in ``toolkit.ops.attention.attention``."""
    group = q.shape[1] // k.shape[1]
    dtype = compute_dtype(q)
    dq = torch.zeros_like(q, dtype=dtype, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(k, dtype=dtype, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(v, dtype=dtype, memory_format=torch.contiguous_format)
    dsinks = q.new_zeros(0 if sinks is None else q.shape[1], dtype=dtype)
    ends = query_offsets.tolist()
    begins = kv_lengths.tolist() if block_tables is not None else kv_offsets.tolist()
    for s, (start, length) in enumerate(zip(begins, kv_lengths.tolist())):
        own = slice(ends[s], ends[s + 1])
        own_spans = None if spans is None else spans[own]
        plan = _Sequence(ends[s + 1] - ends[s], length, window, modifier, parameters, own_spans, q)
        rows = key_rows(s, plan.keys, start, block_tables, block_size)
        keys = k[rows].to(dtype).repeat_interleave(group, 1)
        values = v[rows].to(dtype).repeat_interleave(group, 1)
        queries, gradient, log_sum = q[own].to(dtype), grad[own].to(dtype), lse[own].to(dtype).T[..., None]
        given, x = plan.scores(queries, keys, scale, softcap)
        hidden = ~plan.seen | (x == -torch.inf)
        weights = torch.exp(x - log_sum).masked_fill(hidden, 0.0)
        delta = (gradient * out[own].to(dtype)).sum(-1).T[..., None]
        ds = weights * (torch.einsum("qhd,khd->hqk", gradient, values) - delta) * scale
        ds = plan.score_mod_backward(ds.masked_fill(hidden, 0.0), given)
        if softcap > 0:
            ds = ds * (1 - (given / softcap) ** 2)
        dq[own] = torch.einsum("hqk,khd->qhd", ds, keys)
        heads = k.shape[1], group
        dk.index_add_(0, rows, torch.einsum("hqk,qhd->khd", ds, queries).unflatten(1, heads).sum(2))
        dv.index_add_(0, rows, torch.einsum("hqk,qhd->khd", weights, gradient).unflatten(1, heads).sum(2))
        if sinks is not None:
            share = torch.exp(sinks.to(dtype)[:, None, None] - log_sum).masked_fill(log_sum == -torch.inf, 0.0)
            dsinks -= (share * delta)[..., 0].sum(-1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks.to(q.dtype if sinks is None else sinks.dtype)


def attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    out = q.new_empty(q.shape[0], q.shape[1], v.shape[2])
    return out, q.new_empty(q.shape[0], q.shape[1], dtype=result_dtype(q))


def attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sinks = rest[10] if len(rest) > 10 else None
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks
