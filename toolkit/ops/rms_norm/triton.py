"""RMS norm in Triton: whole rows in a tile, so that a row's bits depend on that row alone.

y = x * rsqrt(mean(x²) + eps) * (offset + weight), computed in float32, of x or of the rounded sum x + residual. The
tile is chosen by the length of a row, never by their number; contraction is pinned off.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.triton_norm import norm_backward, normalize
from toolkit.ops.triton_rows import blocks, held, whole_row


@triton.jit(do_not_specialize=["rows"])
def rms_norm_forward(
    x, residual, weight, total, y, rows, stride_x, stride_r, eps, offset,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, ADDED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    if ADDED:
        added = tl.load(residual + row * stride_r + column, mask=inside, other=0.0).to(tl.float32)
        rounded = (values + added).to(total.dtype.element_ty)
        tl.store(total + row * WIDTH + column, rounded, mask=inside)
        values = rounded.to(tl.float32)
    result, _ = normalize(values, column < WIDTH, eps, WIDTH, False)
    if WEIGHTED:
        result = result * (tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset)
    tl.store(y + row * WIDTH + column, result.to(y.dtype.element_ty), mask=inside)


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    flat = held("rms_norm", x)
    other = flat if residual is None else held("rms_norm", residual)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    total = y if residual is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        rows, width = flat.shape
        tile = whole_row(width, x.itemsize)
        rms_norm_forward[(blocks(rows, tile.rows),)](
            flat, other, flat if weight is None else weight.contiguous(), total, y, rows,
            flat.stride(0), other.stride(0), eps, offset,
            WIDTH=width, WEIGHTED=weight is not None, ADDED=residual is not None, **tile.options(),
        )  # fmt: skip
    return y, total


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """``toolkit::rms_norm``: x [..., N] in float32, bfloat16 or float16; computed in float32."""
    return _forward(x, None, weight, eps, offset)[0]


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """``toolkit::rms_norm_backward``: (dx [..., N], dweight [N], empty without a weight).

    dweight is summed over the rows of each program in order, and the programs' sums by one reduction.
    """
    return norm_backward("rms_norm_backward", grad, None, x, weight, None, eps, offset, centered=False)[:2]


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """``toolkit::add_rms_norm``: (normed, sum), in one pass."""
    return _forward(x, residual, weight, eps, offset)


def add_rms_norm_backward(
    grad: Tensor, grad_sum: Tensor, total: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """``toolkit::add_rms_norm_backward``: (gradient to x and to residual, dweight)."""
    return norm_backward("rms_norm_backward", grad, grad_sum, total, weight, None, eps, offset, centered=False)[:2]
