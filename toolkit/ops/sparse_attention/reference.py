"""Attention over listed rows in plain torch, some rows at a time: the specification."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from toolkit.ops.attention.reference import compute_dtype, result_dtype

# Rows whose keys are gathered at a time.
_CHUNK = 32


def _weights(q: Tensor, keys: Tensor, listed: Tensor, scale: float, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    """Weights [rows, Hkv, group, K] and log-sum-exp [rows, Hkv, group] of q [rows, Hkv, group, D]."""
    x = (torch.einsum("tngd,tknd->tngk", q, keys) * scale).masked_fill(~listed[:, None, None], -torch.inf)
    if sinks is not None:
        x = torch.cat([x, sinks.to(x.dtype).view(*q.shape[1:3], 1).expand(*x.shape[:3], 1)], -1)
    empty = (x == -torch.inf).all(-1, keepdim=True)
    lse = x.masked_fill(empty, 0.0).logsumexp(-1, keepdim=True) if x.shape[-1] else x.new_zeros(*x.shape[:-1], 1)
    return torch.exp(x - lse)[..., : listed.shape[1]], lse.masked_fill(empty, -torch.inf)[..., 0]


def _chunks(q: Tensor, k: Tensor, v: Tensor, rows: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Of some rows at a time: which, those of k and v that they list, and which entries of ``rows`` list any."""
    dtype = compute_dtype(q)
    for first in range(0, q.shape[0], _CHUNK):
        own = slice(first, first + _CHUNK)
        listed = rows[own] >= 0
        at = rows[own].clamp_min(0)
        # Masked before they are multiplied: a row that is not listed may be NaN.
        keys, values = (x[at].to(dtype).masked_fill(~listed[..., None, None], 0.0) for x in (k, v))
        yield own, keys, values, listed


def sparse_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Tensor, scale: float, sinks: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """See ``toolkit.ops.sparse_attention.sparse_attention``. Differentiable by autograd."""
    outs, sums = [], []
    heads = k.shape[1], q.shape[1] // k.shape[1]
    if not k.shape[0]:
        rows = rows[:, :0]
    for own, keys, values, listed in _chunks(q, k, v, rows):
        weights, lse = _weights(q[own].to(keys.dtype).unflatten(1, heads), keys, listed, scale, sinks)
        outs.append(torch.einsum("tngk,tknv->tngv", weights, values).flatten(1, 2).to(q.dtype))
        sums.append(lse.flatten(1, 2).to(result_dtype(q)))
    outs.append(q.new_empty(0, q.shape[1], v.shape[2]))
    sums.append(q.new_empty(0, q.shape[1], dtype=result_dtype(q)))
    return torch.cat(outs), torch.cat(sums)


def sparse_attention_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With P = exp(s - lse), dP = grad v^T and delta = rowsum(grad * out): ds = P (dP - delta), dq = scale ds k,
    dk = scale ds^T q, dv = P^T grad, dsinks = -sum_rows exp(sinks - lse) delta."""
    dtype, heads = compute_dtype(q), (k.shape[1], q.shape[1] // k.shape[1])
    dq, dk, dv = (torch.zeros(x.shape, dtype=dtype, device=x.device) for x in (q, k, v))
    dsinks = q.new_zeros(0 if sinks is None else q.shape[1], dtype=dtype)
    if not k.shape[0]:
        rows = rows[:, :0]
    for own, keys, values, listed in _chunks(q, k, v, rows):
        query, g = (x[own].to(dtype).unflatten(1, heads) for x in (q, grad))
        weights, total = _weights(query, keys, listed, scale, sinks)
        delta = (g * out[own].to(dtype).unflatten(1, heads)).sum(-1)
        ds = weights * (torch.einsum("tngv,tknv->tngk", g, values) - delta[..., None]) * scale
        dq[own] = torch.einsum("tngk,tknd->tngd", ds, keys).flatten(1, 2)
        at = rows[own][listed]
        dk.index_put_((at,), torch.einsum("tngk,tngd->tknd", ds, query)[listed], accumulate=True)
        dv.index_put_((at,), torch.einsum("tngk,tngv->tknv", weights, g)[listed], accumulate=True)
        if sinks is not None:
            share = torch.exp(sinks.to(dtype).view(heads) - total).masked_fill(total == -torch.inf, 0.0)
            dsinks -= (share * delta).flatten(1, 2).sum(0)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype), dsinks.to(q.dtype if sinks is None else sinks.dtype)


def sparse_attention_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape[0], q.shape[1], v.shape[2]), q.new_empty(q.shape[:2], dtype=result_dtype(q))


def sparse_attention_backward_fake(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, out: Tensor, lse: Tensor, scale: float,
    sinks: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    dsinks = q.new_empty(0) if sinks is None else sinks.new_empty(sinks.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dsinks
