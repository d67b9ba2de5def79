"""The rotation of pairs in Triton, for both layouts; its backward is the same kernel with another sine table.

A program takes some tokens by some heads by the channels of a head, so that a token's angles are read once for several
heads. Every product and sum is rounded on its own, as in eager torch.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from toolkit.ops.triton_devices import check_dtype
from toolkit.ops.triton_rows import EXACT, TILE, blocks, matrix, power_of_2


@triton.jit
def angles(table, token, channel, tokens, stride, FIRST: tl.constexpr, COUNT: tl.constexpr):
    """Columns FIRST to FIRST + COUNT of ``table``, [tokens, 1, channels], float32."""
    inside = (token < tokens) & (channel < COUNT)
    return tl.load(table + token * stride + FIRST + channel, mask=inside, other=0.0).to(tl.float32)


@triton.jit(do_not_specialize=["tokens"])
def rotary_rotate(
    x, cos, sin, y, tokens, stride_t, stride_h, stride_c, stride_s,
    HEADS: tl.constexpr, WIDTH: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr,
    TOKENS: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, REST: tl.constexpr,
):  # fmt: skip
    groups: tl.constexpr = (HEADS + GROUP - 1) // GROUP
    program = tl.program_id(0)
    token = (program // groups).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)[:, None, None]
    head = (program % groups) * GROUP + tl.arange(0, GROUP)[None, :, None]
    here = (token < tokens) & (head < HEADS)
    source = x + token * stride_t + head.to(tl.int64) * stride_h
    target = y + (token * HEADS + head) * WIDTH
    if HALF > 0:
        channel = tl.arange(0, BLOCK)[None, None, :]
        c = angles(cos, token, channel, tokens, stride_c, 0, HALF)
        s = angles(sin, token, channel, tokens, stride_s, 0, HALF)
        if INTERLEAVED:
            pair = tl.arange(0, 2 * BLOCK)[None, None, :]
            inside = here & (pair < 2 * HALF)
            values = tl.load(source + pair, mask=inside, other=0.0).to(tl.float32)
            a, b = tl.split(tl.reshape(values, [TOKENS, GROUP, BLOCK, 2]))
            turned = tl.reshape(tl.join(a * c - b * s, b * c + a * s), [TOKENS, GROUP, 2 * BLOCK])
            tl.store(target + pair, turned.to(y.dtype.element_ty), mask=inside)
        else:
            inside = here & (channel < HALF)
            a = tl.load(source + channel, mask=inside, other=0.0).to(tl.float32)
            b = tl.load(source + HALF + channel, mask=inside, other=0.0).to(tl.float32)
            tl.store(target + channel, (a * c - b * s).to(y.dtype.element_ty), mask=inside)
            c = angles(cos, token, channel, tokens, stride_c, HALF, HALF)
            s = angles(sin, token, channel, tokens, stride_s, HALF, HALF)
            tl.store(target + HALF + channel, (b * c + a * s).to(y.dtype.element_ty), mask=inside)
    if REST > 0:
        channel = 2 * HALF + tl.arange(0, REST)[None, None, :]
        inside = here & (channel < WIDTH)
        tl.store(target + channel, tl.load(source + channel, mask=inside, other=0.0), mask=inside)


def rotary(x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """``toolkit::rotary``: x [T, H, D] in float32, bfloat16 or float16; cos and sin [T, R] of any of these."""
    check_dtype("rotary", x.dtype)
    tokens, heads, width = x.shape
    if width > 1 and x.stride(2) != 1:
        x = x.contiguous()
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if y.numel():
        c, s = (matrix("rotary", table.float() if table.dtype == torch.float64 else table) for table in (cos, sin))
        half = cos.shape[1] // 2
        rest = width - 2 * half
        block = power_of_2(half)
        size = max(2 * block if half else 1, power_of_2(rest) if rest else 1)
        group = min(power_of_2(heads), max(1, TILE // size))
        share = max(1, TILE // (size * group))
        rotary_rotate[(blocks(tokens, share) * blocks(heads, group),)](
            x, c, s, y, tokens, x.stride(0), x.stride(1), c.stride(0), s.stride(0),
            HEADS=heads, WIDTH=width, HALF=half, INTERLEAVED=interleaved,
            TOKENS=share, GROUP=group, BLOCK=block, REST=power_of_2(rest) if rest else 0, num_warps=4, **EXACT,
        )  # fmt: skip
    return y
