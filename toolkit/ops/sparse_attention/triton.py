"""Attention over listed rows in Triton. Forward: the attention kernel, with a sequence per row of queries whose block
table is its list. Backward: dq by attention's kernel likewise, dk and dv by one that walks, for each row of keys, the
queries that list it in ascending order. No atomics.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from toolkit.ops.attention import tiles as attention_tiles
from toolkit.ops.attention.triton import attention
from toolkit.ops.attention.triton_backward import attention_backward_queries, backward_sizes
from toolkit.ops.attention.triton_common import check, query_grid, rows_contiguous
from toolkit.ops.sparse_attention import tiles


def _plan(q: torch.Tensor, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """(query_offsets, kv_lengths) of a sequence per row."""
    return torch.arange(q.shape[0] + 1, device=q.device), (rows >= 0).sum(1)


def sparse_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``toolkit::sparse_attention`` on a GPU (or on CPU tensors in Triton's interpreter)."""
    offsets, counts = _plan(q, rows)
    if not rows.shape[1]:
        rows = torch.zeros(q.shape[0], 1, dtype=torch.int64, device=q.device)
    return attention(q, k, v, offsets, counts, counts, rows, 1, scale, 0, 0.0, sinks)


@triton.jit
def sparse_attention_keys(
    grad, q, k, v, lse, delta, dk, dv, order, starts, list_width, scale,
    stride_gt, stride_gh, stride_qt, stride_qh, stride_kt, stride_kh, stride_vt, stride_vh, stride_lt,
    stride_dkt, stride_dvt,
    HEAD_DIM: tl.constexpr, V_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_V: tl.constexpr,
    GROUP: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """dk and dv of one row of keys and one head: order[starts[row] ...] are the entries of lists that name it."""
    row = tl.program_id(0).to(tl.int64)
    kv_head = tl.program_id(1)
    d = tl.arange(0, BLOCK_D)
    e = tl.arange(0, BLOCK_V)
    own_k = tl.load(k + row * stride_kt + kv_head * stride_kh + d, mask=d < HEAD_DIM, other=0.0).to(tl.float32)
    own_v = tl.load(v + row * stride_vt + kv_head * stride_vh + e, mask=e < V_DIM, other=0.0).to(tl.float32)
    to_k = tl.zeros([BLOCK_D], tl.float32)
    to_v = tl.zeros([BLOCK_V], tl.float32)
    for entry in range(tl.load(starts + row), tl.load(starts + row + 1)):
        query = tl.load(order + entry) // list_width
        for first in range(0, GROUP, HEADS):
            member = first + tl.arange(0, HEADS)
            ok = member < GROUP
            head = kv_head * GROUP + member
            asked = tl.load(
                q + query * stride_qt + head[:, None] * stride_qh + d[None, :],
                mask=ok[:, None] & (d < HEAD_DIM)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            g = tl.load(
                grad + query * stride_gt + head[:, None] * stride_gh + e[None, :],
                mask=ok[:, None] & (e < V_DIM)[None, :], other=0.0,
            ).to(tl.float32)  # fmt: skip
            log_sum = tl.load(lse + query * stride_lt + head, mask=ok, other=0.0)
            mean = tl.load(delta + query * stride_lt + head, mask=ok, other=0.0)
            score = tl.sum(asked * own_k[None, :], 1) * scale
            weight = tl.where(ok, tl.math.exp2((score - log_sum) * 1.4426950408889634), 0.0)
            grad_score = weight * (tl.sum(g * own_v[None, :], 1) - mean) * scale
            to_v += tl.sum(weight[:, None] * g, 0)
            to_k += tl.sum(grad_score[:, None] * asked, 0)
    tl.store(dk + row * stride_dkt + kv_head * HEAD_DIM + d, to_k, mask=d < HEAD_DIM)
    tl.store(dv + row * stride_dvt + kv_head * V_DIM + e, to_v, mask=e < V_DIM)


def sparse_attention_backward(
    grad: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rows: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``toolkit::sparse_attention_backward`` on a GPU (or on CPU tensors in Triton's interpreter)."""
    check(q, k, v)
    grad, q, k, v, out, lse = (rows_contiguous(x) for x in (grad, q, k, v, out, lse))
    lse = lse.contiguous()
    dq = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    dsinks = q.new_zeros(0) if sinks is None else torch.zeros_like(sinks)
    if q.numel() == 0 or k.numel() == 0 or rows.numel() == 0:
        return dq.zero_(), torch.zeros_like(k), torch.zeros_like(v), dsinks
    dk = torch.empty(k.shape, dtype=k.dtype, device=k.device)
    dv = torch.empty(v.shape, dtype=v.dtype, device=v.device)
    delta = torch.empty_like(lse)
    offsets, counts = _plan(q, rows)
    shared: dict[str, Any] = {
        "grad": grad,
        "q": q,
        "k": k,
        "v": v,
        "lse": lse,
        "delta": delta,
        "scale": scale,
        "stride_gt": grad.stride(0),
        "stride_gh": grad.stride(1),
        "stride_qt": q.stride(0),
        "stride_qh": q.stride(1),
        "stride_kt": k.stride(0),
        "stride_kh": k.stride(1),
        "stride_vt": v.stride(0),
        "stride_vh": v.stride(1),
        "stride_lt": lse.stride(0),
    }
    sizes = backward_sizes(q, k, v, attention_tiles.BACKWARD_QUERIES)
    attention_backward_queries[query_grid(q, k.shape[1], q.shape[0], sizes)](
        **shared,
        out=out,
        dq=dq,
        positions=torch.empty(q.shape[0], dtype=torch.int32, device=q.device),
        query_offsets=offsets,
        kv_offsets=counts,
        kv_lengths=counts,
        block_tables=rows,
        parameters=q,
        spans=rows,
        num_sequences=q.shape[0],
        num_rows=q.shape[0],
        window=0,
        softcap=0.0,
        stride_ot=out.stride(0),
        stride_oh=out.stride(1),
        stride_dt=dq.stride(0),
        stride_table=rows.stride(0),
        PAGE=1,
        WINDOWED=False,
        CAPPED=False,
        BOTH=None,
        MASK=None,
        FIRST=None,
        PARAMETERS=0,
        SPANNED=False,
        **sizes,
    )
    # Entries of all lists by the row that they name, in the order of queries; those that name none come last.
    named = torch.where(rows < 0, k.shape[0], rows).flatten()
    ranked, order = named.sort(stable=True)
    starts = torch.searchsorted(ranked, torch.arange(k.shape[0] + 1, device=k.device))
    tile = tiles.KEYS
    sparse_attention_keys[(k.shape[0], k.shape[1])](
        **shared,
        dk=dk,
        dv=dv,
        order=order,
        starts=starts,
        list_width=rows.shape[1],
        stride_dkt=dk.stride(0),
        stride_dvt=dv.stride(0),
        HEAD_DIM=q.shape[-1],
        V_DIM=v.shape[-1],
        BLOCK_D=max(16, triton.next_power_of_2(q.shape[-1])),
        BLOCK_V=max(16, triton.next_power_of_2(v.shape[-1])),
        GROUP=q.shape[1] // k.shape[1],
        HEADS=tile.heads,
        num_warps=tile.warps,
        enable_fp_fusion=False,
    )
    if sinks is not None:
        share = torch.exp(sinks.float() - lse).masked_fill(counts[:, None] == 0, 0.0)
        dsinks = -(share * torch.where(counts[:, None] == 0, 0.0, delta)).sum(0).to(sinks.dtype)
    return dq, dk, dv, dsinks
