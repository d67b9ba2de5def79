"""Attention over pages in eight bits, in plain torch: the values of the blocks in use, then attention."""

from typing import Any

import torch
from torch import Tensor

from toolkit.ops.attention import reference
from toolkit.ops.int8_rows import int8_values


def attention_int8(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    key_scales: Tensor,
    value_scales: Tensor,
    query_offsets: Tensor,
    kv_lengths: Tensor,
    block_tables: Tensor,
    block_size: int,
    scale: float,
    window: int,
    softcap: float,
    sinks: Tensor | None = None,
    modifier: str = "",
    parameters: Tensor | None = None,
    spans: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """See ``toolkit.ops.attention_int8.attention_int8``."""
    keys, values, tables = values_in_use(q, k, v, key_scales, value_scales, block_tables, block_size)
    plan = query_offsets, kv_lengths, kv_lengths, tables, block_size, scale, window, softcap
    return reference.attention(q, keys, values, *plan, sinks, modifier, parameters, None, spans)


def values_in_use(
    q: Tensor, k: Tensor, v: Tensor, key_scales: Tensor, value_scales: Tensor, block_tables: Tensor, block_size: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values [S P block_size, H, width] of every table's blocks in order, and the tables [S, P] of those.

    Shapes follow from shapes, so that it can be captured on a device.
    """
    known = block_tables.clamp(0, max(0, len(k) // block_size - 1))  # entries that are not read may be anything
    rows = (known[..., None] * block_size + torch.arange(block_size, device=k.device)).flatten()
    keys, values = (int8_values(x[rows], of[rows], q.dtype) for x, of in ((k, key_scales), (v, value_scales)))
    return keys, values, torch.arange(known.numel(), device=k.device).view_as(known)


def attention_int8_fake(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return reference.attention_fake(q, k, v)
