"""``combine`` in Triton: every token adds its own rows in the order of its slots. No atomics, no sorting."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.triton_rows import blocks, matrix, part_of_row, tile_of, whole_row

_BLOCK = 1024  # columns that a program of the backward takes at a time


@triton.jit(do_not_specialize=["tokens"])
def combine_forward(
    y, rows, weights, out, tokens, width, stride_y,
    SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, column, inside = tile_of(tokens, width, ROWS, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for slot in range(SLOTS):
        row = tl.load(rows + token * SLOTS + slot, mask=token < tokens, other=-1)
        there = inside & (row >= 0)
        part = tl.load(y + row * stride_y + column, mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights + token * SLOTS + slot, mask=token < tokens, other=0.0).to(tl.float32)
        total += tl.where(there, part, 0.0)  # no slot adds nothing, even where its weight is NaN
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width"])
def combine_grad(
    grad, y, rows, weights, dy, dweights, width, stride_g, stride_y,
    SLOTS: tl.constexpr, WEIGHTED: tl.constexpr, TO_Y: tl.constexpr, TO_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one slot: dy of its row, and the gradient to its weight, a sum over the columns block by block."""
    slot = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + slot)
    if row < 0:
        return
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(weights + slot).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(grad + slot // SLOTS * stride_g + column, mask=inside, other=0.0).to(tl.float32)
        if TO_Y:
            tl.store(dy + row * width + column, (g * factor).to(dy.dtype.element_ty), mask=inside)
        if TO_WEIGHTS:
            total += g * tl.load(y + row * stride_y + column, mask=inside, other=0.0).to(tl.float32)
    if TO_WEIGHTS:
        tl.store(dweights + slot, tl.sum(total, 0).to(dweights.dtype.element_ty))


def combine(y: Tensor, rows: Tensor, weights: Tensor | None) -> Tensor:
    """``toolkit::combine``: y [R, N] in float32, bfloat16 or float16; products and sums rounded one by one."""
    values = matrix("combine", y)
    (tokens, slots), width = rows.shape, y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    if out.numel():
        tile = part_of_row(width, y.itemsize)
        combine_forward[(blocks(tokens, tile.rows) * blocks(width, tile.block),)](
            values, rows.contiguous(), values if weights is None else weights.contiguous(), out, tokens, width,
            values.stride(0), SLOTS=slots, WEIGHTED=weights is not None, **tile.options(),
        )  # fmt: skip
    return out


def combine_backward(
    grad: Tensor, y: Tensor, rows: Tensor, weights: Tensor | None, need_y: bool, need_weights: bool
) -> tuple[Tensor, Tensor]:
    """``toolkit::combine_backward``: gradients to y and weights; an empty tensor for one that is not needed."""
    g, values = matrix("combine_backward", grad), matrix("combine_backward", y)
    none = y.new_empty(0)
    # Rows that no slot names have no program, and slots without a row do nothing.
    to_y = torch.zeros(y.shape, dtype=y.dtype, device=y.device) if need_y else none
    to_weights = none.clone()
    if need_weights and weights is not None:
        to_weights = torch.zeros(weights.shape, dtype=weights.dtype, device=y.device)
    if rows.numel() and grad.numel():
        options = whole_row(_BLOCK).options() | {"BLOCK": _BLOCK}
        del options["ROWS"]
        combine_grad[(rows.numel(),)](
            g, values, rows.contiguous(), values if weights is None else weights.contiguous(), to_y, to_weights,
            grad.shape[1], g.stride(0), values.stride(0),
            SLOTS=rows.shape[1], WEIGHTED=weights is not None, TO_Y=need_y, TO_WEIGHTS=need_weights, **options,
        )  # fmt: skip
    return to_y, to_weights
