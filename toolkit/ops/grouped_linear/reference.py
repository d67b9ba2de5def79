"""Grouped GEMMs and the combine over a token's rows, in plain torch: the specification.

T tokens, K experts per token, R = T K rows, E experts; rows from offsets[E] on are zeros and have no gradient.
"""

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Tensor

from toolkit.ops.linear.reference import linear as linear_reference
from toolkit.ops.rowwise import upcast


def spans(offsets: Tensor) -> Iterator[tuple[int, slice]]:
    """Yields (expert, its rows) for every expert that has rows."""
    for expert, (begin, end) in enumerate(pairwise(offsets.tolist())):
        if end > begin:
            yield expert, slice(begin, end)


def grouped_linear(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    gather: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    """y [R, N]: ``weight[e] x + bias[e]`` for the rows of expert e; in float32 (float64 for float64), rounded once."""
    outputs = weight.shape[2 if transposed else 1]
    parts = []
    for expert, span in spans(offsets):
        matrix = weight[expert].T if transposed else weight[expert]
        source = x[order[span] // rows.shape[1]] if gather else x[span]
        shift = None if bias is None else upcast(bias[expert])
        parts.append(linear_reference(upcast(source), upcast(matrix), shift).to(x.dtype))
    done = sum(part.shape[0] for part in parts)
    return torch.cat([*parts, x.new_zeros(rows.numel() - done, outputs)])


def grouped_linear_backward(
    grad: Tensor, x: Tensor, weight: Tensor, order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    gather: bool, transposed: bool, need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, weight and bias [E, N]; an empty tensor for one that is not needed.

    ``dx = g W_e`` per row, with ``gather`` summed over a token's rows in order of k; ``dW_e = g^T x`` and
    ``db_e = sum g`` over the rows of e, ascending.
    """
    to_rows = x.new_zeros(rows.numel(), x.shape[1], dtype=upcast(x[:0]).dtype)
    to_weight = torch.zeros_like(weight) if need_weight else x.new_empty(0)
    to_bias = weight.new_zeros(weight.shape[0], grad.shape[1]) if need_bias else x.new_empty(0)
    for expert, span in spans(offsets):
        g = upcast(grad[span])
        source = upcast(x[order[span] // rows.shape[1]] if gather else x[span])
        matrix = upcast(weight[expert])
        if need_x:
            to_rows[span] = g @ (matrix.T if transposed else matrix)
        if need_weight:
            outer = g.T @ source
            to_weight[expert] = (outer.T if transposed else outer).to(weight.dtype)
        if need_bias:
            to_bias[expert] = g.sum(0).to(weight.dtype)
    to_x = combine(to_rows, rows, None) if gather and need_x else to_rows
    return to_x.to(x.dtype) if need_x else x.new_empty(0), to_weight, to_bias


def grouped_linear_fake(
    x: Tensor, weight: Tensor, bias: Tensor | None, order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    gather: bool, transposed: bool,
) -> Tensor:  # fmt: skip
    return x.new_empty(rows.numel(), weight.shape[2 if transposed else 1])


def grouped_linear_backward_fake(
    grad: Tensor, x: Tensor, weight: Tensor, order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor,
    gather: bool, transposed: bool, need_x: bool, need_weight: bool, need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    none = x.new_empty(0)
    return (
        torch.empty(x.shape, dtype=x.dtype, device=x.device) if need_x else none,
        torch.empty(weight.shape, dtype=weight.dtype, device=x.device) if need_weight else none.clone(),
        weight.new_empty(weight.shape[0], grad.shape[1]) if need_bias else none.clone(),
    )


def combine(y: Tensor, rows: Tensor, topk_weights: Tensor | None) -> Tensor:
    """out [T, N] = sum over k, ascending, of topk_weights[t, k] y[rows[t, k]]; pairs of row -1 add nothing."""
    out = upcast(y).new_zeros(rows.shape[0], y.shape[1])
    for k in range(rows.shape[1]):
        row = rows[:, k]
        part = upcast(y)[row.clamp_min(0)] if y.shape[0] else out
        if topk_weights is not None:
            # Of a skipped pair neither the weight nor the row may reach a gradient.
            part = part * torch.where(row[:, None] >= 0, upcast(topk_weights[:, k : k + 1], y), 0.0)
        out = out + torch.where(row[:, None] >= 0, part, 0.0)
    return out.to(y.dtype)


def combine_backward(
    grad: Tensor, y: Tensor, rows: Tensor, topk_weights: Tensor | None, need_y: bool, need_topk_weights: bool
) -> tuple[Tensor, Tensor]:
    """dy [R, N] = weight times grad of the row's token (0 for rows of no pair); dweights [T, K] = <grad, y>."""
    g, kept = upcast(grad), rows >= 0
    none = y.new_empty(0)
    to_y, to_weights = none, none.clone()
    if need_y:
        to_y = g.new_zeros(y.shape)
        factor = g.new_ones(rows.shape) if topk_weights is None else upcast(topk_weights, y)
        to_y[rows[kept]] = (g[:, None, :] * factor[..., None])[kept]
        to_y = to_y.to(y.dtype)
    if need_topk_weights:
        assert topk_weights is not None
        dots = g.new_zeros(rows.shape)
        dots[kept] = (g[:, None, :].expand(*rows.shape, -1)[kept] * upcast(y)[rows[kept]]).sum(-1)
        to_weights = dots.to(topk_weights.dtype)
    return to_y, to_weights


def combine_fake(y: Tensor, rows: Tensor, topk_weights: Tensor | None) -> Tensor:
    return y.new_empty(rows.shape[0], y.shape[1])


def combine_backward_fake(
    grad: Tensor, y: Tensor, rows: Tensor, topk_weights: Tensor | None, need_y: bool, need_topk_weights: bool
) -> tuple[Tensor, Tensor]:
    none = y.new_empty(0)
    to_y = torch.empty(y.shape, dtype=y.dtype, device=y.device) if need_y else none
    if not need_topk_weights or topk_weights is None:
        return to_y, none.clone()
    return to_y, torch.empty(topk_weights.shape, dtype=topk_weights.dtype, device=y.device)
