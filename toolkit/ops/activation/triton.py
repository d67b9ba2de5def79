"""Activation functions in Triton, element by element, forward and backward, each kind inlined.

Computed in float32, rounded once. The grid is flat: one program per tile, for any number of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.triton_rows import blocks, matrix, part_of_row, tile_of


@triton.jit(do_not_specialize=["rows"])
def activation_forward(
    x, y, rows, width, stride_x, VALUE: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    row, column, inside = tile_of(rows, width, ROWS, BLOCK)
    values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    tl.store(y + row * width + column, VALUE(values).to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def activation_grad(
    grad, x, dx, rows, width, stride_g, stride_x, BOTH: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr
):
    row, column, inside = tile_of(rows, width, ROWS, BLOCK)
    values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    upstream = tl.load(grad + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
    _, slope = BOTH(values)
    tl.store(dx + row * width + column, (upstream * slope).to(dx.dtype.element_ty), mask=inside)


def activation(x: Tensor, kind: str) -> Tensor:
    """``toolkit::activation``: x of any shape in float32, bfloat16 or float16."""
    flat = matrix("activation", x if x.dim() else x[None])
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        rows, width = flat.shape
        value, _ = find(kind, plain=True).device()
        tile = part_of_row(width, x.itemsize)
        grid = (blocks(rows, tile.rows) * blocks(width, tile.block),)
        activation_forward[grid](flat, y, rows, width, flat.stride(0), VALUE=value, **tile.options())
    return y


def activation_backward(grad: Tensor, x: Tensor, kind: str) -> Tensor:
    """``toolkit::activation_backward``: ``grad * f'(x)``."""
    flat, upstream = (matrix("activation_backward", t if t.dim() else t[None]) for t in (x, grad))
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if dx.numel():
        rows, width = flat.shape
        _, both = find(kind, plain=True).device()
        tile = part_of_row(width, x.itemsize)
        grid = (blocks(rows, tile.rows) * blocks(width, tile.block),)
        activation_grad[grid](
            upstream, flat, dx, rows, width, upstream.stride(0), flat.stride(0), BOTH=both, **tile.options()
        )
    return dx
