"""Attention over pages in eight bits on a GPU: the values of the blocks in the tables, then attention's kernel."""

from torch import Tensor

from toolkit.ops.attention import triton as dense
from toolkit.ops.attention_int8.reference import values_in_use

__all__ = ["attention_int8"]


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
    """``toolkit::attention_int8``: bitwise identical to ``attention`` over the values of codes and scales."""
    keys, values, tables = values_in_use(q, k, v, key_scales, value_scales, block_tables, block_size)
    plan = query_offsets, kv_lengths, kv_lengths, tables, block_size
    return dense.attention(q, keys, values, *plan, scale, window, softcap, sinks, modifier, parameters, None, spans)
