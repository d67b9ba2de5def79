"""Layer norm in Triton: whole rows in a tile, so that a row's bits depend on that row alone.

y = (x - mean) / sqrt(variance + eps) * weight + bias, computed in float32; the mean first, then the squares of the
distances from it. The tile is chosen by the length of a row, never by their number; contraction is pinned off.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.triton_norm import norm_backward, normalize
from toolkit.ops.triton_rows import blocks, held, whole_row


@triton.jit(do_not_specialize=["rows"])
def layer_norm_forward(
    x, weight, bias, y, rows, stride_x, eps,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    result, _ = normalize(values, column < WIDTH, eps, WIDTH, True)
    if WEIGHTED:
        result = result * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if BIASED:
        result = result + tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, result.to(y.dtype.element_ty), mask=inside)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """``toolkit::layer_norm``: x [..., N] in float32, bfloat16 or float16; computed in float32."""
    flat = held("layer_norm", x)
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        rows, width = flat.shape
        tile = whole_row(width, x.itemsize)
        layer_norm_forward[(blocks(rows, tile.rows),)](
            flat, flat if weight is None else weight.contiguous(), flat if bias is None else bias.contiguous(), y, rows,
            flat.stride(0), eps, WIDTH=width, WEIGHTED=weight is not None, BIASED=bias is not None, **tile.options(),
        )  # fmt: skip
    return y


def layer_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """``toolkit::layer_norm_backward``: (dx [..., N], dweight, dbias), empty for a missing parameter.

    The last two are summed over the rows of each program in order, and the programs' sums by one reduction.
    """
    return norm_backward("layer_norm_backward", grad, None, x, weight, bias, eps, 0.0, centered=True)
