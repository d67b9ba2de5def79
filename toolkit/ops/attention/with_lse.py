"""Attention whose log-sum-exp has a gradient too: what outputs over several sets of keys are put together by."""

from typing import Any

import torch
from torch import Tensor

from toolkit.ops.attention import attention, attention_backward


class _WithLse(torch.autograd.Function):
    """ds = P (dP - delta + dlse): a column of zeros in v, and of -dlse beside the output, take dlse into delta."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, plan: Any, scale: float, window: int) -> Any:
        offsets, begins, lengths, tables, block_size = plan
        out, lse = attention(q, k, v, offsets, begins, lengths, tables, block_size, scale, window)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.settings = plan, scale, window
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        grad, grad_lse = grads
        q, k, v, out, lse = ctx.saved_tensors
        (offsets, begins, lengths, tables, block_size), scale, window = ctx.settings
        one = torch.ones_like(grad[..., :1])
        grad = torch.cat([grad, one], -1)
        out = torch.cat([out, -grad_lse[..., None].to(out.dtype)], -1)
        values = torch.cat([v, torch.zeros_like(v[..., :1])], -1)
        found = attention_backward(
            grad, q, k, values, out, lse, offsets, begins, lengths, scale, window, 0.0, tables, block_size
        )
        return found[0], found[1], found[2][..., :-1], None, None, None


def attention_with_lse(
    q: Tensor, k: Tensor, v: Tensor, plan: tuple[Tensor, Tensor, Tensor, Tensor | None, int], scale: float, window: int
) -> tuple[Tensor, Tensor]:
    """``attention`` without sinks, caps and modifiers: (out, lse), both with gradients to q, k and v.

    Args:
        q: [T, Hq, D].
        k: [rows, Hkv, D].
        v: [rows, Hkv, Dv].
        plan: query_offsets, kv_offsets, kv_lengths, block_tables and block_size.
        scale: of the scores.
        window: sliding window in keys; 0 for none.
    """
    found: tuple[Tensor, Tensor] = _WithLse.apply(q, k, v, plan, scale, window)  # type: ignore[no-untyped-call]
    return found
