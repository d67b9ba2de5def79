"""Rows of numbers in eight bits with a scale each: how pages hold keys and values with ``kv_cache_dtype="int8"``.

Of a row x [D]::

    scale = max |x| / 127            float32
    code = round(x / scale)          int8, half to even; 0 where scale is 0
    value = code * scale             in x's dtype

It is computed row by row with exactly rounded operations, so equal rows have equal codes in any batch and in every
implementation.
"""

import torch
from torch import Tensor

from toolkit.ops.int8_rows import reference
from toolkit.ops.registry import Op, register

__all__ = ["int8_codes", "int8_values", "state_write_int8"]


def _fake(codes: Tensor, scales: Tensor, rows: Tensor, slots: Tensor) -> None:
    return None


_OP: Op[None] = register(
    "state_write_int8(Tensor(a!) codes, Tensor(b!) scales, Tensor rows, Tensor slots) -> ()",
    reference=reference.state_write_int8,
    fake=_fake,
    triton="toolkit.ops.int8_rows.reference.state_write_int8",  # the codes in torch, written by state_write's kernel
)


def int8_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [..., D] in int8 and scales [..., 1] in float32 of rows [..., D] of any floating dtype."""
    return reference.int8_codes(rows)


def int8_values(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """The rows [..., D] in ``dtype`` that codes and scales stand for: the product in float32, rounded once."""
    return reference.int8_values(codes, scales, dtype)


def state_write_int8(codes: Tensor, scales: Tensor, rows: Tensor, slots: Tensor, *, impl: str | None = None) -> None:
    """``codes[slots[t]], scales[slots[t]] = int8_codes(rows[t])`` in place, for every t with ``slots[t] >= 0``.

    Args:
        codes: [slots_total, H, D] int8.
        scales: [slots_total, H, 1] float32.
        rows: [T, H, D]; float32, float64, bfloat16 or float16.
        slots: [T] int64, all different where not negative; negative ones are skipped.
        impl: None (by device), "reference", "cpu" or "triton".

    Raises:
        RuntimeError: in the native CPU kernel for a slot outside the pool, before anything is written; otherwise as
            ``state_write``.

    No gradient: rows are written as values.
    """
    _OP.select(impl)(codes, scales, rows.detach(), slots)
