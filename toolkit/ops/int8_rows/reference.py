"""Rows in eight bits, in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.state_write import state_write

_TINY = torch.finfo(torch.float32).tiny


def int8_codes(rows: Tensor) -> tuple[Tensor, Tensor]:
    """See ``toolkit.ops.int8_rows.int8_codes``."""
    exact = rows.float()
    scales = exact.abs().amax(-1, keepdim=True) / 127
    return (exact / scales.clamp_min(_TINY)).round().to(torch.int8), scales


def int8_values(codes: Tensor, scales: Tensor, dtype: torch.dtype) -> Tensor:
    """See ``toolkit.ops.int8_rows.int8_values``."""
    return (codes * scales).to(dtype)


def state_write_int8(codes: Tensor, scales: Tensor, rows: Tensor, slots: Tensor) -> None:
    """The codes and scales of ``rows``, each written by ``state_write``."""
    for pool, part in zip((codes, scales), int8_codes(rows), strict=True):
        state_write(pool, part, slots)
