"""Keys and values in eight bits: the rounding that pages hold, and that a forward without pages computes too.

The row of one token and head is rounded as ``toolkit.ops.int8_rows`` says. The gradient goes straight through: that
of the rounded value is that of the row.
"""

from typing import Any

import torch
from torch import Tensor

from toolkit.errors import ToolkitError, must_be_one_of
from toolkit.ops.int8_rows import int8_codes, int8_values

KV_CACHE_DTYPES = ("auto", "int8")
"""What keys and values are kept as: the model's dtype, or codes of eight bits."""
AUTO = KV_CACHE_DTYPES[0]


def checked_kv_dtype(given: str) -> str:
    """``given``. Raises ToolkitError unless it is one of ``KV_CACHE_DTYPES``."""
    if given not in KV_CACHE_DTYPES:
        raise ToolkitError(must_be_one_of("kv_cache_dtype", given, KV_CACHE_DTYPES))
    return given


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
