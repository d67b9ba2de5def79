"""Attention in plain torch, a sequence at a time: the specification.

On the CPU the arithmetic is float64 and each result is rounded once, so that a row of float32 almost never
depends on the rows computed beside it (about one value in 10^8 does: matrix products are free to change
order with their shape). Exact row invariance is what the native kernel gives. Elsewhere float32 is used.
"""

import torch
from torch import Tensor


def compute_dtype(x: Tensor) -> torch.dtype:
    """What the reference calculates in: float64 on the CPU and for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 or x.device.type == "cpu" else torch.float32


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of lse: float64 for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def key_rows(
    sequence: int,
    length: int,
    kv_offset: int,
    block_tables: Tensor | None,
    page_size: int,
    device: torch.device,
) -> Tensor:
    """[length] row numbers in k and v of the keys of a sequence."""
    keys = torch.arange(length, device=device)
    if block_tables is None:
        return keys + kv_offset
    return block_tables[sequence, keys // page_size] * page_size + keys % page_size


def visible(queries: int, length: int, window: int, device: torch.device) -> Tensor:
    """[queries, length] whether a query sees a key; the queries are the last of the sequence."""
    position = torch.arange(length - queries, length, device=device)[:, None]
    key = torch.arange(length, device=device)[None, :]
    seen = key <= position
    return seen & (key > position - window) if window > 0 else seen


def scores(q: Tensor, k: Tensor, scale: float, softcap: float) -> Tensor:
    """[heads, queries, keys] scaled, capped scores of q [queries, heads, D], k [keys, heads, D]."""
    s = torch.einsum("qhd,khd->hqk", q, k) * scale
    return softcap * torch.tanh(s / softcap) if softcap > 0 else s


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    query_offsets: Tensor,
    kv_offsets: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor | None,
    page_size: int,
    scale: float,
    window: int,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    """See ``toolkit.ops.attention.attention``. Differentiable by autograd, also through block tables."""
    group = q.shape[1] // k.shape[1]
    wide = compute_dtype(q)
    outs, sums = [], []
    ends = query_offsets.tolist()
    begins = kv_lengths.tolist() if block_tables is not None else kv_offsets.tolist()
    for s, length in enumerate(kv_lengths.tolist()):
        queries = ends[s + 1] - ends[s]
        rows = key_rows(s, length, begins[s], block_tables, page_size, q.device)
        keys = k[rows].to(wide).repeat_interleave(group, 1)
        values = v[rows].to(wide).repeat_interleave(group, 1)
        x = scores(q[ends[s] : ends[s + 1]].to(wide), keys, scale, softcap)
        seen = visible(queries, length, window, q.device)
        x = x.masked_fill(~seen, -torch.inf)
        lse = x.logsumexp(-1) if length else x.new_full(x.shape[:2], -torch.inf)
        blind = ~seen.any(-1)
        weights = torch.exp(x - lse.masked_fill(blind, 0.0)[..., None])
        outs.append(torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype))
        sums.append(lse.T.to(result_dtype(q)))
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
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of q, k and v, by the formulas in ``toolkit.ops.attention.attention``."""
    group = q.shape[1] // k.shape[1]
    wide = compute_dtype(q)
    dq = torch.zeros_like(q, dtype=wide, memory_format=torch.contiguous_format)
    dk = torch.zeros_like(k, dtype=wide, memory_format=torch.contiguous_format)
    dv = torch.zeros_like(v, dtype=wide, memory_format=torch.contiguous_format)
    ends = query_offsets.tolist()
    for s, (start, length) in enumerate(zip(kv_offsets.tolist(), kv_lengths.tolist())):
        own, rows = slice(ends[s], ends[s + 1]), slice(start, start + length)
        keys = k[rows].to(wide).repeat_interleave(group, 1)
        values = v[rows].to(wide).repeat_interleave(group, 1)
        queries, gradient = q[own].to(wide), grad[own].to(wide)
        x = scores(queries, keys, scale, softcap)
        hidden = ~visible(queries.shape[0], length, window, q.device)
        weights = torch.exp(x - lse[own].to(wide).T[..., None]).masked_fill(hidden, 0.0)
        delta = (gradient * out[own].to(wide)).sum(-1).T[..., None]
        ds = weights * (torch.einsum("qhd,khd->hqk", gradient, values) - delta) * scale
        if softcap > 0:
            ds = ds * (1 - (x / softcap) ** 2)
        dq[own] = torch.einsum("hqk,khd->qhd", ds, keys)
        heads = k.shape[1], group
        dk[rows] += torch.einsum("hqk,qhd->khd", ds, queries).unflatten(1, heads).sum(2)
        dv[rows] += torch.einsum("hqk,qhd->khd", weights, gradient).unflatten(1, heads).sum(2)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
