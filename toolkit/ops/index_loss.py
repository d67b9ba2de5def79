"""How an indexer learns to score keys as attention weighs them: the divergence between the two, with gradients.

Plain torch, some rows at a time. Shapes: T rows, K listed keys, H heads of the indexer, Hq query heads.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from toolkit.ops.select_keys.reference import index_scores
from toolkit.ops.transforms import first_derivative_only

__all__ = ["attention_distribution", "index_loss"]

# Numbers of gathered keys that are held at a time.
_GATHERED = 1 << 22


def _slices(rows: Tensor, width: int) -> Iterator[slice]:
    step = max(1, _GATHERED // max(1, rows.shape[1] * width))
    for first in range(0, rows.shape[0], step):
        yield slice(first, first + step)


def _upcast(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _add_rows(total: Tensor, index: Tensor, values: Tensor) -> None:
    """total[index] += values in the order of ``index``: where a row occurs more than once, not in any order."""
    if total.is_cuda:
        total.index_put_((index,), values, accumulate=True)  # sorts; index_add_ would add atomically
    else:
        total.index_add_(0, index, values)


@torch.no_grad()
def attention_distribution(q: Tensor, k: Tensor, rows: Tensor, scale: float | None = None) -> Tensor:
    """[T, K] how attention weighs the listed keys: the mean over heads of their softmax, which is 1 in sum.

    Args:
        q: [T, Hq, D].
        k: [rows, Hkv, D]. Query head h uses head h // (Hq / Hkv).
        rows: [T, K] int64 as in ``toolkit.ops.sparse_attention``; entries that list nothing get 0.
        scale: default D ** -0.5.

    Returns:
        float32, float64 for float64. No gradient: it is what an indexer is to learn.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    heads = k.shape[1], q.shape[1] // k.shape[1]
    out = _upcast(q).new_zeros(rows.shape)
    for own in _slices(rows, k.shape[1] * k.shape[2]):
        listed = rows[own] >= 0
        keys = _upcast(k[rows[own].clamp_min(0)]).masked_fill(~listed[..., None, None], 0.0)
        x = torch.einsum("tngd,tknd->tngk", _upcast(q[own]).unflatten(1, heads), keys) * scale
        weights = x.masked_fill(~listed[:, None, None], -torch.inf).softmax(-1)
        out[own] = weights.mean((1, 2)).masked_fill(~listed, 0.0)  # of a row without a list the softmax is NaN
    return out


class _IndexLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, weights: Tensor, rows: Tensor, target: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(q, k, weights, rows, target)
        ctx.scale = scale
        loss = target.new_zeros(rows.shape[0])
        for own in _slices(rows, k.shape[1]):
            p = target[own]
            *_, log_softmax = _scored(q, k, weights, rows, own, scale)
            loss[own] = (torch.xlogy(p, p) - p * log_softmax).sum(-1)
        return loss

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, weights, rows, target = ctx.saved_tensors
        scale = ctx.scale
        dq, dk, dw = (torch.zeros(x.shape, dtype=target.dtype, device=x.device) for x in (q, k, weights))
        for own in _slices(rows, k.shape[1]):
            listed, keys, log_softmax = _scored(q, k, weights, rows, own, scale)
            p = target[own]
            # Of softmax times the sum of the target, which is 0 for a row that lists nothing.
            ds = grad[own, None] * (log_softmax.exp() * p.sum(-1, keepdim=True) - p).masked_fill(~listed, 0.0)
            query, weight = _upcast(q[own]), _upcast(weights[own])
            products = torch.einsum("thd,tjd->thj", query, keys) * scale
            dw[own] = torch.einsum("tj,thj->th", ds, products.clamp_min(0))
            dproducts = torch.where(products > 0, ds[:, None] * weight[..., None], 0.0) * scale
            dq[own] = torch.einsum("thj,tjd->thd", dproducts, keys)
            to_keys = torch.einsum("thj,thd->tjd", dproducts, query)
            _add_rows(dk, rows[own][listed], to_keys[listed])
        found = [dq.to(q.dtype), dk.to(k.dtype), dw.to(weights.dtype)]
        dq, dk, dw = first_derivative_only("index_loss", found, [grad])
        return dq, dk, dw, None, None, None


def _scored(
    q: Tensor, k: Tensor, weights: Tensor, rows: Tensor, own: slice, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Of some rows: which entries list a key, the keys [rows, K, D], and the log-softmax of scores, 0 elsewhere."""
    listed = rows[own] >= 0
    keys = _upcast(k[rows[own].clamp_min(0)]).masked_fill(~listed[..., None], 0.0)
    scores = index_scores(_upcast(q[own]), keys, _upcast(weights[own]), scale)
    log_softmax = scores.masked_fill(~listed, -torch.inf).log_softmax(-1)
    return listed, keys, log_softmax.masked_fill(~listed, 0.0)


def index_loss(
    q: Tensor, k: Tensor, weights: Tensor, rows: Tensor, target: Tensor, scale: float | None = None
) -> Tensor:
    """[T] KL(target || softmax of the indexer's scores) over each row's listed keys, in nats, with gradients.

    With I_j the score of ``toolkit.ops.select_keys`` and p the target::

        loss = sum_j p_j (log p_j - log softmax(I)_j)

    Args:
        q: [T, H, D] queries of the indexer.
        k: [rows, D] its keys.
        weights: [T, H] its weights.
        rows: [T, K] int64 rows of k, as in ``toolkit.ops.sparse_attention``. With every key that a row sees, this is
            the loss of the dense warm-up.
        target: [T, K] distribution over them (``attention_distribution``); no gradient.
        scale: of the scores; default D ** -0.5.

    Returns:
        [T] float32, float64 for float64; 0 for a row that lists nothing.

    Numerics: computed in float32 at least. The gradient of a key is summed in the order of rows. An indexer is trained
    by this loss alone: hand it hidden states without their graph.
    Source: DeepSeek-AI 2025, DeepSeek-V3.2-Exp (training of the lightning indexer).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    loss: Tensor = _IndexLoss.apply(q, k, weights, rows, target.detach(), scale)  # type: ignore[no-untyped-call]
    return loss
