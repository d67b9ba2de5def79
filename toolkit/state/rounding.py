"""Keys and values in eight bits: the rounding that pages hold, and that a forward without pages computes too.

Of a row x [D], one token's key or value of one head::

    scale = max |x| / 127            float32
    code = round(x / scale)          int8, half to even; 0 where scale is 0
    value = code * scale             in x's dtype

It is computed row by row with exactly rounded operations, so equal rows have equal codes in any batch. The gradient
goes straight through: that of ``value`` is that of ``x``.
"""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of

KV_CACHE_DTYPES = ("auto", "int8")
"""What keys and values are kept as: the model's dtype, or codes of eight bits."""
AUTO = KV_CACHE_DTYPES[0]
_TINY = torch.finfo(torch.float32).tiny


def checked_kv_dtype(given: str) -> str:
    """``given``. Raises ToolkitError unless it is one of ``KV_CACHE_DTYPES``."""
    if given not in KV_CACHE_DTYPES:
        raise ToolkitError(must_be_one_of("kv_cache_dtype", given, KV_CACHE_DTYPES))
    return given


def int8_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., D] in int8 and scales [..., 1] in float32 of rows [..., D] of any floating dtype."""
    exact = rows.float()
    scales = exact.abs().amax(-1, keepdim=True) / 127
    return (exact / scales.clamp_min(_TINY)).round().to(torch.int8), scales


def int8_values(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [..., D] in ``dtype`` that ``int8_codes`` stands for."""
    return (codes * scales).to(dtype)


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        return int8_values(*int8_codes(rows), rows.dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


def rounded(rows: Tensor) -> Tensor:
    """``rows`` [..., D] as pages of eight bits hold them; its gradient goes straight through."""
    values: Tensor = _Rounded.apply(rows)  # type: ignore[no-untyped-call]
    return values
