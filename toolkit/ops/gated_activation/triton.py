"""Gated activation in Triton: ``f(gate) * up`` or ``f(gate, up)``, one pass each way, each kind inlined.

Computed in float32, rounded once. The grid is flat: one program per tile, for any number of rows.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.triton_rows import blocks, matrix, part_of_row, tile_of


@triton.jit(do_not_specialize=["rows"])
def gated_activation_forward(
    gate, up, y, rows, width, stride_g, stride_u,
    VALUE: tl.constexpr, ARGUMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile_of(rows, width, ROWS, BLOCK)
    g = tl.load(gate + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_u + column, mask=inside, other=0.0).to(tl.float32)
    if ARGUMENTS == 2:
        result = VALUE(g, u)
    else:
        result = VALUE(g) * u
    tl.store(y + row * width + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows"])
def gated_activation_grad(
    grad, gate, up, dgate, dup, rows, width, stride_d, stride_g, stride_u,
    BOTH: tl.constexpr, ARGUMENTS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, column, inside = tile_of(rows, width, ROWS, BLOCK)
    upstream = tl.load(grad + row * stride_d + column, mask=inside, other=0.0).to(tl.float32)
    g = tl.load(gate + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
    u = tl.load(up + row * stride_u + column, mask=inside, other=0.0).to(tl.float32)
    if ARGUMENTS == 2:
        _, slope, to_up = BOTH(g, u)
        to_gate = upstream * slope
    else:
        to_up, slope = BOTH(g)
        to_gate = upstream * u * slope
    at = row * width + column
    tl.store(dgate + at, to_gate.to(dgate.dtype.element_ty), mask=inside)
    tl.store(dup + at, (upstream * to_up).to(dup.dtype.element_ty), mask=inside)


def gated_activation(gate: Tensor, up: Tensor, kind: str) -> Tensor:
    """``toolkit::gated_activation``: gate, up [..., N] in float32, bfloat16 or float16."""
    g, u = (matrix("gated_activation", t) for t in (gate, up))
    y = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    if y.numel():
        rows, width = g.shape
        function = find(kind)
        tile = part_of_row(width, gate.itemsize)
        gated_activation_forward[(blocks(rows, tile.rows) * blocks(width, tile.block),)](
            g, u, y, rows, width, g.stride(0), u.stride(0),
            VALUE=function.device()[0], ARGUMENTS=function.arguments, **tile.options(),
        )  # fmt: skip
    return y


def gated_activation_backward(grad: Tensor, gate: Tensor, up: Tensor, kind: str) -> tuple[Tensor, Tensor]:
    """``toolkit::gated_activation_backward``: gradients to gate and up."""
    d, g, u = (matrix("gated_activation_backward", t) for t in (grad, gate, up))
    dgate = torch.empty(gate.shape, dtype=gate.dtype, device=gate.device)
    dup = torch.empty(up.shape, dtype=up.dtype, device=up.device)
    if dgate.numel():
        rows, width = g.shape
        function = find(kind)
        tile = part_of_row(width, gate.itemsize)
        gated_activation_grad[(blocks(rows, tile.rows) * blocks(width, tile.block),)](
            d, g, u, dgate, dup, rows, width, d.stride(0), g.stride(0), u.stride(0),
            BOTH=function.device()[1], ARGUMENTS=function.arguments, **tile.options(),
        )  # fmt: skip
    return dgate, dup
