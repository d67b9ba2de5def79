"""Selection of keys in plain torch: the specification. T rows, H heads of the indexer, K selected keys."""

import torch
from torch import Tensor

from toolkit.ops.attention.reference import compute_dtype, key_rows

# Rows whose scores are held at a time.
_CHUNK = 64


def index_scores(q: Tensor, k: Tensor, weights: Tensor, scale: float) -> Tensor:
    """[rows, keys] scores of q [rows, H, D] with k [keys, D], or k [rows, keys, D]: each row's own."""
    products = torch.einsum("thd,jd->thj" if k.dim() == 2 else "thd,tjd->thj", q, k) * scale
    return (weights[..., None] * products.clamp_min(0)).sum(1)


def select_keys(
    q: Tensor,
    k: Tensor,
    weights: Tensor,
    query_offsets: Tensor,
    kv_offsets: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor | None,
    block_size: int,
    topk: int,
    width: int,
    scale: float,
) -> Tensor:
    """See ``toolkit.ops.select_keys.select_keys``."""
    dtype = compute_dtype(q)
    out = torch.full((q.shape[0], width), -1, dtype=torch.int64, device=q.device)
    ends = query_offsets.tolist()
    begins = kv_lengths.tolist() if block_tables is not None else kv_offsets.tolist()
    for s, length in enumerate(kv_lengths.tolist()):
        shift = length - (ends[s + 1] - ends[s])
        keys = torch.arange(length, device=q.device)
        values = k[key_rows(s, keys, begins[s], block_tables, block_size)].to(dtype)
        for first in range(ends[s], ends[s + 1], _CHUNK):
            last = min(first + _CHUNK, ends[s + 1])
            scores = index_scores(q[first:last].to(dtype), values, weights[first:last].to(dtype), scale)
            scores = torch.where(scores.isnan(), -torch.inf, scores)
            position = torch.arange(first, last, device=q.device)[:, None] - ends[s] + shift
            hidden = keys > position
            # Hidden keys rank behind all others, those of -inf included: first by score, then by whether they are seen.
            order = torch.sort(scores.masked_fill(hidden, -torch.inf), dim=-1, descending=True, stable=True).indices
            order = order.gather(-1, torch.sort(hidden.gather(-1, order).int(), dim=-1, stable=True).indices)
            chosen = order[:, :width]
            chosen = chosen.masked_fill(hidden.gather(-1, chosen), length).sort(-1).values
            out[first:last, : chosen.shape[1]] = chosen.masked_fill(chosen == length, -1)
    return out


def select_keys_fake(q: Tensor, k: Tensor, weights: Tensor, query_offsets: Tensor, *rest: object) -> Tensor:
    width = rest[5]
    assert isinstance(width, (int, torch.SymInt))
    return query_offsets.new_empty(q.shape[0], width)
