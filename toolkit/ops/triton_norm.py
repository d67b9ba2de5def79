"""The gradients of layer norm and RMS norm in Triton: one kernel for both, and one for rows too long to hold.

CENTERED is layer norm: the mean is subtracted first. Without it (RMS norm) the weight's factor is offset + weight.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.triton_rows import EXACT, WIDE, block_of_row, blocks, matrix, parts, whole_row


@triton.jit
def normalize(values, there, eps, WIDTH: tl.constexpr, CENTERED: tl.constexpr):
    """Each row of ``values`` times 1 / sqrt(mean square + eps), and that factor; CENTERED: of the centered row."""
    if CENTERED:
        values = tl.where(there, values - (tl.sum(values, 1) / WIDTH)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(values * values, 1) / WIDTH + eps)[:, None]
    return values * scale, scale


@triton.jit
def weight_factor(weight, column, offset, WIDTH: tl.constexpr, CENTERED: tl.constexpr):
    """What a normalized row is multiplied by at ``column``."""
    factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if not CENTERED:
        factor = factor + offset
    return factor


@triton.jit(do_not_specialize=["rows", "steps"])
def norm_grad(
    grad, grad_sum, x, weight, dx, of_weight, of_bias, rows, steps, stride_g, stride_s, stride_x, eps, offset,
    WIDTH: tl.constexpr, CENTERED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    AHEAD: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of ``steps`` tiles, and their part of the gradients to weight and bias, all in row order.

    ADDED: plus ``grad_sum``, the gradient to the sum of x and a residual.
    """
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    row = part * steps * ROWS + tl.arange(0, ROWS)[:, None]
    end = tl.minimum((part + 1) * steps * ROWS, rows)
    inside = (row < end) & (column < WIDTH)
    factor = tl.full([1, BLOCK], 1.0, tl.float32)
    if WEIGHTED:
        factor = weight_factor(weight, column, offset, WIDTH, CENTERED)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    next_x = tl.load(x + row * stride_x + column, mask=inside, other=0.0)
    next_g = tl.load(grad + row * stride_g + column, mask=inside, other=0.0)
    for _ in range(steps):
        values, upstream = next_x.to(tl.float32), next_g.to(tl.float32)
        after = row + ROWS
        ahead = (after < end) & (column < WIDTH)
        if AHEAD:  # the next tile is loaded while this one is computed
            next_x = tl.load(x + after * stride_x + column, mask=ahead, other=0.0)
            next_g = tl.load(grad + after * stride_g + column, mask=ahead, other=0.0)
        normed, scale = normalize(values, column < WIDTH, eps, WIDTH, CENTERED)
        if BIASED:
            plain += upstream
        if WEIGHTED:
            sums += upstream * normed
            upstream = upstream * factor
        if CENTERED:
            level = (tl.sum(upstream, 1) / WIDTH)[:, None]
            slope = (tl.sum(upstream * normed, 1) / WIDTH)[:, None]
            result = (upstream - level - normed * slope) * scale
        else:
            result = (upstream - normed * (tl.sum(upstream * normed, 1) / WIDTH)[:, None]) * scale
        inside = (row < end) & (column < WIDTH)
        if ADDED:
            result += tl.load(grad_sum + row * stride_s + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * WIDTH + column, result.to(dx.dtype.element_ty), mask=inside)
        if not AHEAD:
            next_x = tl.load(x + after * stride_x + column, mask=ahead, other=0.0)
            next_g = tl.load(grad + after * stride_g + column, mask=ahead, other=0.0)
        row = after
    offsets = part * WIDTH + tl.arange(0, BLOCK)
    if WEIGHTED:
        tl.store(of_weight + offsets, tl.sum(sums, 0), mask=tl.arange(0, BLOCK) < WIDTH)
    if BIASED:
        tl.store(of_bias + offsets, tl.sum(plain, 0), mask=tl.arange(0, BLOCK) < WIDTH)


@triton.jit(do_not_specialize=["rows", "steps"])
def norm_grad_long_rows(
    grad, grad_sum, x, weight, dx, of_weight, of_bias, rows, steps, stride_g, stride_s, stride_x, eps, offset,
    WIDTH: tl.constexpr, CENTERED: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """``norm_grad`` in blocks of a row: each row is read two or three times, the sums over rows are added in memory."""
    part = tl.program_id(0).to(tl.int64)
    first = part * steps
    for row in range(first, tl.minimum(first + steps, rows)):
        if CENTERED:
            total = tl.zeros([BLOCK], tl.float32)
            for start in range(0, WIDTH, BLOCK):
                column = start + tl.arange(0, BLOCK)
                total += tl.load(x + row * stride_x + column, mask=column < WIDTH, other=0.0).to(tl.float32)
            mean = tl.sum(total, 0) / WIDTH
        squares = tl.zeros([BLOCK], tl.float32)
        levels = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
            if CENTERED:
                values = tl.where(inside, values - mean, 0.0)
            upstream = tl.load(grad + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                upstream *= weight_factor(weight, column, offset, WIDTH, CENTERED)
            squares += values * values
            if CENTERED:
                levels += upstream
            products += upstream * values
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / WIDTH + eps)
        level = tl.sum(levels, 0) / WIDTH
        slope = tl.sum(products, 0) * scale / WIDTH
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
            if CENTERED:
                values = values - mean
            normed = values * scale
            upstream = tl.load(grad + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
            # Nothing was stored before the first row.
            again = inside & (column < (row - first) * WIDTH)
            offsets = part * WIDTH + column
            if BIASED:
                before = tl.load(of_bias + offsets, mask=again, other=0.0)
                tl.store(of_bias + offsets, before + upstream, mask=inside)
            if WEIGHTED:
                before = tl.load(of_weight + offsets, mask=again, other=0.0)
                tl.store(of_weight + offsets, before + upstream * normed, mask=inside)
                upstream *= weight_factor(weight, column, offset, WIDTH, CENTERED)
            if CENTERED:
                result = (upstream - level - normed * slope) * scale
            else:
                result = (upstream - normed * slope) * scale
            if ADDED:
                result += tl.load(grad_sum + row * stride_s + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + row * WIDTH + column, result.to(dx.dtype.element_ty), mask=inside)


def norm_backward(
    op: str,
    grad: Tensor,
    grad_sum: Tensor | None,
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    offset: float,
    *,
    centered: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dx [..., N], dweight [N], dbias [N]) of a norm over the last dimension of x; empty for a missing parameter.

    The sums over rows are taken by each program in row order, and the programs' sums by one reduction.

    Args:
        op: the name for error sentences.
        grad_sum: a gradient that is added to dx before it is rounded, or None.
        offset: added to the weight of an RMS norm.
        centered: layer norm; else RMS norm.
    """
    flat, upstream = matrix(op, x), matrix(op, grad)
    other = flat if grad_sum is None else matrix(op, grad_sum)
    rows, width = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    long_rows = width * x.itemsize > WIDE
    tile = block_of_row(x.itemsize) if long_rows else whole_row(width, x.itemsize)
    count, steps = (blocks(rows, tile.rows), 1) if weight is None and bias is None else parts(rows, tile, x)
    of_weight, of_bias = (
        torch.empty(0 if p is None else count, width, dtype=torch.float32, device=x.device) for p in (weight, bias)
    )
    if dx.numel():
        arguments: dict[str, Any] = {
            "grad": upstream,
            "grad_sum": other,
            "x": flat,
            "weight": flat if weight is None else weight.contiguous(),
            "dx": dx,
            "of_weight": of_weight,
            "of_bias": of_bias,
            "rows": rows,
            "steps": steps,
            "stride_g": upstream.stride(0),
            "stride_s": other.stride(0),
            "stride_x": flat.stride(0),
            "eps": eps,
            "offset": offset,
            "WIDTH": width,
            "CENTERED": centered,
            "WEIGHTED": weight is not None,
            "BIASED": bias is not None,
            "ADDED": grad_sum is not None,
        }
        if long_rows:
            norm_grad_long_rows[(count,)](**arguments, BLOCK=tile.block, num_warps=tile.warps, **EXACT)
        else:
            # Beside two sums there is room for the next tile in up to 8 warps.
            ahead = x.itemsize == 2 and (tile.warps <= 8 or not centered)
            norm_grad[(count,)](**arguments, AHEAD=ahead, **tile.options())
    return (
        dx,
        x.new_empty(0) if weight is None else of_weight.sum(0).to(weight.dtype),
        x.new_empty(0) if bias is None else of_bias.sum(0).to(bias.dtype),
    )
