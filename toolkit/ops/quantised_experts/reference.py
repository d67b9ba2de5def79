"""The experts of an MoE layer with quantised weights, in plain torch: dense weights, then ``experts``."""

from collections.abc import Sequence

import torch
from torch import Tensor

from toolkit.ops.experts import reference as dense
from toolkit.ops.quantised_linear.reference import dequantise


def dense_weights(
    x: Tensor, up_codes: Tensor, up_scales: Sequence[Tensor], up_format: str, down_codes: Tensor,
    down_scales: Sequence[Tensor], down_format: str, offsets: Tensor, inner: int, gated: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """up [E, G I, H] and down [E, H, I] in x's dtype."""
    count, hidden, width = len(offsets) - 1, x.shape[1], 2 * inner if gated else inner
    up = dequantise(up_codes, up_scales, up_format, count * width, hidden, x.dtype)
    down = dequantise(down_codes, down_scales, down_format, count * hidden, inner, x.dtype)
    return up.view(count, width, hidden), down.view(count, hidden, inner)


def quantised_experts(
    x: Tensor, topk_weights: Tensor, up_codes: Tensor, up_scales: Sequence[Tensor], up_format: str,
    up_bias: Tensor | None, down_codes: Tensor, down_scales: Sequence[Tensor], down_format: str,
    down_bias: Tensor | None, order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor, inner: int, gated: bool,
    activation: str, score_position: str, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(out [T, H], z [R, G I]): see ``toolkit.ops.quantised_experts.quantised_experts``."""
    coded = up_codes, up_scales, up_format, down_codes, down_scales, down_format
    up, down = dense_weights(x, *coded, offsets, inner, gated)
    plan, flags = (order, rows, offsets, tiles), (activation, score_position, False, interleaved)
    return dense.experts(x, topk_weights, up, up_bias, down, down_bias, *plan, *flags)


def quantised_experts_fake(
    x: Tensor, topk_weights: Tensor, up_codes: Tensor, up_scales: Sequence[Tensor], up_format: str,
    up_bias: Tensor | None, down_codes: Tensor, down_scales: Sequence[Tensor], down_format: str,
    down_bias: Tensor | None, order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor, inner: int, gated: bool,
    *flags: object,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return out, x.new_empty(rows.numel(), 2 * inner if gated else inner)


def quantised_experts_backward(
    grad: Tensor, x: Tensor, topk_weights: Tensor, z: Tensor, up_codes: Tensor, up_scales: Sequence[Tensor],
    up_format: str, down_codes: Tensor, down_scales: Sequence[Tensor], down_format: str, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor, inner: int, gated: bool,
    activation: str, score_position: str, interleaved: bool,
    need_x: bool, need_topk_weights: bool, need_up_bias: bool, need_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Gradients to x, topk_weights, up_bias and down_bias; an empty tensor for one that is not needed."""
    coded = up_codes, up_scales, up_format, down_codes, down_scales, down_format
    up, down = dense_weights(x, *coded, offsets, inner, gated)
    plan, flags = (order, rows, offsets, tiles), (activation, score_position, False, interleaved)
    needs = need_x, need_topk_weights, False, need_up_bias, False, need_down_bias
    found = dense.experts_backward(grad, x, topk_weights, z, up, down, down_bias, *plan, *flags, *needs)
    return found[0], found[1], found[3], found[5]


def quantised_experts_backward_fake(
    grad: Tensor, x: Tensor, topk_weights: Tensor, z: Tensor, up_codes: Tensor, up_scales: Sequence[Tensor],
    up_format: str, down_codes: Tensor, down_scales: Sequence[Tensor], down_format: str, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor, inner: int, gated: bool,
    activation: str, score_position: str, interleaved: bool,
    need_x: bool, need_topk_weights: bool, need_up_bias: bool, need_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    count = offsets.shape[0] - 1

    def like(needed: bool, dtype: torch.dtype, *shape: int) -> Tensor:
        return torch.empty(shape if needed else (0,), dtype=dtype, device=x.device)

    return (
        like(need_x, x.dtype, *x.shape), like(need_topk_weights, topk_weights.dtype, *topk_weights.shape),
        like(need_up_bias, x.dtype, count, z.shape[1]), like(need_down_bias, x.dtype, count, x.shape[1]),
    )  # fmt: skip
