"""Gradients of short causal convolutions in Triton, without atomics: every row gathers from the tokens that read it.

First the gradient before the activation (``conv_forward`` again), then what each tap's weight and the bias add up over
fixed runs of rows, then the rows of x and of tails. Who reads a row as what lies before a segment is sorted on the
device.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.causal_conv.triton import convolve, segments_of, tap
from toolkit.ops.triton_rows import Tile, blocks, matrix, part_of_row, parts, tile_of


@triton.jit(do_not_specialize=["rows", "segments", "search", "frames", "steps"])
def conv_weight_grad(
    x, before, offsets, past, tails, partials, rows, width, segments, search, frames, steps,
    stride_x, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of ``steps`` tiles of rows, in order: the part of a tap's weight's gradient, or of the bias's (tap TAPS)."""
    part, i = tl.program_id(0).to(tl.int64), tl.program_id(2)
    column = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    end = tl.load(offsets + segments)
    last = tl.minimum((part + 1) * steps * ROWS, tl.minimum(rows, end))
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for step in range(steps):
        row = (part * steps + step) * ROWS + tl.arange(0, ROWS)[:, None]
        real = row < last
        inside = real & (column < width)
        gradient = tl.load(before + row * width + column, mask=inside, other=0.0)
        if i < TAPS:
            segment = segments_of(offsets, segments, search, tl.where(real, row, 0))
            value = tap(
                x, tails, past, frames, row, tl.load(offsets + segment), segment, column, inside, TAPS - 1 - i,
                width, stride_x, 0, 0, TAPS, False,
            )  # fmt: skip
            gradient = tl.where(real, gradient * value, 0.0)
        total += gradient
    place = (part * (TAPS + 1) + i) * width + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partials + place, tl.sum(total, 0), mask=tl.program_id(1) * BLOCK + tl.arange(0, BLOCK) < width)


@triton.jit(do_not_specialize=["rows", "skipped", "segments", "search"])
def conv_row_grad(
    before, weight, offsets, order, starts, to, rows, skipped, width, segments, search,
    OWN: tl.constexpr, TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of ``rows`` rows of [x, tails] after the first ``skipped``: from the tokens of its segment (OWN: it has one),
    then from those of the segments that it lies before, order[starts[r]:starts[r + 1]], places of ``past``."""
    row, column, inside = tile_of(rows, width, ROWS, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if OWN:
        real = row < tl.load(offsets + segments)
        segment = segments_of(offsets, segments, search, tl.where(real, row, 0))
        end = tl.load(offsets + segment + 1)
        for d in tl.static_range(TAPS):
            used = inside & real & (row + d < end)
            gradient = tl.load(before + (row + d) * width + column, mask=used, other=0.0)
            factor = tl.load(weight + column * TAPS + (TAPS - 1 - d), mask=column < width, other=0.0).to(tl.float32)
            total += tl.where(used, gradient * factor, 0.0)
    begin = tl.load(starts + skipped + row, mask=row < rows, other=0)
    count = tl.load(starts + skipped + row + 1, mask=row < rows, other=0) - begin
    for i in range(tl.max(tl.max(count, 0), 0)):
        reads = inside & (i < count)
        place = tl.load(order + begin + i, mask=i < count, other=0).to(tl.int32)
        reader, tap_of = place // (TAPS - 1), place % (TAPS - 1)
        first = tl.load(offsets + reader)
        length = tl.load(offsets + reader + 1) - first
        for d in tl.static_range(TAPS - 1):
            read = reads & (d <= tap_of) & (d < length)
            share = tl.load(weight + column * TAPS + (tap_of - d), mask=read, other=0.0).to(tl.float32)
            total += tl.load(before + (first + d) * width + column, mask=read, other=0.0) * share
    tl.store(to + row * width + column, total.to(to.dtype.element_ty), mask=inside)


def causal_conv_backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, query_offsets: Tensor, past: Tensor,
    tails: Tensor | None, activation: str | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``toolkit::causal_conv_backward``: gradients to x, weight, bias and tails (the last two empty without)."""
    x, grad = matrix("causal_conv_backward", x), matrix("causal_conv_backward", grad)
    held = None if tails is None else tails.contiguous()
    (rows, width), taps, segments = x.shape, weight.shape[1], past.shape[0]
    frames = 0 if held is None else held.shape[0]
    dx, to_tails = torch.empty_like(x, memory_format=torch.contiguous_format), x.new_empty(0)
    if tails is not None:
        to_tails = torch.empty(tails.shape, dtype=tails.dtype, device=x.device)
    if segments == 0 or rows == 0 or width == 0:
        to_bias = x.new_empty(0) if bias is None else torch.zeros_like(bias)
        return dx.zero_(), torch.zeros_like(weight, memory_format=torch.contiguous_format), to_bias, to_tails.zero_()
    weight_of, offsets, past = weight.contiguous(), query_offsets.contiguous(), past.contiguous()
    before = convolve(x, weight_of, bias, grad, offsets, past, held, activation, paged=False)

    shape = part_of_row(width, 4)
    summed = Tile(shape.rows * shape.block // min(shape.block, 256), min(shape.block, 256), shape.warps)
    count, steps = parts(rows, summed, x)
    partials = torch.empty(count, taps + 1, width, dtype=torch.float32, device=x.device)
    conv_weight_grad[(count, blocks(width, summed.block), taps + (bias is not None))](
        x=x,
        before=before,
        offsets=offsets,
        past=past,
        tails=x if held is None else held,
        partials=partials,
        rows=rows,
        width=width,
        segments=segments,
        search=segments.bit_length(),
        frames=frames,
        steps=steps,
        stride_x=x.stride(0),
        TAPS=taps,
        **summed.options(),
    )
    sums = partials[:, : taps + (bias is not None)].sum(0)

    # Places of past by the row of [x, tails] that they name; those that name none come last.
    key = torch.where(past >= 0, past, torch.where(past == -1, rows + frames * (taps - 1), rows - 2 - past)).flatten()
    ids, order = torch.sort(key, stable=True)
    starts = torch.searchsorted(ids, torch.arange(rows + frames * (taps - 1) + 1, device=x.device))
    gathered = part_of_row(width, 8)  # half a tile: a lane has many addresses to hold
    for to, own, skipped in ((dx, True, 0), (to_tails, False, rows)):
        if to.numel():
            number = to.numel() // width
            conv_row_grad[(blocks(number, gathered.rows) * blocks(width, gathered.block),)](
                before, weight_of, offsets, order, starts, to, number, skipped, width, segments, segments.bit_length(),
                OWN=own, TAPS=taps, **gathered.options(),
            )  # fmt: skip
    to_bias = x.new_empty(0) if bias is None else sums[taps].to(bias.dtype)
    return dx, sums[:taps].t().contiguous().to(weight.dtype), to_bias, to_tails
