"""Rotary position embedding in plain torch: the specification."""

import torch
from torch import Tensor

from toolkit.ops.rowwise import compute_dtype, elementwise


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Rotates pairs of the first R channels; float32 (float64 for float64), each operation rounded.

    Differentiable. Only IEEE products and sums: the bits of an element depend on its own pair alone.
    """
    half, rotated = cos.shape[-1] // 2, cos.shape[-1]
    x_up = x.to(compute_dtype(x))
    c, s = cos.to(x_up.dtype)[:, None], sin.to(x_up.dtype)[:, None]
    pairs = x_up[..., :rotated]
    if interleaved:
        a, b = pairs[..., 0::2], pairs[..., 1::2]
        c, s = c[..., :half], s[..., :half]
        y = torch.stack((a * c - b * s, b * c + a * s), dim=-1).flatten(-2)
    else:
        a, b = pairs[..., :half], pairs[..., half:]
        y = torch.cat((a * c[..., :half] - b * s[..., :half], b * c[..., half:] + a * s[..., half:]), dim=-1)
    return torch.cat((y, x_up[..., rotated:]), dim=-1).to(x.dtype)


def transposed_sin(sin: Tensor, interleaved: bool) -> Tensor:
    """The sine table that makes ``rotary`` the transpose of the linear map it is with ``sin``."""
    return -sin if interleaved else -sin.roll(sin.shape[-1] // 2, -1)


def rotary_tables(
    positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype, axes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """cos and sin of ``position * inv_freq``, times ``scaling``, each frequency twice: [..., 2F].

    With ``axes``, positions are [A, ...] and frequency f goes by ``positions[axes[f]]``. Angle, table and product
    with ``scaling`` are float32 (float64 when ``dtype`` is), then cast to ``dtype``. Positions are exact up to 2^24
    in float32. Rows do not depend on each other.
    """
    compute = torch.float64 if dtype == torch.float64 else torch.float32
    steps = positions[..., None] if axes is None else positions.index_select(0, axes).movedim(0, -1)
    angles = steps.to(compute) * inv_freq.to(compute)
    cos, sin = (elementwise(f, angles) * scaling for f in (torch.cos, torch.sin))
    return torch.cat((cos, cos), dim=-1).to(dtype), torch.cat((sin, sin), dim=-1).to(dtype)


def rotary_fake(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    return torch.empty(x.shape, dtype=x.dtype, device=x.device)


def rotary_tables_fake(
    positions: Tensor, inv_freq: Tensor, scaling: float, dtype: torch.dtype, axes: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    rows = positions.shape if axes is None else positions.shape[1:]
    shape = (*rows, 2 * inv_freq.shape[0])
    return inv_freq.new_empty(shape, dtype=dtype), inv_freq.new_empty(shape, dtype=dtype)
