"""Attention over paged keys and values in eight bits."""

import torch
from torch import Tensor

from toolkit.errors import ToolkitError
from toolkit.ops.attention import check_options
from toolkit.ops.attention_int8 import reference
from toolkit.ops.registry import Op, register

__all__ = ["attention_int8"]

_OP: Op[tuple[Tensor, Tensor]] = register(
    "attention_int8(Tensor q, Tensor k, Tensor v, Tensor key_scales, Tensor value_scales, Tensor query_offsets,"
    " Tensor kv_lengths, Tensor block_tables, int block_size, float scale, int window, float softcap,"
    " Tensor? sinks=None, str modifier='', Tensor? parameters=None, Tensor? spans=None) -> (Tensor out, Tensor lse)",
    reference=reference.attention_int8,
    fake=reference.attention_int8_fake,
    triton="toolkit.ops.attention_int8.triton.attention_int8",
)


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
    scale: float | None = None,
    window: int = 0,
    softcap: float = 0.0,
    sinks: Tensor | None = None,
    modifier: str = "",
    parameters: Tensor | None = None,
    spans: Tensor | None = None,
    *,
    impl: str | None = None,
) -> tuple[Tensor, Tensor]:
    """``attention`` of keys ``int8_values(k, key_scales, q.dtype)``, and values likewise: (out, lse).

    Args:
        q: [T, Hq, D]; float32, float64, bfloat16 or float16.
        k: [slots, Hkv, D] int8.
        v: [slots, Hkv, Dv] int8.
        key_scales, value_scales: [slots, Hkv, 1] float32.
        query_offsets: [S + 1] int64, as in ``attention``.
        kv_lengths: [S] int64.
        block_tables: [S, P] int64.
        block_size: keys per block.
        scale, window, softcap, sinks, modifier, parameters, spans: as in ``attention``.
        impl: None (by device), "reference", "cpu" or "triton".

    Returns:
        out: [T, Hq, Dv] in q's dtype.
        lse: [T, Hq]; float64 for float64, else float32.

    Raises:
        ToolkitError: as ``attention``; for a q that requires a gradient.
        RuntimeError: from the kernel for shapes, dtypes or indices that do not fit.

    Numerics: bitwise identical to ``attention`` over the values: (code * scale) in float32, rounded to q's dtype. The
    CPU makes them tile by tile; a GPU those of all blocks in the tables, once for the call. No gradient.
    """
    if q.requires_grad and torch.is_grad_enabled():
        raise ToolkitError("attention_int8 has no gradient: q must not require one, got requires_grad=True.")
    check_options(q, sinks, modifier, parameters, spans)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    plan = query_offsets, kv_lengths, block_tables, block_size
    options = sinks, modifier, parameters, spans
    return _OP.select(impl)(q, k, v, key_scales, value_scales, *plan, scale, window, softcap, *options)
