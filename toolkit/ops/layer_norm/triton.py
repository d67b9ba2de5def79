"""Layer norm in Triton: whole rows in a tile, so that a row's bits depend on that row alone.

y = (x - mean) / sqrt(variance + eps) * weight + bias, computed in float32; the mean first, then the squares of the
distances from it. The tile is chosen by the length of a row, never by their number; contraction is pinned off.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.triton_rows import EXACT, WIDE, block_of_row, blocks, held, matrix, parts, whole_row


@triton.jit
def normalized(values, there, eps, WIDTH: tl.constexpr):
    """(x - mean) / sqrt(variance + eps) of each row of ``values``, 0 where it ends, and that root's reciprocal."""
    centered = tl.where(there, values - (tl.sum(values, 1) / WIDTH)[:, None], 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(centered * centered, 1) / WIDTH + eps)[:, None]
    return centered * scale, scale


@triton.jit(do_not_specialize=["rows"])
def layer_norm_forward(
    x, weight, bias, y, rows, stride_x, eps,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, BLOCK)[None, :]
    inside = (row < rows) & (column < WIDTH)
    values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
    result, _ = normalized(values, column < WIDTH, eps, WIDTH)
    if WEIGHTED:
        result = result * tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    if BIASED:
        result = result + tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    tl.store(y + row * WIDTH + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def layer_norm_grad(
    grad, x, weight, dx, of_weight, of_bias, rows, steps, stride_g, stride_x, eps,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of ``steps`` tiles, and their part of the gradients to weight and bias, all in row order."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    row = part * steps * ROWS + tl.arange(0, ROWS)[:, None]
    end = tl.minimum((part + 1) * steps * ROWS, rows)
    inside = (row < end) & (column < WIDTH)
    factor = tl.full([1, BLOCK], 1.0, tl.float32)
    if WEIGHTED:
        factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32)
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    plain = tl.zeros([ROWS, BLOCK], tl.float32)
    next_x = tl.load(x + row * stride_x + column, mask=inside, other=0.0)
    next_g = tl.load(grad + row * stride_g + column, mask=inside, other=0.0)
    for _ in range(steps):
        values, upstream = next_x.to(tl.float32), next_g.to(tl.float32)
        after = row + ROWS
        ahead = (after < end) & (column < WIDTH)
        if AHEAD:  # the next tile is on its way while this one is worked on
            next_x = tl.load(x + after * stride_x + column, mask=ahead, other=0.0)
            next_g = tl.load(grad + after * stride_g + column, mask=ahead, other=0.0)
        normed, scale = normalized(values, column < WIDTH, eps, WIDTH)
        if BIASED:
            plain += upstream
        if WEIGHTED:
            sums += upstream * normed
            upstream = upstream * factor
        level = (tl.sum(upstream, 1) / WIDTH)[:, None]
        slope = (tl.sum(upstream * normed, 1) / WIDTH)[:, None]
        result = (upstream - level - normed * slope) * scale
        tl.store(dx + row * WIDTH + column, result.to(dx.dtype.element_ty), mask=(row < end) & (column < WIDTH))
        if not AHEAD:
            next_x = tl.load(x + after * stride_x + column, mask=ahead, other=0.0)
            next_g = tl.load(grad + after * stride_g + column, mask=ahead, other=0.0)
        row = after
    place = part * WIDTH + tl.arange(0, BLOCK)
    if WEIGHTED:
        tl.store(of_weight + place, tl.sum(sums, 0), mask=tl.arange(0, BLOCK) < WIDTH)
    if BIASED:
        tl.store(of_bias + place, tl.sum(plain, 0), mask=tl.arange(0, BLOCK) < WIDTH)


@triton.jit(do_not_specialize=["rows", "steps"])
def layer_norm_grad_wide(
    grad, x, weight, dx, of_weight, of_bias, rows, steps, stride_g, stride_x, eps,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, BIASED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for rows too long to hold: each is walked three times, the sums over rows added up in memory."""
    part = tl.program_id(0).to(tl.int64)
    first = part * steps
    for row in range(first, tl.minimum(first + steps, rows)):
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
            centered = tl.where(inside, values - mean, 0.0)
            upstream = tl.load(grad + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                upstream *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            squares += centered * centered
            levels += upstream
            products += upstream * centered
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / WIDTH + eps)
        level = tl.sum(levels, 0) / WIDTH
        slope = tl.sum(products, 0) * scale / WIDTH
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
            normed = (values - mean) * scale
            upstream = tl.load(grad + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
            # Nothing is there before the first row.
            again = inside & (column < (row - first) * WIDTH)
            place = part * WIDTH + column
            if BIASED:
                before = tl.load(of_bias + place, mask=again, other=0.0)
                tl.store(of_bias + place, before + upstream, mask=inside)
            if WEIGHTED:
                before = tl.load(of_weight + place, mask=again, other=0.0)
                tl.store(of_weight + place, before + upstream * normed, mask=inside)
                upstream *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32)
            result = (upstream - level - normed * slope) * scale
            tl.store(dx + row * WIDTH + column, result.to(dx.dtype.element_ty), mask=inside)


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
    flat, upstream = matrix("layer_norm_backward", x), matrix("layer_norm_backward", grad)
    rows, width = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = width * x.itemsize > WIDE
    tile = block_of_row(x.itemsize) if wide else whole_row(width, x.itemsize)
    count, steps = (blocks(rows, tile.rows), 1) if weight is None and bias is None else parts(rows, tile, x)
    of_weight, of_bias = (
        torch.empty(0 if p is None else count, width, dtype=torch.float32, device=x.device) for p in (weight, bias)
    )
    if dx.numel():
        arguments = (
            upstream, flat, flat if weight is None else weight.contiguous(), dx, of_weight, of_bias, rows, steps,
            upstream.stride(0), flat.stride(0), eps,
        )  # fmt: skip
        flags = {"WIDTH": width, "WEIGHTED": weight is not None, "BIASED": bias is not None}
        if wide:
            layer_norm_grad_wide[(count,)](*arguments, **flags, BLOCK=tile.block, num_warps=tile.warps, **EXACT)
        else:
            # Beside two sums there is room for the next tile in up to 8 warps.
            ahead = x.itemsize == 2 and tile.warps <= 8
            layer_norm_grad[(count,)](*arguments, **flags, AHEAD=ahead, **tile.options())
    return (
        dx,
        x.new_empty(0) if weight is None else of_weight.sum(0).to(weight.dtype),
        x.new_empty(0) if bias is None else of_bias.sum(0).to(bias.dtype),
    )
