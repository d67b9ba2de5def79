"""``quantised_experts`` on a GPU: the weights are dequantised for the call, then the kernels of ``experts``."""

from collections.abc import Sequence

from torch import Tensor

from toolkit.ops.experts import triton as dense
from toolkit.ops.experts import triton_backward
from toolkit.ops.quantised_experts.reference import dense_weights

__all__ = ["quantised_experts", "quantised_experts_backward"]


def quantised_experts(
    x: Tensor, topk_weights: Tensor, up_codes: Tensor, up_scales: Sequence[Tensor], up_format: str,
    up_bias: Tensor | None, down_codes: Tensor, down_scales: Sequence[Tensor], down_format: str,
    down_bias: Tensor | None, order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor, inner: int, gated: bool,
    activation: str, score_position: str, interleaved: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """``toolkit::quantised_experts``: bitwise identical to ``toolkit::experts`` of the dequantised weights."""
    coded = up_codes, up_scales, up_format, down_codes, down_scales, down_format
    up, down = dense_weights(x, *coded, offsets, inner, gated)
    plan, flags = (order, rows, offsets, tiles), (activation, score_position, False, interleaved)
    return dense.experts(x, topk_weights, up, up_bias, down, down_bias, *plan, *flags)


def quantised_experts_backward(
    grad: Tensor, x: Tensor, topk_weights: Tensor, z: Tensor, up_codes: Tensor, up_scales: Sequence[Tensor],
    up_format: str, down_codes: Tensor, down_scales: Sequence[Tensor], down_format: str, down_bias: Tensor | None,
    order: Tensor, rows: Tensor, offsets: Tensor, tiles: Tensor, inner: int, gated: bool,
    activation: str, score_position: str, interleaved: bool,
    need_x: bool, need_topk_weights: bool, need_up_bias: bool, need_down_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """``toolkit::quantised_experts_backward``: bitwise identical to ``toolkit::experts_backward``."""
    coded = up_codes, up_scales, up_format, down_codes, down_scales, down_format
    up, down = dense_weights(x, *coded, offsets, inner, gated)
    plan, flags = (order, rows, offsets, tiles), (activation, score_position, False, interleaved)
    needs = need_x, need_topk_weights, False, need_up_bias, False, need_down_bias
    found = triton_backward.experts_backward(grad, x, topk_weights, z, up, down, down_bias, *plan, *flags, *needs)
    return found[0], found[1], found[3], found[5]
