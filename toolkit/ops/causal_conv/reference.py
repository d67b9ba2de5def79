"""Short depthwise causal convolutions over a prefix tree of segments in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.rowwise import compute_dtype, elementwise, upcast
from toolkit.ops.state_write.reference import state_write


def _sources(query_offsets: Tensor, past: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Which row each token reads at each tap, [T, W], and which tokens are of a segment, [T].

    ``past`` [S, W - 1] names what lies before a segment. Without a synchronisation between host and device.
    """
    taps = past.shape[1] + 1
    token = torch.arange(rows, device=past.device)
    inside = token < query_offsets[-1]
    if past.shape[0] == 0:
        return token[:, None].expand(rows, taps), inside
    segment = (torch.searchsorted(query_offsets, token, right=True) - 1).clamp(0, past.shape[0] - 1)
    first = query_offsets[segment][:, None]
    at = token[:, None] + torch.arange(1 - taps, 1, device=past.device)
    before = (at - first + taps - 1).clamp(0, taps - 2)
    return torch.where(at >= first, at, past[segment[:, None], before]), inside


def _extended_rows(past: Tensor, rows: int, zero: int) -> Tensor:
    """``past`` as rows of [x, tails, one row of zeros]."""
    return torch.where(past >= 0, past, torch.where(past == -1, zero, rows - 2 - past))


def _extended(x: Tensor, tails: Tensor | None) -> Tensor:
    """[x, rows of tails, one row of zeros] in the dtype of the arithmetic."""
    x_up = upcast(x)
    held = [] if tails is None else [tails.to(x_up.dtype).reshape(-1, x.shape[1])]
    return torch.cat([x_up, *held, x_up.new_zeros(1, x.shape[1])])


def _before_activation(extended: Tensor, sources: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    weight_up = weight.to(extended.dtype)
    y = torch.zeros_like(weight_up[:, 0]) if bias is None else bias.to(extended.dtype)
    y = y.expand(sources.shape[0], -1)
    for tap in range(weight.shape[1]):
        y = y + weight_up[:, tap] * extended[sources[:, tap]]
    return y


def _finish(y: Tensor, inside: Tensor, activation: str | None, dtype: torch.dtype) -> Tensor:
    if activation is not None:
        y = elementwise(find(activation, plain=True).value, y.contiguous())
    return torch.where(inside[:, None], y, 0.0).to(dtype)


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, query_offsets: Tensor, past: Tensor, tails: Tensor | None,
    activation: str | None,
) -> Tensor:  # fmt: skip
    """``act(bias + sum_i weight[:, i] x[t - W + 1 + i])``, taps in order. Differentiable."""
    extended = _extended(x, tails)
    past_rows = _extended_rows(past, x.shape[0], extended.shape[0] - 1)
    sources, inside = _sources(query_offsets, past_rows, x.shape[0])
    return _finish(_before_activation(extended, sources, weight, bias), inside, activation, x.dtype)


def causal_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, query_offsets: Tensor, past: Tensor,
    tails: Tensor | None, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, weight, bias and tails (the last two empty where there is none)."""
    extended = _extended(x, tails)
    past_rows = _extended_rows(past, x.shape[0], extended.shape[0] - 1)
    sources, inside = _sources(query_offsets, past_rows, x.shape[0])
    upstream = torch.where(inside[:, None], upcast(grad, x), 0.0)
    if activation is not None:
        before = _before_activation(extended, sources, weight, bias)
        upstream = upstream * elementwise(find(activation, plain=True).derivative, before.contiguous())
    to_rows, to_weight = torch.zeros_like(extended), torch.empty_like(weight, dtype=extended.dtype)
    for tap in range(weight.shape[1]):
        to_rows.index_add_(0, sources[:, tap], upstream * weight[:, tap].to(extended.dtype))
        to_weight[:, tap] = (upstream * extended[sources[:, tap]]).sum(0)
    dx, held = to_rows[: x.shape[0]].to(x.dtype), to_rows[x.shape[0] : -1]
    to_bias = x.new_empty(0) if bias is None else upstream.sum(0).to(bias.dtype)
    to_tails = x.new_empty(0) if tails is None else held.reshape(tails.shape).to(tails.dtype, copy=True)
    return dx, to_weight.to(weight.dtype), to_bias, to_tails


def causal_conv_paged(
    x: Tensor, weight: Tensor, bias: Tensor | None, query_offsets: Tensor, load_blocks: Tensor, store_rows: Tensor,
    store_blocks: Tensor, tails: Tensor, activation: str | None,
) -> Tensor:  # fmt: skip
    """y; writes the frames of ``tails`` that are asked for."""
    rows, held = x.shape[0], tails.shape[1]
    before = (
        tails[load_blocks.clamp(min=0)] if tails.shape[0] else tails.new_zeros(load_blocks.shape[0], *tails.shape[1:])
    )
    extended = _extended(x, before)
    past_rows = rows + torch.arange(load_blocks.shape[0] * held, device=x.device).view(-1, held)
    past_rows = torch.where(load_blocks[:, None] >= 0, past_rows, extended.shape[0] - 1)
    taken, inside = _sources(query_offsets, past_rows, rows)
    y = _finish(_before_activation(extended, taken, weight, bias), inside, activation, x.dtype)
    state_write(tails, extended[taken[store_rows, 1:]], store_blocks)
    return y


def causal_conv_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, query_offsets: Tensor, past: Tensor, tails: Tensor | None,
    activation: str | None,
) -> Tensor:  # fmt: skip
    compute_dtype(x)
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def causal_conv_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, query_offsets: Tensor, past: Tensor,
    tails: Tensor | None, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    def like(y: Tensor | None) -> Tensor:
        return x.new_empty(0) if y is None else torch.empty(y.shape, dtype=y.dtype, device=y.device)

    return like(x), like(weight), like(bias), like(tails)


def causal_conv_paged_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, query_offsets: Tensor, load_blocks: Tensor, store_rows: Tensor,
    store_blocks: Tensor, tails: Tensor, activation: str | None,
) -> Tensor:  # fmt: skip
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)
