"""``combine`` in Triton: every token adds its K rows in order. No atomics, no sorting."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.triton_rows import blocks, matrix, part_of_row, tile_of, whole_row

_BLOCK = 1024  # columns per step of the backward


@triton.jit(do_not_specialize=["tokens"])
def combine_forward(
    y, rows, topk_weights, out, tokens, width, stride_y,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    token, column, inside = tile_of(tokens, width, ROWS, BLOCK)
    total = tl.zeros([ROWS, BLOCK], tl.float32)
    for k in range(TOP_K):
        row = tl.load(rows + token * TOP_K + k, mask=token < tokens, other=-1)
        there = inside & (row >= 0)
        part = tl.load(y + row * stride_y + column, mask=there, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(topk_weights + token * TOP_K + k, mask=token < tokens, other=0.0).to(tl.float32)
        total += tl.where(there, part, 0.0)  # a skipped pair adds nothing, even where its weight is NaN
    tl.store(out + token * width + column, total.to(out.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["width"])
def combine_grad(
    grad, y, rows, topk_weights, dy, dweights, width, stride_g, stride_y,
    TOP_K: tl.constexpr, WEIGHTED: tl.constexpr, TO_Y: tl.constexpr, TO_WEIGHTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Of one (token, k) pair: dy of its row, and the gradient to its weight, a sum over the columns block by block."""
    pair = tl.program_id(0).to(tl.int64)
    row = tl.load(rows + pair)
    if row < 0:
        return
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(topk_weights + pair).to(tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        inside = column < width
        g = tl.load(grad + pair // TOP_K * stride_g + column, mask=inside, other=0.0).to(tl.float32)
        if TO_Y:
            tl.store(dy + row * width + column, (g * factor).to(dy.dtype.element_ty), mask=inside)
        if TO_WEIGHTS:
            total += g * tl.load(y + row * stride_y + column, mask=inside, other=0.0).to(tl.float32)
    if TO_WEIGHTS:
        tl.store(dweights + pair, tl.sum(total, 0).to(dweights.dtype.element_ty))


def combine(y: Tensor, rows: Tensor, topk_weights: Tensor | None) -> Tensor:
    """``toolkit::combine``: y [R, N] in float32, bfloat16 or float16; multiplications and sums rounded one by one."""
    values = matrix("combine", y)
    (tokens, top_k), width = rows.shape, y.shape[1]
    out = torch.empty(tokens, width, dtype=y.dtype, device=y.device)
    if out.numel():
        tile = part_of_row(width, y.itemsize)
        combine_forward[(blocks(tokens, tile.rows) * blocks(width, tile.block),)](
            y=values,
            rows=rows.contiguous(),
            topk_weights=values if topk_weights is None else topk_weights.contiguous(),
            out=out,
            tokens=tokens,
            width=width,
            stride_y=values.stride(0),
            TOP_K=top_k,
            WEIGHTED=topk_weights is not None,
            **tile.options(),
        )
    return out


def combine_backward(
    grad: Tensor, y: Tensor, rows: Tensor, topk_weights: Tensor | None, need_y: bool, need_topk_weights: bool
) -> tuple[Tensor, Tensor]:
    """``toolkit::combine_backward``: gradients to y and topk_weights; an empty tensor for one that is not needed."""
    g, values = matrix("combine_backward", grad), matrix("combine_backward", y)
    none = y.new_empty(0)
    # No program writes rows of no pair, nor weights of skipped pairs.
    to_y = torch.zeros(y.shape, dtype=y.dtype, device=y.device) if need_y else none
    to_weights = none.clone()
    if need_topk_weights and topk_weights is not None:
        to_weights = torch.zeros(topk_weights.shape, dtype=topk_weights.dtype, device=y.device)
    if rows.numel() and grad.numel():
        options = whole_row(_BLOCK).options() | {"BLOCK": _BLOCK}
        del options["ROWS"]
        combine_grad[(rows.numel(),)](
            grad=g,
            y=values,
            rows=rows.contiguous(),
            topk_weights=values if topk_weights is None else topk_weights.contiguous(),
            dy=to_y,
            dweights=to_weights,
            width=grad.shape[1],
            stride_g=g.stride(0),
            stride_y=values.stride(0),
            TOP_K=rows.shape[1],
            WEIGHTED=topk_weights is not None,
            TO_Y=need_y,
            TO_WEIGHTS=need_topk_weights,
            **options,
        )
    return to_y, to_weights
