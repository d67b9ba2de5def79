"""Attention whose scores have a bias by how far a key lies back, another one for each query (Inkling).

A bias is a product too: a query that has its biases in R further columns, in the order of the keys' positions modulo
R, meets keys whose further columns are 1 at theirs. Keys at least R tokens back have no bias: they are a second set,
whose output is put beside the first by their log-sum-exps.
Shapes: T new tokens, Hq query heads, H heads, D width, V value width, R distances.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from toolkit.state.context import AttentionSettings

Attend = Callable[[Tensor, Tensor, Tensor, int, int], tuple[Tensor, Tensor]]
"""(out, lse) of queries, keys and values, with a window, and without the last tokens before each query."""


def biased_attention(
    attend: Attend, q: Tensor, k: Tensor, v: Tensor, settings: AttentionSettings, bias: Tensor, sinks: Tensor | None,
    position: Tensor,
) -> Tensor:  # fmt: skip
    """[T, Hq, V].

    Args:
        attend: attention over the batch's keys.
        q: [T, Hq, D].
        k: [T, H, D].
        v: [T, H, V].
        settings: scale and window are read.
        bias: [T, Hq, R] by distance.
        sinks: [T, Hq] a logit for each query, which takes part in the denominator alone; None for none.
        position: [T] of the new tokens in their sequences.
    """
    extent = bias.shape[-1]
    distance = (position[:, None] - torch.arange(extent, device=q.device)) % extent
    placed = bias.gather(-1, distance[:, None].expand_as(bias)) / settings.scale
    mark = F.one_hot(position % extent, extent).to(k.dtype)
    keys = torch.cat([k, mark[:, None].expand(-1, k.shape[1], -1)], -1)
    near = settings.window or extent
    parts = [attend(torch.cat([q, placed.to(q.dtype)], -1), keys, v, min(near, extent), 0)]
    if near > extent or not settings.window:
        window = max(settings.window - extent, 0)
        parts.append(attend(torch.cat([q, torch.zeros_like(placed, dtype=q.dtype)], -1), keys, v, window, extent))
    logs = [lse for _, lse in parts] + ([] if sinks is None else [sinks.to(parts[0][1].dtype)])
    most = logs[0].detach()
    for one in logs[1:]:
        most = torch.maximum(most, one.detach())
    shares = [(one - most).exp() for one in logs]
    total = shares[0]
    for share in shares[1:]:
        total = total + share
    result = parts[0][0] * (shares[0] / total)[..., None]
    for (out, _), share in zip(parts[1:], shares[1:]):
        result = result + out * (share / total)[..., None]
    return result.to(q.dtype)
