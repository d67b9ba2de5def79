"""RMS norm in Triton: whole rows in a tile, so that a row's bits depend on that row alone.

y = x * rsqrt(mean(x²) + eps) * (offset + weight), computed in float32, of x or of the rounded sum x + residual. The
tile is chosen by the length of a row, never by their number; contraction is pinned off.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.triton_rows import EXACT, WIDE, block_of_row, blocks, held, matrix, parts, whole_row


@triton.jit
def reciprocal_rms(values, eps, WIDTH: tl.constexpr):
    """1 / rms of each row of ``values``, [rows, 1]."""
    return 1.0 / tl.sqrt(tl.sum(values * values, 1) / WIDTH + eps)[:, None]


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
    result = values * reciprocal_rms(values, eps, WIDTH)
    if WEIGHTED:
        result = result * (tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset)
    tl.store(y + row * WIDTH + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "steps"])
def rms_norm_grad(
    grad, grad_sum, x, weight, dx, partials, rows, steps, stride_g, stride_s, stride_x, eps, offset,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, ADDED: tl.constexpr, AHEAD: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx of ``steps`` tiles, and their part of the weight's gradient, both in row order."""
    part = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    row = part * steps * ROWS + tl.arange(0, ROWS)[:, None]
    end = tl.minimum((part + 1) * steps * ROWS, rows)
    inside = (row < end) & (column < WIDTH)
    factor = tl.full([1, BLOCK], 1.0, tl.float32)
    if WEIGHTED:
        factor = tl.load(weight + column, mask=column < WIDTH, other=0.0).to(tl.float32) + offset
    sums = tl.zeros([ROWS, BLOCK], tl.float32)
    next_x = tl.load(x + row * stride_x + column, mask=inside, other=0.0)
    next_g = tl.load(grad + row * stride_g + column, mask=inside, other=0.0)
    for _ in range(steps):
        values, upstream = next_x.to(tl.float32), next_g.to(tl.float32)
        after = row + ROWS
        ahead = (after < end) & (column < WIDTH)
        if AHEAD:  # the next tile is on its way while this one is worked on
            next_x = tl.load(x + after * stride_x + column, mask=ahead, other=0.0)
            next_g = tl.load(grad + after * stride_g + column, mask=ahead, other=0.0)
        scale = reciprocal_rms(values, eps, WIDTH)
        normed = values * scale
        if WEIGHTED:
            sums += upstream * normed
            upstream = upstream * factor
        result = (upstream - normed * (tl.sum(upstream * normed, 1) / WIDTH)[:, None]) * scale
        inside = (row < end) & (column < WIDTH)
        if ADDED:
            result += tl.load(grad_sum + row * stride_s + column, mask=inside, other=0.0).to(tl.float32)
        tl.store(dx + row * WIDTH + column, result.to(dx.dtype.element_ty), mask=inside)
        if not AHEAD:
            next_x = tl.load(x + after * stride_x + column, mask=ahead, other=0.0)
            next_g = tl.load(grad + after * stride_g + column, mask=ahead, other=0.0)
        row = after
    if WEIGHTED:
        place = partials + part * WIDTH + tl.arange(0, BLOCK)
        tl.store(place, tl.sum(sums, 0), mask=tl.arange(0, BLOCK) < WIDTH)


@triton.jit(do_not_specialize=["rows", "steps"])
def rms_norm_grad_wide(
    grad, grad_sum, x, weight, dx, partials, rows, steps, stride_g, stride_s, stride_x, eps, offset,
    WIDTH: tl.constexpr, WEIGHTED: tl.constexpr, ADDED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The same for rows too long to hold: each is walked twice, the weight's gradient added up in memory."""
    part = tl.program_id(0).to(tl.int64)
    first = part * steps
    for row in range(first, tl.minimum(first + steps, rows)):
        squares = tl.zeros([BLOCK], tl.float32)
        products = tl.zeros([BLOCK], tl.float32)
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            values = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32)
            upstream = tl.load(grad + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                upstream *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
            squares += values * values
            products += upstream * values
        scale = 1.0 / tl.sqrt(tl.sum(squares, 0) / WIDTH + eps)
        mean = tl.sum(products, 0) * scale / WIDTH
        for start in range(0, WIDTH, BLOCK):
            column = start + tl.arange(0, BLOCK)
            inside = column < WIDTH
            normed = tl.load(x + row * stride_x + column, mask=inside, other=0.0).to(tl.float32) * scale
            upstream = tl.load(grad + row * stride_g + column, mask=inside, other=0.0).to(tl.float32)
            if WEIGHTED:
                place = partials + part * WIDTH + column
                # Nothing is there before the first row.
                before = tl.load(place, mask=inside & (column < (row - first) * WIDTH), other=0.0)
                tl.store(place, before + upstream * normed, mask=inside)
                upstream *= tl.load(weight + column, mask=inside, other=0.0).to(tl.float32) + offset
            result = (upstream - normed * mean) * scale
            if ADDED:
                result += tl.load(grad_sum + row * stride_s + column, mask=inside, other=0.0).to(tl.float32)
            tl.store(dx + row * WIDTH + column, result.to(dx.dtype.element_ty), mask=inside)


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


def _backward(
    grad: Tensor, grad_sum: Tensor | None, x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    flat, upstream = matrix("rms_norm_backward", x), matrix("rms_norm_backward", grad)
    other = flat if grad_sum is None else matrix("rms_norm_backward", grad_sum)
    rows, width = flat.shape
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    wide = width * x.itemsize > WIDE
    tile = block_of_row(x.itemsize) if wide else whole_row(width, x.itemsize)
    count, steps = parts(rows, tile, x) if weight is not None else (blocks(rows, tile.rows), 1)
    partials = torch.empty(count if weight is not None else 0, width, dtype=torch.float32, device=x.device)
    if dx.numel():
        arguments = (
            upstream, other, flat, flat if weight is None else weight.contiguous(), dx, partials, rows, steps,
            upstream.stride(0), other.stride(0), flat.stride(0), eps, offset,
        )  # fmt: skip
        flags = {"WIDTH": width, "WEIGHTED": weight is not None, "ADDED": grad_sum is not None}
        if wide:
            rms_norm_grad_wide[(count,)](*arguments, **flags, BLOCK=tile.block, num_warps=tile.warps, **EXACT)
        else:
            rms_norm_grad[(count,)](*arguments, **flags, AHEAD=x.itemsize == 2, **tile.options())
    return dx, partials.sum(0).to(weight.dtype) if weight is not None else x.new_empty(0)


def rms_norm(x: Tensor, weight: Tensor | None, eps: float, offset: float) -> Tensor:
    """``toolkit::rms_norm``: x [..., N] in float32, bfloat16 or float16; computed in float32."""
    return _forward(x, None, weight, eps, offset)[0]


def rms_norm_backward(
    grad: Tensor, x: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """``toolkit::rms_norm_backward``: (dx [..., N], dweight [N], empty without a weight).

    dweight is summed over the rows of each program in order, and the programs' sums by one reduction.
    """
    return _backward(grad, None, x, weight, eps, offset)


def add_rms_norm(
    x: Tensor, residual: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """``toolkit::add_rms_norm``: (normed, sum), in one pass."""
    return _forward(x, residual, weight, eps, offset)


def add_rms_norm_backward(
    grad: Tensor, grad_sum: Tensor, total: Tensor, weight: Tensor | None, eps: float, offset: float
) -> tuple[Tensor, Tensor]:
    """``toolkit::add_rms_norm_backward``: (gradient to x and to residual, dweight)."""
    return _backward(grad, grad_sum, total, weight, eps, offset)
