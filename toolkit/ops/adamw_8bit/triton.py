"""AdamW with moments in 8 bits, in Triton: a program a block of 256 elements."""

import math

import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.adamw_8bit.reference import BLOCK as _BLOCK


@triton.jit
def _count_below(magnitude, thresholds, COUNT: tl.constexpr):
    """How many of COUNT ascending thresholds lie below each magnitude."""
    low = tl.zeros_like(magnitude).to(tl.int32)
    for power in tl.static_range(7, -1, -1):
        middle = low + (1 << power)
        known = middle <= COUNT
        value = tl.load(thresholds + middle - 1, mask=known, other=float("inf"))
        low = tl.where(known & (value < magnitude), middle, low)
    return low


@triton.jit
def _shares(values, inside):
    """The largest magnitude of a block, NaN if there is one, and every value's share of it."""
    values = tl.where(inside, values, 0.0)
    largest = tl.where(tl.max((values != values).to(tl.int32), 0) > 0, float("nan"), tl.max(tl.abs(values), 0))
    return largest, values / tl.where(largest > 0, largest, float("inf"))


@triton.jit(do_not_specialize=["numel"])
def adamw_8bit_block(
    weight, grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, signed_map, signed_thresholds, map, thresholds,
    numel, keep1, add1, keep2, add2, eps, decay, rate, correction, BLOCK: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0).to(tl.int64)
    at = block * BLOCK + tl.arange(0, BLOCK)
    inside = at < numel
    d = tl.load(grad + at, mask=inside, other=0.0)
    m = tl.load(signed_map + tl.load(exp_avg + at, mask=inside, other=127).to(tl.int32)) * tl.load(
        exp_avg_scale + block
    )
    v = tl.load(map + tl.load(exp_avg_sq + at, mask=inside, other=0).to(tl.int32)) * tl.load(exp_avg_sq_scale + block)
    m = m * keep1 + d * add1
    v = v * keep2 + (d * d) * add2
    w = tl.load(weight + at, mask=inside, other=0.0)
    tl.store(weight + at, w * decay - m / (tl.sqrt_rn(v) * correction + eps) * rate, mask=inside)
    largest, share = _shares(m, inside)
    count = _count_below(tl.abs(share), signed_thresholds, 128)
    code = tl.where(share < 0, 127 - tl.minimum(count, 127), 127 + count)
    tl.store(exp_avg + at, code.to(tl.uint8), mask=inside)
    tl.store(exp_avg_scale + block, largest)
    largest, share = _shares(v, inside)
    count = tl.maximum(_count_below(share, thresholds, 255), (share > 0).to(tl.int32))  # above 0 stays above 0
    tl.store(exp_avg_sq + at, count.to(tl.uint8), mask=inside)
    tl.store(exp_avg_sq_scale + block, largest)


def adamw_8bit(
    weight: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_scale: Tensor,
    exp_avg_sq: Tensor,
    exp_avg_sq_scale: Tensor,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    step: int,
    *tables: Tensor,
) -> None:
    """``toolkit.ops.adamw_8bit.adamw_8bit``."""
    if not weight.numel():
        return
    adamw_8bit_block[(triton.cdiv(weight.numel(), _BLOCK),)](
        weight, grad, exp_avg, exp_avg_scale, exp_avg_sq, exp_avg_sq_scale, *tables, weight.numel(),
        beta1, 1 - beta1, beta2, 1 - beta2, eps, 1 - lr * weight_decay, lr / (1 - beta1**step),
        1 / math.sqrt(1 - beta2**step), BLOCK=_BLOCK, num_warps=1,
    )  # fmt: skip
