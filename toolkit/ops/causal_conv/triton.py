"""Short causal convolutions in Triton: a program takes a tile of rows and channels and looks up the rows of each tap.

A row's segment is found by bisection over the offsets, so nothing is prepared on the host; what lies before a segment
comes from ``past`` or, paged, from a frame. The tile goes by the number of channels alone. Taps are added one by one.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.activation.kinds import find
from toolkit.ops.state_write.triton import state_write
from toolkit.ops.triton_rows import blocks, matrix, part_of_row, tile_of


@triton.jit
def identity(x):
    return x


@triton.jit
def identity_both(x):
    return x, x * 0.0 + 1.0


@triton.jit
def segments_of(offsets, segments, steps, row):
    """The last segment that begins at or before each row, of rows that are of one; steps: bits of ``segments``."""
    low, high = row * 0, row * 0 + segments
    for _ in range(steps):
        middle = (low + high + 1) // 2
        before = tl.load(offsets + middle) <= row
        low, high = tl.where(before, middle, low), tl.where(before, high, middle - 1)
    return tl.minimum(low, segments - 1)


@triton.jit
def tap(
    x, tails, past, frames, row, first, segment, column, inside, back, width, stride_x, stride_f, stride_t,
    TAPS: tl.constexpr, PAGED: tl.constexpr,
):  # fmt: skip
    """The input ``back`` tokens before each row, [ROWS, BLOCK] in float32; zeros where there is none."""
    at = row - back
    earlier = at < first
    place = tl.maximum(at - first + (TAPS - 1), 0)
    if PAGED:  # past [S] names a frame of tails
        frame = tl.load(past + segment, mask=earlier, other=-1)
        held = earlier & (frame >= 0) & (frame < frames)
        place = frame * stride_f + place * stride_t
        at = tl.where(earlier, -1, at)
    else:  # past [S, TAPS - 1] names rows of x, or of tails, which are contiguous
        other = tl.load(past + segment * (TAPS - 1) + place, mask=earlier, other=0)
        held = earlier & (other < -1) & (-2 - other < frames * (TAPS - 1))
        place = (-2 - other) * width
        at = tl.where(earlier, other, at)
    value = tl.load(x + at * stride_x + column, mask=inside & (at >= 0), other=0.0).to(tl.float32)
    return value + tl.load(tails + place + column, mask=inside & held, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["rows", "segments", "steps", "frames"])
def conv_forward(
    x, weight, bias, grad, offsets, past, tails, y, rows, width, segments, steps, frames,
    stride_x, stride_f, stride_t, stride_g,
    VALUE: tl.constexpr, BIASED: tl.constexpr, PAGED: tl.constexpr, GRAD: tl.constexpr, TAPS: tl.constexpr,
    ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """y of a tile; with GRAD the gradient before the activation, of which VALUE then gives value and slope.

    Rows from offsets[segments] on are padding, 0.
    """
    row, column, inside = tile_of(rows, width, ROWS, BLOCK)
    real = row < tl.load(offsets + segments)
    segment = segments_of(offsets, segments, steps, tl.where(real, row, 0))
    first = tl.load(offsets + segment)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    if BIASED:
        total += tl.load(bias + column, mask=column < width, other=0.0).to(tl.float32)
    for i in tl.static_range(TAPS):
        value = tap(
            x, tails, past, frames, row, first, segment, column, inside & real, TAPS - 1 - i,
            width, stride_x, stride_f, stride_t, TAPS, PAGED,
        )  # fmt: skip
        total += value * tl.load(weight + column * TAPS + i, mask=column < width, other=0.0).to(tl.float32)
    if GRAD:
        _, slope = VALUE(total)
        result = slope * tl.load(grad + row * stride_g + column, mask=inside & real, other=0.0).to(tl.float32)
    else:
        result = VALUE(total)
    result = tl.where(real, result, 0.0)
    tl.store(y + row * width + column, result.to(y.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["saves", "segments", "steps", "frames"])
def conv_tails(
    x, offsets, load_blocks, tails, store_rows, staged, saves, width, segments, steps, frames,
    stride_x, stride_f, stride_t,
    TAPS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """staged[i] = the last inputs up to row store_rows[i], oldest first; zeros for a row of no segment."""
    save, column, inside = tile_of(saves, width, ROWS, BLOCK)
    end = tl.load(offsets + segments)
    row = tl.load(store_rows + save, mask=save < saves, other=0)
    real = (row >= 0) & (row < end)
    row = tl.where(real, row, 0)
    segment = segments_of(offsets, segments, steps, row)
    first = tl.load(offsets + segment)
    for i in tl.static_range(TAPS - 1):
        value = tap(
            x, tails, load_blocks, frames, row, first, segment, column, inside & real, TAPS - 2 - i,
            width, stride_x, stride_f, stride_t, TAPS, True,
        )  # fmt: skip
        tl.store(staged + (save * (TAPS - 1) + i) * width + column, value.to(staged.dtype.element_ty), mask=inside)


def functions(activation: str | None) -> tuple[Any, Any]:
    """(value, value and slope) of an activation as Triton functions."""
    return (identity, identity_both) if activation is None else find(activation, plain=True).device()


def convolve(
    x: Tensor, weight: Tensor, bias: Tensor | None, grad: Tensor | None, query_offsets: Tensor, past: Tensor,
    tails: Tensor | None, activation: str | None, *, paged: bool,
) -> Tensor:  # fmt: skip
    """y, or for a ``grad`` of it the gradient before the activation, in float32; x and tails of unit last stride."""
    rows, width = x.shape
    y = torch.empty(rows, width, dtype=x.dtype if grad is None else torch.float32, device=x.device)
    if past.shape[0] == 0 or not y.numel():
        return y.zero_()
    value, both = functions(activation)
    held = x if tails is None else tails
    shape = part_of_row(width, 4)
    conv_forward[(blocks(rows, shape.rows) * blocks(width, shape.block),)](
        x=x,
        weight=weight.contiguous(),
        bias=x if bias is None else bias.contiguous(),
        grad=x if grad is None else grad,
        offsets=query_offsets.contiguous(),
        past=past.contiguous(),
        tails=held,
        y=y,
        rows=rows,
        width=width,
        segments=past.shape[0],
        steps=past.shape[0].bit_length(),
        frames=0 if tails is None else tails.shape[0],
        stride_x=x.stride(0),
        stride_f=0 if tails is None else tails.stride(0),
        stride_t=0 if tails is None else tails.stride(1),
        stride_g=0 if grad is None else grad.stride(0),
        VALUE=value if grad is None else both,
        BIASED=bias is not None,
        PAGED=paged,
        GRAD=grad is not None,
        TAPS=weight.shape[1],
        **shape.options(),
    )
    return y


def causal_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, query_offsets: Tensor, past: Tensor, tails: Tensor | None,
    activation: str | None,
) -> Tensor:  # fmt: skip
    """``toolkit::causal_conv``: float32, bfloat16 or float16; a row of ``past`` that does not exist is zeros."""
    held = None if tails is None else tails.contiguous()
    x = matrix("causal_conv", x)
    return convolve(x, weight, bias, None, query_offsets, past, held, activation, paged=False)


def causal_conv_paged(
    x: Tensor, weight: Tensor, bias: Tensor | None, query_offsets: Tensor, load_blocks: Tensor, store_rows: Tensor,
    store_blocks: Tensor, tails: Tensor, activation: str | None,
) -> Tensor:  # fmt: skip
    """``toolkit::causal_conv_paged``: a frame that does not exist is read as zeros and not written.

    The new tails are put aside before any is written: a frame may be a segment's source and its target.
    """
    x = matrix("causal_conv_paged", x)
    y = convolve(x, weight, bias, None, query_offsets, load_blocks, tails, activation, paged=True)
    saves, segments, width, taps = store_rows.shape[0], load_blocks.shape[0], x.shape[1], weight.shape[1]
    if saves and segments and width:
        staged = torch.empty(saves, taps - 1, width, dtype=tails.dtype, device=x.device)
        shape = part_of_row(width, 4)
        conv_tails[(blocks(saves, shape.rows) * blocks(width, shape.block),)](
            x=x,
            offsets=query_offsets.contiguous(),
            load_blocks=load_blocks.contiguous(),
            tails=tails,
            store_rows=store_rows.contiguous(),
            staged=staged,
            saves=saves,
            width=width,
            segments=segments,
            steps=segments.bit_length(),
            frames=tails.shape[0],
            stride_x=x.stride(0),
            stride_f=tails.stride(0),
            stride_t=tails.stride(1),
            TAPS=taps,
            **shape.options(),
        )
        state_write(tails, staged, store_blocks)
    return y
